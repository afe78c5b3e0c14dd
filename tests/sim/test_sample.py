"""A fixed sample of worlds holds every invariant, runs are repeatable, and past failures stay mended."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvbaton.testing.sim import coverage
from kvbaton.testing.sim.campaign import run_seeds
from kvbaton.testing.sim.generate import generate
from kvbaton.testing.sim.scenario import Scenario
from kvbaton.testing.sim.world import run

SEEDS = 300
REGRESSIONS = sorted((Path(__file__).parent / "regressions").glob("*.json"))


@pytest.mark.parametrize("first", range(0, SEEDS, 50))
def test_a_fixed_sample_holds_every_invariant(first: int) -> None:
    summary = run_seeds(range(first, first + 50))
    assert not summary.findings, summary.findings
    assert not coverage.forbidden_but_reached(summary.cells)
    assert summary.results["success"]


def test_a_run_is_the_same_again() -> None:
    """Everything that is decided is decided by the seed: the same steps, times, faults and ends."""
    for seed in (3, 20, 33):
        first, second = run(generate(seed)), run(generate(seed))
        assert (first.steps, first.seconds) == (second.steps, second.seconds)
        assert (first.cells, first.faults, first.results) == (second.cells, second.faults, second.results)


def test_tracing_changes_nothing() -> None:
    plain, traced = run(generate(20)), run(generate(20), tracing=True)
    assert (plain.steps, plain.seconds) == (traced.steps, traced.seconds)
    assert traced.trace
    assert not plain.trace


def test_a_scenario_survives_its_file() -> None:
    for seed in range(50):
        scenario = generate(seed)
        assert Scenario.from_json(scenario.to_json()) == scenario


@pytest.mark.parametrize("path", REGRESSIONS, ids=lambda path: path.stem)
def test_a_past_failure_stays_mended(path: Path) -> None:
    outcome = run(Scenario.from_json(path.read_bytes()), tracing=True)
    assert outcome.ok, "\n".join([*outcome.trace, outcome.text])

"""The simulator finds every planted bug within a bounded number of seeds, makes it small, and tells its story."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterable
from pathlib import Path

import pytest
from msgspec.structs import replace
from onward_mutants import ONWARD_ONLY
from sim_mutants import MUTANTS, Mutant

from kvbaton.cli.main import main
from kvbaton.cli.program import FAILED
from kvbaton.testing.sim.generate import generate
from kvbaton.testing.sim.shrink import shrink
from kvbaton.testing.sim.world import Outcome, run

#: Seeds from 0 on within which every planted bug must show.
MOST_SEEDS = 1_000


@pytest.fixture(autouse=True)
def _silent_drivers(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, logger="kvbaton")


def first_failure(mutant: Mutant, seeds: Iterable[int]) -> Outcome | None:
    with mutant.planted():
        return next((outcome for seed in seeds if not (outcome := run(generate(seed))).ok), None)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_bug_is_found(mutant: Mutant) -> None:
    failed = first_failure(mutant, (mutant.shown_by, *range(MOST_SEEDS)))
    assert failed is not None, mutant.what
    crashes = ("crash: AttributeError", "crash: TypeError")
    assert failed.kind not in crashes, "the patch names, or calls, what is no more: it would be found by anything"
    assert run(failed.scenario).ok, "what fails must be the planted bug, and it must be gone again"


@pytest.mark.parametrize("mutant", ONWARD_ONLY, ids=lambda mutant: mutant.name)
def test_it_takes_rooms_that_are_handed_on_to_find_these(mutant: Mutant) -> None:
    with mutant.planted():
        for seed in (mutant.shown_by, *range(MOST_SEEDS)):
            scenario = generate(seed)
            plain = replace(scenario, requests=tuple(r for r in scenario.requests if r.onward is None))
            if plain != scenario and not run(scenario).ok:
                assert run(plain).ok
                return
    raise AssertionError(mutant.what)


def test_a_failure_shrinks_and_replays() -> None:
    mutant = next(m for m in MUTANTS if m.name == "ack counted instead of identified")
    failed = first_failure(mutant, (mutant.shown_by, *range(MOST_SEEDS)))
    assert failed is not None
    with mutant.planted():
        small = shrink(failed, most_runs=150)
        again = run(small.scenario, tracing=True)
    assert small.kind == again.kind == failed.kind
    assert len(small.scenario.requests) <= len(failed.scenario.requests)
    assert len(small.scenario.faults) <= len(failed.scenario.faults)
    assert "!!!" in again.trace[-1]


def test_the_command_says_how_to_replay_what_it_was_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvbaton.cli.program.start_logging", lambda _level: None)
    mutant = next(m for m in MUTANTS if m.name == "ack counted instead of identified")
    failed = first_failure(mutant, (mutant.shown_by, *range(MOST_SEEDS)))
    assert failed is not None
    file = tmp_path / "a scenario.json"
    file.write_bytes(failed.scenario.to_json())
    seed = str(failed.scenario.seed)
    with mutant.planted():
        for given in (["--scenario", str(file)], ["--seed", seed], ["--first-seed", seed, "--seeds", "1"]):
            assert main(["sim", "--no-shrink", "--jobs", "1", *given], {}) == FAILED
            (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("replay: ")]
            wanted = ["--scenario", str(file)] if "--scenario" in given else ["--seed", seed]
            assert shlex.split(line)[1:] == ["kvbaton", "sim", *wanted, "--trace"]

"""A fixed handful of the fault matrix; ``make chaos`` runs all of it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from kvbaton.serving.fleet import Fleet
from lab.chaos.fault import Fault, Phase, Victim, matrix, quick
from lab.chaos.matrix import run_matrix
from lab.chaos.scene import answers_of


def test_every_cell_of_the_quick_matrix_is_green(fleet: Fleet, runner: asyncio.Runner, tmp_path: Path) -> None:
    assert fleet.reference is not None
    expected = runner.run(answers_of(fleet.reference, fleet.http))
    results = runner.run(run_matrix(quick(), tmp_path, lambda _spec, _result: None, expected=expected))
    assert [result.spec for result in results] == quick()
    for result in results:
        assert result.ok, f"{result.spec}: {result.failures}"


def test_the_matrix_has_every_fault_victim_and_phase_once() -> None:
    specs = matrix()
    assert len(set(specs)) == len(specs)
    assert {spec.fault for spec in specs} == set(Fault)
    assert set(quick()) <= set(specs)
    for victim in (Victim.PREFILL, Victim.DECODE):
        for fault in (Fault.KILL, Fault.RESTART, Fault.TERM, Fault.STOP, Fault.HANG, Fault.FILES, Fault.DISK):
            assert {s.phase for s in specs if (s.fault, s.victim) == (fault, victim)} == set(Phase)

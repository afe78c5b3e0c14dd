"""Where the table of ``python -m lab chaos`` goes is looked at before minutes are spent."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.chaos.cell import CellResult
from lab.chaos.fault import Fault, Phase, Spec, Victim, matrix
from lab.chaos.report import BEGIN, END, HEADINGS, rows, write_into
from lab.commands import LAB


def test_a_page_that_cannot_take_the_table_is_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    page = tmp_path / "page.md"
    for text, told in ((None, "No such file"), ("no markers", "has no lines")):
        if text is not None:
            page.write_text(text)
        assert LAB.main(["chaos", "--write", str(page)]) == 2
        assert told in capsys.readouterr().err


def test_only_what_stands_between_the_markers_changes(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before {BEGIN} old {END} behind")
    write_into(page, [])
    text = page.read_text()
    assert text.startswith(f"before {BEGIN}\n")
    assert text.endswith(f"{END} behind")
    assert " old " not in text


def test_cells_with_a_second_worker_are_one_column_beside_those_without() -> None:
    alone = Spec(Fault.KILL, Victim.DECODE, Phase.OPEN)
    results = [
        CellResult(spec=alone, outcome="peer_lost", seconds=0.3),
        CellResult(spec=Spec(Fault.KILL, Victim.DECODE, Phase.OPEN, workers=2), outcome="answer", seconds=1.26),
        CellResult(
            spec=Spec(Fault.KILL, Victim.DECODE, Phase.FIRST, workers=2),
            outcome="peer_lost",
            seconds=2.0,
            failures=("the client noticed",),
        ),
    ]
    (row,) = rows(results)
    told = dict(zip(HEADINGS, row, strict=True))
    assert told["open"] == "✓ peer_lost 0.3 s"
    assert told["with a second worker"] == "✗ 1 of 2 answers, 2.0 s"
    assert dict(zip(HEADINGS, rows(results[:2])[0], strict=True))["with a second worker"] == "✓ 1 of 1 answers, 1.3 s"


def test_every_cell_is_there_with_a_second_worker_too() -> None:
    specs = matrix()
    alone, beside = ([s for s in specs if s.workers == workers] for workers in (1, 2))
    assert [(s.fault, s.victim, s.phase, s.network) for s in alone] == [
        (s.fault, s.victim, s.phase, s.network) for s in beside
    ]
    assert specs == [*alone, *beside], "those of one scene are together"

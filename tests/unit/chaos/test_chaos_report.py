"""Where the table of ``python -m lab chaos`` goes is looked at before minutes are spent."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.chaos.report import BEGIN, END, write_into
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

"""``kvbaton serve`` that serves nothing, in this process: a server that starts takes seconds, to refuse takes none."""

from __future__ import annotations

import pytest

from kvbaton.cli.main import main


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What it says on stderr."""
    code = main(["serve", *arguments], {})
    captured = capsys.readouterr()
    assert code == 2, captured
    assert not captured.out
    assert "Traceback" not in captured.err
    return captured.err

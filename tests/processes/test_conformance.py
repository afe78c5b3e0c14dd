"""``python -m lab conformance --quick``: every kind of pool between unequal groups of ranks, over real NIXL."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from lab.commands import LAB
from lab.conformance.campaign import QUICK


def test_the_quick_cells_are_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = LAB.main(["conformance", "--quick", "--json", "--keep", str(tmp_path)])
    captured = capsys.readouterr()
    assert code == 0, captured
    found = msgspec.json.decode(captured.out)
    assert found["equal"]
    wanted = [(family, name) for family, names in QUICK for name in names]
    assert [(cell["family"], cell["topology"]) for cell in found["cells"]] == wanted
    assert all(cell["bytes"] > 0 and cell["requests"] for cell in found["cells"])


def test_a_name_that_is_not_known_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert LAB.main(["conformance", "--family", "nobody"]) == 2
    assert "'nobody' is neither a family" in capsys.readouterr().err

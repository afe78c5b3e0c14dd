"""``python -m lab conformance --quick``: every kind of pool between unequal groups of ranks, over real NIXL."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from lab.commands import LAB
from lab.conformance.campaign import QUICK

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}


def test_the_quick_cells_are_equal(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lab", "conformance", "--quick", "--json", "--keep", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = msgspec.json.decode(done.stdout)
    assert found["equal"]
    wanted = [(family, name) for family, names in QUICK for name in names]
    assert [(cell["family"], cell["topology"]) for cell in found["cells"]] == wanted
    assert all(cell["bytes"] > 0 and cell["requests"] for cell in found["cells"])


def test_a_name_that_is_not_known_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert LAB.main(["conformance", "--family", "nobody"]) == 2
    assert "'nobody' is neither a family" in capsys.readouterr().err

"""The checks for a GPU run dry, in memory of the host: what would start there starts."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from lab.gpu.checks import run_here


@pytest.mark.parametrize("name", ["environment", "dram-to-vram", "kernels", "broken-fence"])
def test_a_check_runs_dry(name: str) -> None:
    result = run_here(name, "cpu")
    assert result.ok, result.error
    assert result.figures

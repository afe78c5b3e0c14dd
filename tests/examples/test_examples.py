"""The examples run as they are printed, in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
LONGEST_SECONDS = 60.0


def run(name: str, *arguments: str) -> str:
    """What an example prints. Fails unless it ends with 0 and has nothing to say on stderr."""
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_SECONDS)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


@pytest.mark.parametrize("backend", ["nixl", "memory", "tcp_transport:TcpTransport"])
def test_two_processes_hand_over_a_pool(backend: str) -> None:
    assert run("handoff.py", backend) == f"Success 98,304 bytes, {backend}\n"


def test_the_first_example_is_short() -> None:
    assert len((EXAMPLES / "handoff.py").read_text().splitlines()) < 60


def test_a_step_driven_engine_answers_right_and_loses_no_page() -> None:
    assert "0 wrong, 1 aborted; free pages: (32, 32)" in run("engine.py")


def test_every_example_is_run() -> None:
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    missing = [path.name for path in EXAMPLES.glob("*.py") if path.stem not in tests]
    assert not missing

"""A virtual environment of its own for the clients of others, at the versions that were tried."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from kvbaton.errors import ConfigError

SGLANG_ROUTER = "0.3.2"
OPENAI = "3.57.0"
_WANTED = (f"sglang-router=={SGLANG_ROUTER}", f"openai=={OPENAI}")


def prepare(directory: Path) -> Path:
    """The interpreter of the environment in ``directory``, made unless it is there. Raises ConfigError."""
    python, ready = directory / "bin" / "python", directory / ".ready"
    wanted = " ".join(_WANTED)
    if not (ready.is_file() and ready.read_text() == wanted):
        _run(sys.executable, "-m", "venv", "--clear", str(directory))
        _run(str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", "install", *_WANTED)
        ready.write_text(wanted)
    return python


def _run(*command: str) -> None:
    ended = subprocess.run(command, check=False, stdout=sys.stderr)
    if ended.returncode:
        raise ConfigError(f"{' '.join(command)} ended with {ended.returncode}")

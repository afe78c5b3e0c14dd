"""Commands that build an engine's virtual environment; what they print goes to stderr."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from kvbaton.errors import ConfigError


def made(directory: Path, version: str, install: Callable[[Path, Path], None]) -> Path:
    """The interpreter of the virtual environment in ``directory``, made unless it is there with this ``version`` of
    what is wanted; ``install`` is given the interpreter and the directory of its packages. Raises ConfigError."""
    python, ready = directory / "bin" / "python", directory / ".ready"
    if not ready.is_file() or ready.read_text() != version:
        run(sys.executable, "-m", "venv", "--clear", str(directory))
        install(python, next((directory / "lib").glob("python*/site-packages")))
        ready.write_text(version)
    return python


def pip(python: Path, *arguments: str) -> None:
    """Raises ConfigError where pip ends with an error."""
    run(str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments)


def run(*command: str) -> None:
    """Raises ConfigError where the command ends with an error."""
    ended = subprocess.run(command, check=False, stdout=sys.stderr)
    if ended.returncode:
        raise ConfigError(f"{' '.join(command)} ended with {ended.returncode}")

"""Commands that build an engine's virtual environment; what they print goes to stderr."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from kvbaton.errors import ConfigError


def made(directory: Path, recipe: Sequence[Path], install: Callable[[Path, Path], None]) -> Path:
    """The interpreter of the virtual environment in ``directory``, made unless it is there; made anew where the files
    of the ``recipe`` have changed since, which say what is wanted. ``install`` is given the interpreter and the
    directory of its packages. Raises ConfigError."""
    python, ready = directory / "bin" / "python", directory / ".ready"
    version = hashlib.sha256(b"".join(file.read_bytes() for file in recipe)).hexdigest()
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

"""Commands that build an engine's virtual environment; what they print goes to stderr."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from kvbaton.errors import ConfigError


def pip(python: Path, *arguments: str) -> None:
    """Raises ConfigError where pip ends with an error."""
    run(str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments)


def run(*command: str) -> None:
    """Raises ConfigError where the command ends with an error."""
    ended = subprocess.run(command, check=False, stdout=sys.stderr)
    if ended.returncode:
        raise ConfigError(f"{' '.join(command)} ended with {ended.returncode}")

"""The wheel as somebody meets it who has nothing else: built, looked into, installed in an empty environment, used.

What is installed there comes from the package index, in the versions of ``constraints.txt``. This file must not import
kvbaton: what it judges is the installed one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "handoff.py"
#: All that the library needs by itself.
NEEDS = {"msgspec", "numpy", "pyzmq"}
MUST_HAVE = ("kvbaton/py.typed", "kvbaton/serving/models/recall/model.safetensors")
#: A wheel above this has something in it that does not belong there.
MAX_BYTES = 4 << 20
MAX_IMPORT_SECONDS = 0.3
COMMAND_SECONDS = 300.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What was seen. ``faults``: what is wrong, for people; empty if nothing is."""

    name: str
    size_bytes: int
    files: int
    needs: tuple[str, ...]
    import_seconds: float
    example: str
    faults: tuple[str, ...]


class BrokenWheel(Exception):
    """A step failed; the message has the command and what it wrote."""


def examine() -> Report:
    """Build, install and use the wheel. Raises BrokenWheel where a step cannot be done at all."""
    with TemporaryDirectory(prefix="kvbaton-wheel-") as folder:
        here = Path(folder)
        _run(here, sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--wheel-dir", folder)
        (wheel,) = here.glob("*.whl")
        names, needs = contents(wheel)
        python = _install(here, wheel)
        seconds = min(_import_seconds(here, python) for _ in range(3))
        shutil.copy(EXAMPLE, here)
        example = _run(here, python, "-W", "error", EXAMPLE.name, "memory").strip()
        return Report(
            name=wheel.name,
            size_bytes=wheel.stat().st_size,
            files=len(names),
            needs=tuple(sorted(needs)),
            import_seconds=seconds,
            example=example,
            faults=tuple(faults(names, needs, wheel.stat().st_size, seconds)),
        )


def contents(wheel: Path) -> tuple[list[str], set[str]]:
    """The names of all files, and of the distributions that are needed without any extra."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        required = Parser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist", [])
    return names, {
        line.split(">")[0].split("<")[0].split("=")[0].strip() for line in required if "extra ==" not in line
    }


def faults(names: list[str], needs: set[str], size_bytes: int, import_seconds: float) -> list[str]:
    """What is wrong with a wheel."""
    found = [f"{name} does not belong in it" for name in names if not name.startswith(("kvbaton/", "kvbaton-"))]
    found += [f"{name} is missing" for name in MUST_HAVE if name not in names]
    if needs != NEEDS:
        found.append(f"it needs {sorted(needs)}, the library is to need {sorted(NEEDS)}")
    if size_bytes > MAX_BYTES:
        found.append(f"it has {size_bytes:,} bytes, more than {MAX_BYTES:,}")
    if import_seconds > MAX_IMPORT_SECONDS:
        found.append(f"import kvbaton takes {import_seconds:.2f} s, more than {MAX_IMPORT_SECONDS:g} s")
    return found


def _install(here: Path, wheel: Path) -> str:
    """An environment with the wheel and what that needs, nothing else; its interpreter."""
    _run(here, sys.executable, "-m", "venv", "environment")
    python = str(here / "environment" / "bin" / "python")
    _run(here, python, "-m", "pip", "install", "--constraint", str(ROOT / "constraints.txt"), str(wheel))
    _run(here, str(here / "environment" / "bin" / "kvbaton"), "--help")
    return python


def _import_seconds(here: Path, python: str) -> float:
    script = "import time; start = time.perf_counter(); import kvbaton; print(time.perf_counter() - start)"
    return float(_run(here, python, "-c", script))


def _run(here: Path, *command: str) -> str:
    """What a command prints; nothing of this repository can be imported by it."""
    quiet = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_QUIET": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | quiet
    started = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=here, env=environment, capture_output=True, text=True, timeout=COMMAND_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise BrokenWheel(f"{' '.join(command)} did not end within {time.monotonic() - started:.0f} s") from error
    if done.returncode:
        raise BrokenWheel(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout

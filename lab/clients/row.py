"""One row of what was run, and how a client's own program is run for it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct

from lab.programs import output

#: The longest that a client's program may take.
PROGRAM_SECONDS = 900.0
_MOST_SAID = 600
#: What can be run by itself.
PARTS = ("shapes", "sdk", "chains", "lm-eval", "benchmarks", "routers", "promtool")


class Row(Struct, frozen=True, kw_only=True):
    client: str
    what: str
    ok: int
    asked: int
    seconds: float
    said: str = ""


async def program(*command: str, log: Path, variables: Mapping[str, str] | None = None) -> str:
    """Run a client; what it printed is also in ``log``. Raises RuntimeError where it fails, TimeoutError."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, **(variables or {})},
    )
    said, _ = await output(process, PROGRAM_SECONDS)
    log.write_bytes(said)
    if process.returncode:
        raise RuntimeError(f"it ended with {process.returncode}: {said[-_MOST_SAID:].decode('utf-8', 'replace')}")
    return said.decode("utf-8", "replace")

"""One row of what was run, and how a client's own program is run for it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct

#: The longest that a client's program may take.
PROGRAM_SECONDS = 900.0
#: A server that was asked to end has ended by then.
STOP_SECONDS = 20.0
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


async def said_by(process: asyncio.subprocess.Process) -> bytes:
    """What a program prints until it ends. Raises TimeoutError, and kills it then."""
    try:
        async with asyncio.timeout(PROGRAM_SECONDS):
            said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return said


async def stop(process: asyncio.subprocess.Process) -> None:
    """End a server, by force where it does not end by itself."""
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(STOP_SECONDS):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


async def program(*command: str, log: Path, variables: Mapping[str, str] | None = None) -> str:
    """Run a client; what it printed is also in ``log``. Raises RuntimeError where it fails, TimeoutError."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, **(variables or {})},
    )
    said = await said_by(process)
    log.write_bytes(said)
    if process.returncode:
        raise RuntimeError(f"it ended with {process.returncode}: {said[-_MOST_SAID:].decode('utf-8', 'replace')}")
    return said.decode("utf-8", "replace")

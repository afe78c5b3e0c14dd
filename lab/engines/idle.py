"""What processes use when nothing happens."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import psutil

#: How long is waited after the last request, and how long is watched.
QUIET_SECONDS, WATCHED_SECONDS = 2.0, 20.0


async def idle_parts(processes: Sequence[psutil.Process]) -> list[float]:
    """Part of a core that each uses."""
    await asyncio.sleep(QUIET_SECONDS)
    before = [sum(process.cpu_times()[:2]) for process in processes]
    await asyncio.sleep(WATCHED_SECONDS)
    return [
        (sum(process.cpu_times()[:2]) - was) / WATCHED_SECONDS for process, was in zip(processes, before, strict=True)
    ]

"""Prometheus' ``promtool check metrics`` on what real processes count, after all that was asked of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from kvbaton.serving.fleet import Fleet, Server
from lab.clients.row import Row

CLIENT = "promtool check metrics"


async def checked(promtool: str, fleet: Fleet, servers: Sequence[Server]) -> Row:
    """Clean is: exit status 0, and not a word."""
    started, said = time.monotonic(), []
    version, _ = await _ran(promtool, "--version")
    for server in servers:
        async with fleet.http.get(f"{server.url}/metrics") as response:
            metrics = await response.read()
        complaints, status = await _ran(promtool, "check", "metrics", given=metrics)
        if status or complaints.strip():
            said.append(f"{server.name}: status {status}: {complaints.strip()}")
    return Row(
        client=CLIENT,
        what=f"{', '.join(server.name for server in servers)}; {version.partition('(')[0].strip()}",
        ok=len(servers) - len(said),
        asked=len(servers),
        seconds=time.monotonic() - started,
        said="; ".join(said),
    )


async def _ran(*command: str, given: bytes = b"") -> tuple[str, int]:
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate(given)
    return said.decode("utf-8", "replace"), process.returncode or 0

"""The open connections of one listening HTTP port: silent ones do not keep others out.

Rules:

- A connection that has brought no request within :data:`HEAD_SECONDS` is closed, however slowly it goes on talking.
- Where more than ``most`` are open, idle ones are closed: first those that never brought a request, the oldest first.
- One with a request in progress is never touched here; how many there are is the admission limit's business.

This file must not know routes.
"""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from aiohttp import web

from kvbaton.discovery.guard import Handler

#: A new connection has brought its first request by then.
HEAD_SECONDS = 15.0
#: An idle connection is kept for the next request for so long.
KEEPALIVE_SECONDS = 75.0
#: Most connections of one port, where the process may have four times as many files.
MAX_CONNECTIONS = 4096
#: File descriptors that a server asks for, as far as its hard limit allows.
WANTED_FILES = 1 << 16
SWEEP_SECONDS = 0.5


class Connection(Protocol):
    """``aiohttp.web.RequestHandler`` is one."""

    def force_close(self) -> None: ...


def raise_file_limit() -> None:
    """Let this process open as many files as it may: every connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_FILES if hard == resource.RLIM_INFINITY else min(hard, WANTED_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def affordable() -> int:
    """Most connections of one port of this process."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else max(16, min(MAX_CONNECTIONS, soft // 4))


class Connections:
    """See the module. ``watch`` is a middleware, :meth:`sweep` is called again and again with what is open."""

    def __init__(
        self,
        *,
        most: int | None = None,
        head_seconds: float = HEAD_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most = affordable() if most is None else most
        self._head_seconds = head_seconds
        self._clock = clock
        self._since: dict[Connection, float] = {}  # in order of appearance
        self._served: set[Connection] = set()
        self._busy: set[Connection] = set()
        self.closed = 0

    def __repr__(self) -> str:
        return f"<Connections {len(self._since)} of {self._most}, {len(self._busy)} busy, {self.closed} closed>"

    async def watch(self, http: web.Request, handler: Handler) -> web.StreamResponse:
        """Note which connection has a request in progress."""
        connection = http.protocol
        self._busy.add(connection)
        self._served.add(connection)
        try:
            return await handler(http)
        finally:
            self._busy.discard(connection)

    def sweep(self, open_now: Iterable[Connection]) -> None:
        """Close what is open for nothing."""
        now = self._clock()
        present = dict.fromkeys(open_now)
        self._since = {connection: self._since.get(connection, now) for connection in present}
        self._served &= present.keys()
        idle = [connection for connection in self._since if connection not in self._busy]
        silent = [connection for connection in idle if connection not in self._served]
        late = [connection for connection in silent if now - self._since[connection] >= self._head_seconds]
        over = len(self._since) - self._most
        first = [*silent, *(connection for connection in idle if connection in self._served)]
        for connection in dict.fromkeys([*late, *first[: max(0, over)]]):
            del self._since[connection]
            self._served.discard(connection)
            connection.force_close()
            self.closed += 1

    async def sweep_forever(self, open_now: Callable[[], Iterable[Connection]]) -> None:
        """Sweep until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            self.sweep(open_now())

"""The time that one routed request may take, which ``/abort_request`` can bring to its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class TimeLimit:
    """Of one request, whatever number of attempts it has. Use inside one event loop."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._timeout: asyncio.Timeout | None = None
        self.aborted = False

    def abort(self) -> None:
        """End the request with TimeoutError, now or when it begins; :attr:`aborted` says why."""
        self.aborted = True
        if self._timeout is not None and not self._timeout.expired():
            self._timeout.reschedule(asyncio.get_running_loop().time())

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """All attempts. Raises TimeoutError when they have taken too long, or were ended."""
        try:
            async with asyncio.timeout(0 if self.aborted else self._seconds) as self._timeout:
                yield
        finally:
            self._timeout = None

"""The admission limit: how many requests are in flight, and whether new ones are accepted.

Rules: one event loop; admission never waits, it is refused. Once it has ended it does not begin again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from kvbaton.errors import OverloadedError
from kvbaton.serving.server.failure import DrainingError


class AdmissionLimit:
    """Lets at most ``limit`` requests in at once."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._in_flight = 0
        self._shut = False
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def in_flight(self) -> int:
        return self._in_flight

    @property
    def is_shut(self) -> bool:
        return self._shut

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Be inside for the length of the block. Raises DrainingError or OverloadedError."""
        if self._shut:
            raise DrainingError("this server is stopping and takes no new requests; send them to another one")
        if self._in_flight >= self._limit:
            raise OverloadedError(f"{self._limit} requests are being answered already; try again later")
        self._in_flight += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._in_flight -= 1
            if self._in_flight == 0:
                self._empty.set()

    def shut(self) -> None:
        """Let nobody in any more. Idempotent."""
        self._shut = True

    async def emptied(self, timeout_seconds: float) -> bool:
        """Wait until nobody is inside. False if time ran out first."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True

    def __repr__(self) -> str:
        return f"<AdmissionLimit {self._in_flight} of {self._limit} inside{', shut' if self._shut else ''}>"

"""What fails a server's requests, in its log: a line for the first failure of a kind, one with their number for those
that follow within :data:`SECONDS`.

Rules: only what is not the client's doing is said. A kind is an error's code, so the table is bounded. One event loop.

This file must not know HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from kvbaton.errors import KVBatonError
from kvbaton.serving.server.failure import status_of

#: Failures of one kind within so long are one line.
SECONDS = 10.0
logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Burst:
    timer: asyncio.TimerHandle
    count: int = 0
    last: str = ""


class FailureLog:
    """Of one server; close it before its loop ends."""

    def __init__(self) -> None:
        self._bursts: dict[str, _Burst] = {}

    def note(self, error: KVBatonError, request: str) -> None:
        """``request``: what it is called, for whoever looks for it."""
        if status_of(error) < 500:
            return
        said = f"{error} [request {request}]"
        burst = self._bursts.get(error.code)
        if burst is None:
            logger.warning("1 request failed with %s: %s", error.code, said)
            self._bursts[error.code] = _Burst(self._later(error.code))
        else:
            burst.count, burst.last = burst.count + 1, said

    def _later(self, code: str) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(SECONDS, self._tell, code)

    def _tell(self, code: str) -> None:
        burst = self._bursts.pop(code)
        if burst.count:
            self._say(code, burst)
            self._bursts[code] = _Burst(self._later(code))  # while it goes on, one line each time

    def _say(self, code: str, burst: _Burst) -> None:
        logger.warning("%d more requests failed with %s, the last: %s", burst.count, code, burst.last)

    def close(self) -> None:
        """Say what is left. Idempotent."""
        for code, burst in self._bursts.items():
            burst.timer.cancel()
            if burst.count:
                self._say(code, burst)
        self._bursts.clear()

    def __repr__(self) -> str:
        return f"FailureLog({', '.join(self._bursts)})"

"""What an event loop has nobody to raise to: said in the log, and what comes by the thousand is counted.

A listening socket that finds no file descriptor for a new connection is tried again and again, each time with an error
of its own; the first one of :data:`SECONDS` is a line, the rest is one line with their number.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Mapping
from typing import Any

#: For so long refused connections are one line.
SECONDS = 10.0
#: A process or a machine that has no more files, or no more memory for sockets.
OUT_OF = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_log = logging.getLogger(__name__)


class LoopErrors:
    """An exception handler of one event loop."""

    def __init__(self) -> None:
        self._count = 0
        self._timer: asyncio.TimerHandle | None = None

    def __call__(self, loop: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:
        error = context.get("exception")
        if not (isinstance(error, OSError) and error.errno in OUT_OF and "accept" in str(context.get("message"))):
            loop.default_exception_handler(dict(context))
            return
        self._count += 1
        if self._timer is None:
            _log.warning("a new connection cannot be accepted: %s; raise the limit of open files", error.strerror)
            self._later(loop)

    def _later(self, loop: asyncio.AbstractEventLoop) -> None:
        self._count = 0
        self._timer = loop.call_later(SECONDS, self._tell, loop)

    def _tell(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if self._count:
            _log.warning("%d more attempts to accept a connection failed within %g s", self._count, SECONDS)
            self._later(loop)  # while it goes on, one line each time

    def __repr__(self) -> str:
        return f"<LoopErrors {self._count} since the last line>"

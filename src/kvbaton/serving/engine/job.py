"""A request inside a scheduler: who asked, and whether the last word has been said.

Rules: after a final Output nothing more is emitted, whoever tries; which of several answers' last words is final is
counted here. A callback that raises (its event loop is gone)
makes the job ``deserted``: it is not called again, and the job is to be ended.

This file must not know of queues, models or peers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from time import perf_counter

from kvbaton.errors import AbortedError, KVBatonError, TransferFailedError
from kvbaton.serving.engine.request import Output, Request

logger = logging.getLogger(__name__)


class Job:
    """One request and its caller. Used by the scheduler thread only.

    ``on_end`` is called once, before the caller hears the last word.
    """

    def __init__(
        self, request: Request, on_output: Callable[[Output], None], on_end: Callable[[Request], None]
    ) -> None:
        self.request = request
        self._on_output = on_output
        self._on_end = on_end
        self._unfinished = request.sampling.choices
        self._arrived = perf_counter()
        self._queued_seconds: float | None = None
        self.done = False
        self.deserted = False

    def take_up(self) -> None:
        """It has waited long enough: its memory is there."""
        self._queued_seconds = perf_counter() - self._arrived

    def emit(self, output: Output) -> None:
        """Tell the caller, unless the last word has been said."""
        if self.done:
            return
        if self._queued_seconds is not None:  # said once
            output, self._queued_seconds = replace(output, queued_seconds=self._queued_seconds), None
        if output.finish_reason is not None:
            self._unfinished -= 1
            output = replace(output, unfinished=self._unfinished) if self._unfinished else output
        if output.final:
            self.done = True
            self._on_end(self.request)
        if self.deserted:
            return
        try:
            self._on_output(output)
        except Exception:  # foreign code at the top of our thread: it must not end the other requests
            logger.exception("the caller of request %s cannot be reached any more", self.request.request_id)
            self.deserted = True

    def fail(self, error: KVBatonError) -> None:
        self.emit(Output(error=error))

    def __repr__(self) -> str:
        state = "done" if self.done else "deserted" if self.deserted else "live"
        return f"Job({self.request.request_id} room={self.request.room} {state})"


def for_peer(error: KVBatonError) -> KVBatonError:
    """What the other side is told of an end that is this side's alone."""
    return error if isinstance(error, AbortedError) else TransferFailedError(error.message, room=error.room)

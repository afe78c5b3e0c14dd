"""One request on the prefill side, as SGLang's scheduler drives it: poll, send chunk after chunk, poll, forget.

SGLang frees a request's pages when it polls Success or Failed, so neither is told while a write can touch them. Success
is told with the last settled write: what becomes of the request from there on is decode's business.

Ranks agree on the least of their polls, and SGLang frees what it gives up without a poll: there a write may still read
pages that have another owner. :meth:`Sending.give_up` then makes sure that the room ends as failed on both sides, so
that nobody looks at what that write carries, and decode keeps its pages until it has settled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from kvbaton.engines.port import Fence, Sender
from kvbaton.engines.sglang.memory import Cache
from kvbaton.errors import KVBatonError, LocalProtocolError
from kvbaton.protocol.effects import KVPoll

#: How long SGLang's thread waits, at most, until the driver has heard that a room is given up: one turn of its loop.
HEARD_SECONDS = 1.0
_PAUSE = 0.0002


class Manager(Protocol):
    """What is used of :class:`kvbaton.KVManager`."""

    def sender(self, room: int) -> Sender:
        """Begin to send a room. Raises LocalProtocolError, OverloadedError."""


class Sending:
    """A room that cannot be opened (it is live already, or there are too many) is Failed from the start.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(
        self, manager: Manager, room: int, cache: Cache, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.room = room
        self._cache = cache
        self._clock = clock
        self._sender: Sender | None = None
        self._error: KVBatonError | None = None
        self._told: KVPoll | None = None
        self._last = KVPoll.Bootstrapping
        self._pages: int | None = None
        self._sent_pages = 0
        self._aux: int | None = None
        self._complete = False
        self._began_at: float | None = None
        self._ended_at: float | None = None
        try:
            self._sender = manager.sender(room)
        except KVBatonError as error:
            self.refuse(error)

    @property
    def error(self) -> KVBatonError | None:
        """Why this rank has failed; None where another rank has."""
        return self._error or (self._sender.error if self._sender is not None else None)

    @property
    def prefix(self) -> int:
        """Tokens that decode holds already; known from WaitingForInput on."""
        return self._sender.prefix_len if self._sender is not None else 0

    @property
    def bytes(self) -> int:
        """Bytes that this rank hands over."""
        return self._sender.bytes if self._sender is not None else 0

    @property
    def seconds(self) -> float | None:
        """From the first chunk to the last settled write."""
        if self._began_at is None or self._ended_at is None:
            return None
        return self._ended_at - self._began_at

    def refuse(self, error: KVBatonError) -> None:
        """Fail it with ``error``."""
        self._error = self._error or error
        if self._sender is not None:
            self._sender.fail(error)

    def begin(self, pages: int, aux: int | None) -> None:
        """Decode is there: so many pages will follow, the first holds the token at :attr:`prefix`."""
        self._pages, self._aux = pages, aux

    def send(self, pages: Any, states: Sequence[Any] | None, fence: Fence) -> None:
        """Hand over pages; with ``states``, which may be empty, they are the last ones."""
        sender = self._sender
        if sender is None or self._told is not None or self.error is not None:
            return
        last = states is not None
        start = self.prefix + self._sent_pages * self._cache.page_size
        self._sent_pages += len(pages)
        try:
            if last != (self._sent_pages == self._pages) and (last or len(pages)):
                raise LocalProtocolError(
                    f"SGLang announced {self._pages} pages and sends {self._sent_pages}, last: {last}", room=self.room
                )
            spans = self._cache.spans(pages, start)
            if last:
                spans += self._cache.rest(start + len(pages) * self._cache.page_size, self._aux, states)
            if self._began_at is None:
                self._began_at = self._clock()
            self._complete = last
            sender.submit(spans, last=last, ready=fence)
        except KVBatonError as error:
            self.refuse(error)

    def poll(self) -> KVPoll:
        """What SGLang may believe now."""
        if self._told is None:
            found = self._look()
            if found in (KVPoll.Failed, KVPoll.Success):
                self._told = found
                self._ended_at = self._clock()
            self._last = found
        return self._told if self._told is not None else self._last

    def _look(self) -> KVPoll:
        sender = self._sender
        if sender is None:
            return KVPoll.Failed
        poll, leased = sender.poll(), sender.leased
        if poll is KVPoll.Failed:
            return self._last if leased else KVPoll.Failed
        if self._complete and not leased:
            return KVPoll.Success
        if self._began_at is None:
            return min(poll, KVPoll.WaitingForInput)
        return KVPoll.Transferring

    def give_up(self, reason: str) -> None:
        """SGLang has no use for it any more, and may free its pages when this returns. Waits, at most for
        :data:`HEARD_SECONDS`, until nobody can take the room for a success any more."""
        sender = self._sender
        if sender is None or self._told is KVPoll.Success:
            return
        sender.abort(reason)
        until = self._clock() + HEARD_SECONDS
        while sender.poll() not in (KVPoll.Failed, KVPoll.Success) and self._clock() < until:
            time.sleep(_PAUSE)

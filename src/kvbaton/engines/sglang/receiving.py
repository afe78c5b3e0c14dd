"""One request on the decode side, as SGLang's scheduler drives it: resolve, poll, publish, poll, free.

SGLang tells its client of a failure at once and keeps the pages until it is told that no write can touch them:
:attr:`Receiving.drained`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from kvbaton.engines.sglang.memory import Cache
from kvbaton.errors import AbortedError, KVBatonError, LocalProtocolError
from kvbaton.protocol.effects import KVPoll
from kvbaton.protocol.messages import Grant


class Receiver(Protocol):
    """What is used of :class:`kvbaton.KVReceiver`."""

    def poll(self) -> KVPoll: ...

    @property
    def error(self) -> KVBatonError | None: ...

    @property
    def agreed(self) -> bool: ...

    @property
    def released(self) -> bool: ...

    def publish(self, spans: Sequence[Grant], *, token_count: int) -> None: ...

    def fail(self, error: KVBatonError) -> None: ...


class Manager(Protocol):
    """What is used of :class:`kvbaton.KVManager`."""

    def receiver(self, room: int, sources: Sequence[str]) -> Receiver:
        """Begin to receive a room. Raises LocalProtocolError, OverloadedError, ConfigError."""


class Receiving:
    """``manager``: this rank's; ``cache``: its memory."""

    def __init__(self, manager: Manager, room: int, cache: Cache) -> None:
        self.room = room
        self._manager = manager
        self._cache = cache
        self._receiver: Receiver | None = None
        self._error: KVBatonError | None = None
        self._given_up = False

    @property
    def error(self) -> KVBatonError | None:
        """Why this rank has failed; None where another rank has."""
        return self._error or (self._receiver.error if self._receiver is not None else None)

    @property
    def drained(self) -> bool:
        """The room has ended, and no write can touch its pages."""
        return self._receiver is None or self._receiver.released

    def begin(self, sources: Sequence[str]) -> None:
        """The prefill ranks are known: ask whether they are there and compatible."""
        if self._receiver is not None or self._given_up:
            return
        try:
            self._receiver = self._manager.receiver(self.room, sources)
        except KVBatonError as error:
            self.refuse(error)

    def publish(self, pages: Any, aux: int | None, states: Sequence[Any] | None, prefix: int) -> None:
        """Grant pages that hold the tokens from ``prefix`` on. SGLang does not say how many tokens there are: both
        sides count whole pages."""
        receiver = self._receiver
        if receiver is None:
            self.refuse(LocalProtocolError("SGLang publishes pages before it knows its prefill", room=self.room))
            return
        stop = prefix + len(pages) * self._cache.page_size
        try:
            spans = [*self._cache.spans(pages, prefix), *self._cache.rest(stop, aux, states)]
            receiver.publish(spans, token_count=stop)
        except KVBatonError as error:
            self.refuse(error)

    def poll(self) -> KVPoll:
        """What SGLang may believe now: a failure at once, success when everything may be read and reused."""
        receiver = self._receiver
        if self._error is not None or self._given_up:
            return KVPoll.Failed
        if receiver is None:
            return KVPoll.Bootstrapping
        poll = receiver.poll()
        if poll is KVPoll.Success:
            return KVPoll.Success if receiver.released else KVPoll.Transferring
        if poll is KVPoll.Bootstrapping and receiver.agreed:
            return KVPoll.WaitingForInput
        return poll

    def refuse(self, error: KVBatonError) -> None:
        """Fail it with ``error`` on both sides."""
        self._error = self._error or error
        if self._receiver is not None:
            self._receiver.fail(error)

    def give_up(self, reason: str) -> None:
        """End the room on both sides; Failed from now on. Does nothing once it has ended."""
        if self._receiver is not None:
            if self._receiver.poll() in (KVPoll.Failed, KVPoll.Success):
                return
            self._receiver.fail(AbortedError(reason, room=self.room))
        self._given_up = True
        self._error = self._error or AbortedError(reason, room=self.room)

"""A stand-in for the facade: both ends of every room in one object, pages copied by plain assignment.

It keeps the facade's promises (states, leases, ``prefix_len``) and lets a test hold the wire still, break it, or
change what arrives. Two schedulers' threads use it, so everything is under one lock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvbaton.errors import AbortedError, KVBatonError, LocalProtocolError
from kvbaton.manager import KVPoll, Span
from kvbaton.serving.engine.pool import Pools


@dataclass
class End:
    """A KVSender or a KVReceiver. ``spans`` are those submitted, or published; ``ahead`` the layers that were submitted
    by themselves, and what they were then."""

    wire: Wire
    room: int
    state: KVPoll = KVPoll.Bootstrapping
    error: KVBatonError | None = None
    leased: bool = False
    prefix_len: int = 0
    spans: list[tuple[tuple[Span, ...], bool]] = field(default_factory=list)
    ahead: dict[tuple[Span, int], dict[str, Any]] = field(default_factory=dict)
    bytes: int = 4096
    handoff_seconds: float = 0.25
    exposed_seconds: float = 0.125

    def poll(self) -> KVPoll:
        return self.state

    @property
    def released(self) -> bool:
        return self.state in (KVPoll.Failed, KVPoll.Success) and not self.leased

    def publish(self, spans: Sequence[Span], *, token_count: int) -> None:
        assert spans[0].token_stop == token_count
        with self.wire.lock:
            self.spans.append((tuple(spans), True))
            self.wire.published.set()
            if self.state != KVPoll.Failed:
                self.leased = True
                self.state = KVPoll.WaitingForInput
                self.wire.settle()

    def submit(
        self, spans: Sequence[Span], *, last: bool, ready: Callable[[], bool], layers: tuple[int, int] | None = None
    ) -> None:
        assert ready()
        if layers is not None:
            assert not last
            for span in spans:
                self.ahead[span, layers[0]] = self.wire.look(span, layers[0])
            return
        with self.wire.lock:
            if self.state == KVPoll.Failed:
                raise LocalProtocolError("the transfer has failed", room=self.room)
            self.spans.append((tuple(spans), last))
            self.leased = True
            self.state = KVPoll.Transferring
            self.wire.settle()
            if last:
                self.wire.sent.set()

    def fail(self, error: KVBatonError) -> None:
        self.wire.fail(self.room, error)

    def abort(self, reason: str) -> None:
        self.fail(AbortedError(reason, room=self.room))


class Manager:
    """One side's KVManager."""

    def __init__(self, wire: Wire, ends: dict[int, End]) -> None:
        self.wakeup = threading.Event()
        self._wire = wire
        self._ends = ends

    def sender(self, room: int) -> End:
        with self._wire.lock:
            live = self._ends.get(room)
            if live is not None and live.state not in (KVPoll.Failed, KVPoll.Success):
                raise LocalProtocolError("the room is live already", room=room)
            self._ends[room] = End(self._wire, room, prefix_len=self._wire.prefix_len)
            self._wire.settle()
            self._wire.opened.set()
            return self._ends[room]

    def receiver(self, room: int, sources: Sequence[str]) -> End:
        assert sources == ("memory://prefill",)
        return self.sender(room)


class Wire:
    """What lies between the two sides' pools. While ``held`` nothing moves and leases last.

    ``opened``, ``published`` and ``sent`` (its last chunk) are set when that has happened to any room.
    """

    def __init__(self, source: Pools, target: Pools, *, prefix_len: int = 0) -> None:
        self.lock = threading.RLock()
        self.held = False
        self.opened, self.published, self.sent = threading.Event(), threading.Event(), threading.Event()
        self.prefix_len = prefix_len
        self.senders: dict[int, End] = {}
        self.receivers: dict[int, End] = {}
        self.prefill = Manager(self, self.senders)
        self.decode = Manager(self, self.receivers)
        self.spoil: Callable[[bytearray], None] = lambda _row: None
        self._pools = (source, target)

    def hold(self) -> None:
        with self.lock:
            self.held = True

    def release(self) -> None:
        with self.lock:
            self.held = False
            self.settle()

    def fail(self, room: int, error: KVBatonError) -> None:
        with self.lock:
            for ends in (self.senders, self.receivers):
                end = ends.get(room)
                if end is not None and end.state != KVPoll.Success:
                    end.state, end.error = KVPoll.Failed, end.error or error
            self.settle()

    def settle(self) -> None:
        """Let everything that can happen happen, and tell both sides."""
        for room, sender in self.senders.items():
            receiver = self.receivers.get(room)
            if receiver is not None:
                self._join(sender, receiver)
        for end in (*self.senders.values(), *self.receivers.values()):
            if end.state == KVPoll.Failed and not self.held:
                end.leased = False
        self.prefill.wakeup.set()
        self.decode.wakeup.set()

    def _join(self, sender: End, receiver: End) -> None:
        if receiver.spans and sender.state == KVPoll.Bootstrapping:
            sender.state = KVPoll.WaitingForInput
        if sender.state != KVPoll.Transferring or self.held:
            return
        if sender.spans and sender.spans[-1][1]:
            for spans, _ in sender.spans:
                for span in spans:
                    self._copy(span, next(s for s in receiver.spans[0][0] if s.pool == span.pool), sender.ahead)
            for end in (sender, receiver):
                end.state, end.leased = KVPoll.Success, False

    def look(self, span: Span, layer: int) -> dict[str, Any]:
        """A copy of what a layer has in the pages of a span."""
        tensors = self._pools[0].paged[span.pool].tensors
        return {name: tensor[list(span.units)] for (of, name), tensor in tensors.items() if of == layer}

    def _copy(self, ours: Span, theirs: Span, ahead: dict[tuple[Span, int], dict[str, Any]]) -> None:
        """What went ahead arrives as it was then."""
        source, target = self._pools
        if ours.pool == "aux":
            row = bytearray(source.row(ours.units[0]))
            self.spoil(row)
            target.row(theirs.units[0])[:] = row
            return
        for position in range(ours.token_start, ours.token_stop):
            size = source.page_size
            number = position // size - ours.token_start // size
            token = []
            for (layer, name), tensor in source.paged[ours.pool].tensors.items():
                early = ahead.get((ours, layer), {}).get(name)
                page = early[number] if early is not None else tensor[ours.units[number]]
                token.append(page[:, position % size])
            page = theirs.units[position // target.page_size]
            for tensor, value in zip(target.paged[ours.pool].tensors.values(), token, strict=True):
                tensor[page, :, position % target.page_size] = value

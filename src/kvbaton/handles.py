"""What an engine holds of one room: KVSender on the prefill side, KVReceiver on the decode side.

Reads are plain reads of the last status that the driver's thread published; commands only enqueue. What can be judged
at once is judged at once: a wrong unit, units that were handed over already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvbaton.errors import AbortedError, KVBatonError, LocalProtocolError
from kvbaton.layout import CacheLayout
from kvbaton.pieces import LayerRules, Pieces
from kvbaton.plan.coverage import Layers
from kvbaton.protocol.effects import KVPoll, RoomStatus
from kvbaton.protocol.events import AbortRequested, Chunk, ChunkSubmitted, ChunksWithdrawn, Event, GrantsPublished
from kvbaton.protocol.grants import check_grants, own_units
from kvbaton.protocol.messages import Grant, Role
from kvbaton.runtime.commands import Fence

#: Units of one pool that hold a token range: ``Span(pool, token_start, token_stop, units)``. ``units`` are the page ids
#: of absolute pages ``token_start // page_size`` up to the page of ``token_stop - 1``: any order in memory, position in
#: the list is position in the prompt. Slot pools (aux, state): ``Span(pool, 0, 0, (slot,))``. A one-dimensional integer
#: array is taken as it is (copied, and checked without a walk in Python).
Span = Grant

#: Hands an event to the driver, a chunk with its fence. Raises LocalProtocolError where the manager is closed.
Post = Callable[[Event, Fence | None], None]


def ALWAYS_READY() -> bool:  # noqa: N802 - used like a constant
    """The fence of data that is already in memory."""
    return True


@dataclass(frozen=True, slots=True)
class TraceEvent:
    """One line of a room's story, as old as ``seconds_ago`` when it was asked for: durations can be compared between
    machines, instants can not."""

    seconds_ago: float
    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    """A room that ended and whose units are free: told exactly once to engines that ask for it.

    ``tag`` is what the engine gave with the room, the rest what its handle says: bytes, seconds.
    """

    room: int
    role: Role
    error: KVBatonError | None
    tag: Any = None
    bytes: int = 0
    handoff_seconds: float = 0.0
    exposed_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Freed:
    """A room whose units are free: told exactly once, with :class:`Finished` or, for a sender, as soon as the last
    write has settled, while the room goes on until decode has confirmed."""

    room: int
    role: Role
    tag: Any = None


class RoomHandle:
    """What sender and receiver share: the last status that the driver published. ``tag`` is the engine's own."""

    role: Role

    def __init__(self, room: int, layout: CacheLayout, post: Post, clock: Callable[[], float], tag: Any) -> None:
        self.room = room
        self.tag = tag
        self._layout = layout
        self._post = post
        self._clock = clock
        self._status = RoomStatus()
        self._started_at = clock()
        self._ended_at: float | None = None
        self._told_freed = False
        self._handed_over = 0  # calls that handed units over: the status that the driver published may be older

    def poll(self) -> KVPoll:
        """State of the room. Failed and Success never change any more."""
        return self._status.poll

    @property
    def error(self) -> KVBatonError | None:
        """The first root cause, once ``poll()`` is Failed."""
        return self._status.error

    @property
    def leased(self) -> bool:
        """A write may still touch units that were handed over, or will: they must not be freed or changed. Of a sender
        it is false as soon as every chunk so far has settled with every target, before the room ends."""
        return self._status.leased or (self._handed_over > 0 and not self._ended)

    @property
    def _ended(self) -> bool:
        return self._status.poll in (KVPoll.Failed, KVPoll.Success)

    @property
    def bytes(self) -> int:
        """Bytes that this room moves on this rank."""
        return self._status.bytes

    @property
    def handoff_seconds(self) -> float:
        """From ``publish`` (receiver) or creation (sender) to the outcome, or to now."""
        return (self._ended_at if self._ended_at is not None else self._clock()) - self._started_at

    @property
    def released(self) -> bool:
        """Failed or Success, and no unit is leased: everything may be freed."""
        return self._ended and not self._status.leased

    @property
    def freed(self) -> bool:
        """Nothing more will be handed over, and nothing is leased: every unit may be freed, whatever becomes of the
        room."""
        return self.released

    @property
    def exposed_seconds(self) -> float:
        """What the hand-off adds to the prefill: from the last chunk's submission to its last byte having settled."""
        return self._status.exposed_seconds

    def on_status(self, status: RoomStatus) -> bool:
        """Driver thread: publish a status. Whether the room has ended by it."""
        self._status = status
        if self._ended_at is not None or not self._ended:
            return False
        self._ended_at = self._clock()
        return True

    def note_freed(self) -> bool:
        """Driver thread: whether the units are free, the first time that they are."""
        first = self.freed and not self._told_freed
        self._told_freed = self._told_freed or first
        return first

    def finished(self) -> Finished:
        """What an engine that collects is told of the end."""
        return Finished(
            self.room, self.role, self.error, self.tag, self.bytes, self.handoff_seconds, self.exposed_seconds
        )

    def fail(self, error: KVBatonError) -> None:
        """End the room on both sides, with ``error`` as the cause. Does nothing once it has ended."""
        self._post(AbortRequested(self.room, self.role, error), None)

    def abort(self, reason: str) -> None:
        """Give the room up on both sides. Does nothing once it has ended."""
        self.fail(AbortedError(reason, room=self.room))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} room {self.room}: {self.poll().name}{', leased' if self.leased else ''}>"


class KVSender(RoomHandle):
    """The prefill side of one room. Made by :meth:`KVManager.sender`."""

    role: Role = "source"

    def __init__(
        self, room: int, layout: CacheLayout, post: Post, clock: Callable[[], float], tag: Any, rules: LayerRules
    ) -> None:
        super().__init__(room, layout, post, clock, tag)
        self._complete = False
        self._withdrawn = False
        self._pieces = Pieces(rules)
        self._given: tuple[Sequence[Span], tuple[Span, ...]] = ((), ())

    @property
    def leased(self) -> bool:
        """As of every room; what the driver has not seen yet counts as well."""
        unseen = self._handed_over > self._status.seen or bool(self._pieces)
        return self._status.leased or (unseen and not self._ended)

    @property
    def settled(self) -> bool:
        """Every chunk so far is in the memory of every target: nothing reads its units any more, whatever follows."""
        return not self.leased

    @property
    def freed(self) -> bool:
        return self.released or (self._complete and not self.leased)

    @property
    def prefix_len(self) -> int:
        """Tokens that every target holds already, known from WaitingForInput on; no need to submit them."""
        return self._status.prefix_len

    def submit(self, spans: Sequence[Span], *, last: bool, ready: Fence, layers: Layers | None = None) -> None:
        """Hand over a chunk, or some layers of one while the others are computed. In each layer chunks come in token
        order and, but for the last, end on a page boundary; aux and state slots go with the last one.

        Layers may come in any order, as early as each is computed, and the rest of the chunk, or all of it again,
        afterwards: what was handed over is not moved twice. They travel ahead where that is worth it. A state may be
        among the spans of layers of the last tokens: its layers go with them.

        Args:
            spans: the units that hold the chunk, one span per pool. The same tuple again, of tuples of units, is not
                checked again.
            layers: absolute ids of the layers that are there, half open; default: all.
            last: nothing follows; its token range ends with the prompt.
            ready: returns true once the data is in memory (a CUDA event's query, or :data:`ALWAYS_READY`). Nothing is
                read before that. Called from the driver thread; must not block.

        Raises:
            LayoutError: a span names units that do not exist or do not fit its token range; none of the layers is this
                rank's.
            LocalProtocolError: the last chunk was submitted already, chunks were withdrawn that have not settled yet,
                or the manager is closed.
        """
        if self._complete:
            raise LocalProtocolError(f"the last chunk of room {self.room} was submitted already", room=self.room)
        if self._withdrawn and self.leased:
            raise LocalProtocolError(
                f"room {self.room} still reads what was withdrawn; submit again once it has settled", room=self.room
            )
        self._withdrawn = False
        chunk = Chunk(spans=self._checked(spans), last=last, layers=layers)
        for whole, fence in self._pieces.add(chunk, ready, self._clock(), self._status.token_seconds):
            self._handed_over, self._complete = self._handed_over + 1, whole.last
            self._post(ChunkSubmitted(self.room, whole), fence)

    def _checked(self, spans: Sequence[Span]) -> tuple[Span, ...]:
        given, own = self._given
        if spans is not given or not isinstance(spans, tuple):
            own = own_units(spans)
            check_grants(own, self._layout, distinct=False)
            if all(mine is yours for mine, yours in zip(own, spans, strict=True)):
                self._given = (spans, own)
        return own

    def withdraw(self) -> bool:
        """Ask for the units of all chunks back, for a request that is preempted: what has not been posted is not sent,
        and nothing more is read once :attr:`settled`. The room goes on: then submit the prompt again, from its first
        token or a later one up to which everything had settled; what has arrived is not sent twice.

        Returns whether anything is to be submitted again; false where all of the prompt has settled, or the room ended.
        """
        self._pieces.clear()
        if self.freed or self._ended or not self._handed_over:
            return not self._ended and not self.freed
        self._handed_over, self._complete, self._withdrawn = self._handed_over + 1, False, True
        self._post(ChunksWithdrawn(self.room, self._handed_over), None)
        return True


class KVReceiver(RoomHandle):
    """The decode side of one room. Made by :meth:`KVManager.receiver`."""

    role: Role = "target"

    @property
    def agreed(self) -> bool:
        """Every source rank is there and compatible, so that pages will not be published in vain. A source that is not
        fails the room before."""
        return self._status.agreed

    @property
    def token_count(self) -> int:
        """Tokens of the prompt, as published or as prefill has said with the end; 0 while only prefill knows."""
        return self._status.token_count

    def publish(self, spans: Sequence[Span], *, token_count: int | None) -> None:
        """Grant units to the sources. A paged span starts at the prefix that we hold already.

        Args:
            spans: one span per pool; the units are leased from now on.
            token_count: tokens of the whole prompt; both sides must agree. None: not known here, as many as prefill
                has computed and at most as many as the spans hold; :attr:`token_count` tells them afterwards. Slots
                then come with prefill's last chunk.

        Raises:
            LayoutError: a span names units that do not exist, twice, or that do not fit its token range.
            LocalProtocolError: units were published already, or the manager is closed.
        """
        if self._handed_over:
            raise LocalProtocolError(f"units were published for room {self.room} already", room=self.room)
        grants = own_units(spans)
        check_grants(grants, self._layout)
        self._handed_over = 1
        self._started_at = self._clock()
        if token_count is None:
            most = max((grant.token_stop for grant in grants), default=0)
            self._post(GrantsPublished(self.room, grants, most, at_most=True), None)
        else:
            self._post(GrantsPublished(self.room, grants, token_count), None)

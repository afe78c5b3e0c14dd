"""One attempt of one source rank and one target rank to fill one room: a state machine for both ends.

The two ends run the same table from different states. "A write may still touch memory" is a state, not a counter:

    target:  OPENING → OPENED → CLOSED                       source:  WAITING → SENDING → DELIVERED → CLOSED
                 ╲        ╲→ DRAINING → QUIESCING → CLOSED                ╲        ╲→ SETTLING → FAILING → CLOSED

- OPENING    target: Open sent, not yet acknowledged
- OPENED     target: the source knows the room; it may write from now on
- DRAINING   target: failed for the engine, but the source may still write; units stay leased
- QUIESCING  target: the source's writes have ended by force (fence, death); what they left in our own transport's
  buffers is flushed before units are free
- WAITING    source: the target's units are known, nothing posted yet
- SENDING    source: writes posted or to be posted
- DELIVERED  source: every write has settled and Done was sent; repeated until closed
- SETTLING   source: failed for the engine, but our own writes have not settled; units stay leased
- FAILING    source: failed and drained; repeated until closed
- CLOSED     both: nothing is owed; late messages are answered from here

What is owed to the other side is repeated until acknowledged, so messages may be lost, doubled and reordered. DRAINING
has no way out by time (unless a policy says so): only the source's word, or proof that its process is gone.

A transfer knows nothing of links, other transfers or engines; it speaks through its :class:`Context`.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from msgspec import Struct, structs

from kvbaton.errors import InternalError, KVBatonError
from kvbaton.plan.coverage import Coverage, Piece
from kvbaton.plan.pair import PairPlan, PartId
from kvbaton.plan.staging import StagedPart
from kvbaton.protocol.context import Context
from kvbaton.protocol.events import WriteId
from kvbaton.protocol.messages import Grant, PartBytes, Role, TransferKey


class State(enum.Enum):
    OPENING = "opening"
    OPENED = "opened"
    DRAINING = "draining"
    QUIESCING = "quiescing"
    WAITING = "waiting"
    SENDING = "sending"
    DELIVERED = "delivered"
    SETTLING = "settling"
    FAILING = "failing"
    CLOSED = "closed"

    __hash__ = object.__hash__  # that of Enum is written in Python; these are keys of every step


class On(enum.Enum):
    """What can happen to a transfer."""

    OPEN_ARRIVED = "Open"
    OPENED_ARRIVED = "Opened"
    DONE_ARRIVED = "Done"
    CLOSE_ARRIVED = "Close"
    FAILED_ARRIVED = "Failed"
    ABORT_ARRIVED = "Abort"
    DRAINED_ARRIVED = "Drained"
    QUERY_ARRIVED = "Query"
    FORGOTTEN_ARRIVED = "Forgotten"
    CHUNK_SUBMITTED = "chunk submitted"
    CHUNKS_WITHDRAWN = "chunks withdrawn"
    WRITE_UNDER_WAY = "write under way"
    WRITE_SETTLED = "write settled"
    WRITE_BROKEN = "write broken"
    GIVEN_UP = "given up"
    DEADLINE_REACHED = "deadline"
    RETRY_DUE = "retry"
    PEER_LOST = "peer lost"
    PEER_GONE = "peer gone"
    PEER_FENCED = "peer fenced"
    PEER_QUIESCED = "peer quiesced"

    __hash__ = object.__hash__

    @property
    def is_message(self) -> bool:
        return self.name.endswith("_ARRIVED")


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease:
    """Slots of the target's staging memory for one part; block ``first`` begins the first of them. What they do not
    hold of the part is written directly: tokens from ``token_stop`` on."""

    staged: StagedPart
    slots: tuple[int, ...]
    first: int

    @property
    def token_stop(self) -> int:
        return self._stop * self.staged.part.block_rows

    @property
    def _stop(self) -> int:
        return self.first + len(self.slots) * self.staged.blocks_per_slot

    def runs(self, blocks: range) -> Iterator[tuple[int, int, range]]:
        """(slot, first block within it, blocks) for each slot that some of ``blocks`` lie in."""
        held = range(blocks.start, min(blocks.stop, self._stop))
        for number, within, run in self.staged.runs(held, self.first):
            yield self.slots[number], within, run


#: What of a part travels one way: its number in the pair, and whether it goes through staging.
Share = tuple[int, bool]


class Place(Struct, frozen=True):
    """What a write is of: a piece of a share of a part."""

    share: Share
    piece: Piece


@dataclass(kw_only=True, slots=True)
class Outgoing:
    """The source's end: what to write, how far it is, which writes are out and of what."""

    pair: PairPlan
    grants: dict[str, Grant]
    parts: tuple[PartBytes, ...]
    token_count: int
    at_most: bool = False
    leases: dict[PartId, Lease] = field(default_factory=dict)
    coverage: dict[Share, Coverage] = field(default_factory=dict)
    outstanding: dict[WriteId, Place] = field(default_factory=dict)
    last_submitted: bool = False
    last_submitted_at: float = 0.0
    exposed_seconds: float = 0.0
    abort_arrived: bool = False
    fenced: bool = False
    moving: bool = False
    ended_bytes: int = 0

    @property
    def bytes(self) -> int:
        """What is posted so far."""
        return self.ended_bytes + sum(coverage.bytes for coverage in self.coverage.values())

    @property
    def posted(self) -> tuple[PartBytes, ...]:
        """What is posted so far of each part that anything was handed in for."""
        posted: Counter[int] = Counter()
        for (index, _), coverage in self.coverage.items():
            posted[index] += coverage.bytes
        return tuple(PartBytes(self.pair.parts[index].id, size) for index, size in posted.items())

    def drop_units(self) -> None:
        """Nothing will be written any more: a tombstone needs no page lists, and not what was written of them."""
        self.ended_bytes, self.coverage = self.bytes, {}
        self.grants = {pool: structs.replace(grant, units=()) for pool, grant in self.grants.items()}


@dataclass(kw_only=True, slots=True)
class Prompt:
    """What a target knows of a prompt, one for all sources of a room: its tokens, or the most that there may be."""

    token_count: int = 0
    at_most: bool = False


@dataclass(kw_only=True, slots=True)
class Incoming:
    """The target's end: what was granted and what must arrive; of a prompt whose length the source says, at most."""

    grants: tuple[Grant, ...] = ()
    parts: tuple[PartBytes, ...] = ()
    prompt: Prompt = field(default_factory=Prompt)
    pair: PairPlan | None = None
    begun: bool = False
    leases: dict[PartId, Lease] = field(default_factory=dict)
    exposed_seconds: float = 0.0
    moving: bool = False
    at_most: bool = field(init=False)
    bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.at_most = self.prompt.at_most
        self.bytes = sum(part.bytes for part in self.parts)

    def has_slot(self, slot: int) -> bool:
        """Whether a slot of our staging memory is leased to this transfer."""
        return any(slot in lease.slots for lease in self.leases.values())


class Transfer:
    """See the module. ``error`` is the first root cause once the transfer has failed."""

    __slots__ = ("context", "error", "incoming", "key", "outgoing", "peer", "quarantined", "retry_pause", "state")

    def __init__(
        self,
        key: TransferKey,
        peer: str,
        context: Context,
        *,
        outgoing: Outgoing | None = None,
        incoming: Incoming | None = None,
    ) -> None:
        self.key = key
        self.peer = peer
        self.context = context
        self.outgoing = outgoing
        self.incoming = incoming
        self.error: KVBatonError | None = None
        self.quarantined = False
        self.state = State.WAITING if outgoing is not None else State.OPENING
        self.retry_pause = context.settings.retry_seconds

    def __repr__(self) -> str:
        return f"<Transfer {self.key} with {self.peer}: {self.state.value}>"

    @property
    def role(self) -> Role:
        """What this rank is in the transfer."""
        return "source" if self.outgoing is not None else "target"

    @property
    def leased(self) -> bool:
        """Whether a write of this transfer may still touch units on our side."""
        if self.outgoing is not None:
            return bool(self.outgoing.outstanding)
        has_parts = self.incoming is not None and bool(self.incoming.parts)
        return has_parts and self.state is not State.CLOSED

    @property
    def succeeded(self) -> bool:
        return self.state is State.CLOSED and self.error is None

    def enter(self, state: State) -> None:
        self.context.cancel_timers(self)
        self.state = state
        cause = f": {self.error}" if self.error is not None else ""
        self.context.record(self.key.room, f"{self.key} with {self.peer} {state.value}{cause}")

    def set_deadline(self, now: float, seconds: float) -> None:
        self.context.set_timer(self, "deadline", now + seconds)

    def retry_later(self, now: float) -> None:
        self.context.repeat_later(self, now, self.retry_pause)
        self.retry_pause = min(2 * self.retry_pause, self.context.settings.retry_most_seconds)

    def as_target(self) -> Incoming:
        if self.incoming is None:
            raise InternalError(f"{self} is no target")
        return self.incoming

    def as_source(self) -> Outgoing:
        if self.outgoing is None:
            raise InternalError(f"{self} is no source")
        return self.outgoing


T = TypeVar("T")


def expect(detail: object, kind: type[T]) -> T:
    if not isinstance(detail, kind):
        raise InternalError(f"expected {kind.__name__}, got {type(detail).__name__}")
    return detail


def describe(parts: Sequence[PartBytes]) -> str:
    return ", ".join(f"{part.part} ({part.bytes} B)" for part in sorted(parts, key=lambda p: p.part)) or "nothing"

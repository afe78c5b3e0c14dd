"""A room as an engine sees it: all transfers of one request on this rank, summed up in one status.

A room fails as a whole with the first root cause, and concludes once; transfers that still settle or drain keep it
leased. These are plain records and pure functions of them; the core moves them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from kvbaton.errors import KVBatonError
from kvbaton.protocol.effects import KVPoll, RoomStatus
from kvbaton.protocol.events import Chunk
from kvbaton.protocol.messages import Grant
from kvbaton.protocol.transfer import State, Transfer


@dataclass(kw_only=True, eq=False)
class SourceRoom:
    """The prefill side. ``expected`` is the number of target ranks that open the room, known from the first Open.

    A room may exist before our engine knows it (``has_sender`` false): a target opened it early.
    """

    room: int
    has_sender: bool = False
    group: str = ""
    expected: int | None = None
    transfers: dict[str, Transfer] = field(default_factory=dict)
    chunks: list[Chunk] = field(default_factory=list)
    error: KVBatonError | None = None
    reported: RoomStatus = field(default_factory=RoomStatus)

    @property
    def opened(self) -> bool:
        """Every target that this rank serves has opened."""
        return self.expected is not None and len(self.transfers) >= self.expected

    @property
    def over(self) -> bool:
        """Nothing is left to do or to say: the record can go."""
        closed = all(transfer.state is State.CLOSED for transfer in self.transfers.values())
        return closed and (self.released or not self.has_sender)

    @property
    def released(self) -> bool:
        return self.status().poll in (KVPoll.Failed, KVPoll.Success)

    def status(self) -> RoomStatus:
        transfers = self.transfers.values()
        if self.error is not None:
            poll = KVPoll.Failed
        elif not self.opened:
            poll = KVPoll.Bootstrapping
        elif not self.chunks:
            poll = KVPoll.WaitingForInput
        elif all(transfer.succeeded for transfer in transfers):
            poll = KVPoll.Success
        else:
            poll = KVPoll.Transferring
        unfinished = poll not in (KVPoll.Failed, KVPoll.Success) and bool(self.chunks) and not self._settled()
        return RoomStatus(
            poll=poll,
            error=self.error,
            leased=unfinished or any(transfer.leased for transfer in transfers),
            prefix_len=self._prefix_len(),
            bytes=sum(sum(t.outgoing.sent.values()) for t in transfers if t.outgoing is not None),
            exposed_seconds=max((t.outgoing.exposed_seconds for t in transfers if t.outgoing is not None), default=0.0),
            chunks=len(self.chunks),
        )

    def _settled(self) -> bool:
        """Every target has opened, and each write of all chunks has settled: our units are free before the targets
        confirm."""
        return self.opened and all(
            transfer.state in (State.DELIVERED, State.CLOSED) for transfer in self.transfers.values()
        )

    def _prefix_len(self) -> int:
        starts = [
            grant.token_start
            for transfer in self.transfers.values()
            if transfer.outgoing is not None
            for grant in transfer.outgoing.grants.values()
            if grant.token_stop
        ]
        return min(starts, default=0)


@dataclass(kw_only=True, eq=False)
class TargetRoom:
    """The decode side: the addresses it expects to be filled from, what it granted, and its transfers once open.

    ``agreed``: every source has a session that is ready, and together they write all of our memory once. ``untold``:
    addresses of the sources that are yet to hear that the room was given up before it was open.
    """

    room: int
    sources: tuple[str, ...]
    begun: bool = False
    agreed: bool = False
    untold: set[str] = field(default_factory=set)
    grants: tuple[Grant, ...] | None = None
    token_count: int = 0
    transfers: dict[str, Transfer] = field(default_factory=dict)
    error: KVBatonError | None = None
    reported: RoomStatus = field(default_factory=RoomStatus)

    @property
    def over(self) -> bool:
        """Nothing is left to do or to say: the record can go."""
        closed = all(transfer.state is State.CLOSED for transfer in self.transfers.values())
        return closed and not self.untold and self.status().poll in (KVPoll.Failed, KVPoll.Success)

    def status(self) -> RoomStatus:
        transfers = self.transfers.values()
        writers = [t for t in transfers if t.incoming is not None and t.incoming.parts]
        if self.error is not None:
            poll = KVPoll.Failed
        elif not transfers or any(transfer.state is State.OPENING for transfer in transfers):
            poll = KVPoll.Bootstrapping
        elif all(transfer.succeeded for transfer in writers):
            poll = KVPoll.Success
        elif any(transfer.succeeded for transfer in writers):
            poll = KVPoll.Transferring
        else:
            poll = KVPoll.WaitingForInput
        return RoomStatus(
            poll=poll,
            error=self.error,
            leased=any(transfer.leased for transfer in transfers),
            bytes=sum(part.bytes for t in writers if t.incoming is not None for part in t.incoming.parts),
            agreed=self.agreed,
            exposed_seconds=max((t.incoming.exposed_seconds for t in writers if t.incoming is not None), default=0.0),
        )


Room = SourceRoom | TargetRoom


class RoomKeeper(Protocol):
    """Whoever knows all rooms of a rank, as the parts that look after one half of them see it."""

    def touch(self, room: Room) -> None:
        """Something happened to a room: conclusions are drawn once the event is done."""

    def fail(self, room: Room, error: KVBatonError) -> None:
        """End a room for its engine; the first root cause wins."""

    def begin(self, room: Room, transfer: Transfer) -> None:
        """Begin one of a room's transfers."""

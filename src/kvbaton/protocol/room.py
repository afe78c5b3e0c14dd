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
from kvbaton.protocol.transfer import Prompt, State, Transfer


@dataclass(kw_only=True, eq=False)
class SourceRoom:
    """The prefill side. ``expected`` is the number of target ranks that open the room, known from the first Open.

    A room may exist before our engine knows it (``has_sender`` false): a target opened it early. ``chunks`` are kept
    for targets that are still to open it; ``seen`` counts what the engine has said: chunks, and that it withdraws them.
    ``token_seconds``: predicted, to write one token of all layers to all targets that have opened.
    """

    room: int
    has_sender: bool = False
    group: str = ""
    expected: int | None = None
    transfers: dict[str, Transfer] = field(default_factory=dict)
    chunks: list[Chunk] = field(default_factory=list)
    seen: int = 0
    token_seconds: float = 0.0
    error: KVBatonError | None = None
    reported: RoomStatus = field(default_factory=RoomStatus)

    @property
    def opened(self) -> bool:
        """Every target that this rank serves has opened."""
        return self.expected is not None and len(self.transfers) >= self.expected

    def over(self, status: RoomStatus) -> bool:
        """Nothing is left to do or to say: the record can go."""
        return (status.ended or not self.has_sender) and _all_closed(self.transfers)

    @property
    def released(self) -> bool:
        return self.status().ended

    def status(self) -> RoomStatus:
        """Our units are free (``leased`` is false) once every target has opened and each write of the chunks so far has
        settled, before the targets confirm."""
        opened, succeeded, leased = self.opened, True, False
        starts, size, exposed = [], 0, 0.0
        for transfer in self.transfers.values():
            outgoing = transfer.as_source()
            succeeded = succeeded and transfer.succeeded
            leased = leased or transfer.leased
            size += outgoing.bytes
            exposed = max(exposed, outgoing.exposed_seconds)
            starts += [grant.token_start for grant in outgoing.grants.values() if grant.token_stop]
        if self.error is not None:
            poll = KVPoll.Failed
        elif not opened:
            poll = KVPoll.Bootstrapping
        elif not self.seen:
            poll = KVPoll.WaitingForInput
        else:
            poll = KVPoll.Success if succeeded else KVPoll.Transferring
        kept = self.error is None and bool(self.chunks)
        return RoomStatus(
            poll=poll,
            error=self.error,
            leased=kept or leased,
            prefix_len=min(starts, default=0),
            bytes=size,
            exposed_seconds=exposed,
            seen=self.seen,
            token_seconds=self.token_seconds,
        )


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
    prompt: Prompt = field(default_factory=Prompt)
    transfers: dict[str, Transfer] = field(default_factory=dict)
    error: KVBatonError | None = None
    reported: RoomStatus = field(default_factory=RoomStatus)

    def over(self, status: RoomStatus) -> bool:
        """Nothing is left to do or to say: the record can go."""
        return status.ended and not self.untold and _all_closed(self.transfers)

    def status(self) -> RoomStatus:
        writers, succeeded, opening, leased, size, exposed = 0, 0, False, False, 0, 0.0
        for transfer in self.transfers.values():
            incoming = transfer.as_target()
            opening = opening or transfer.state is State.OPENING
            if incoming.parts:
                writers += 1
                succeeded += transfer.succeeded
                leased = leased or transfer.leased
                size += incoming.bytes
                exposed = max(exposed, incoming.exposed_seconds)
        if self.error is not None:
            poll = KVPoll.Failed
        elif opening or not self.transfers:
            poll = KVPoll.Bootstrapping
        elif succeeded == writers:
            poll = KVPoll.Success
        else:
            poll = KVPoll.Transferring if succeeded else KVPoll.WaitingForInput
        return RoomStatus(
            poll=poll,
            error=self.error,
            leased=leased,
            bytes=size,
            agreed=self.agreed,
            exposed_seconds=exposed,
            token_count=0 if self.prompt.at_most else self.prompt.token_count,
        )


def _all_closed(transfers: dict[str, Transfer]) -> bool:
    return all(transfer.state is State.CLOSED for transfer in transfers.values())


Room = SourceRoom | TargetRoom


class RoomKeeper(Protocol):
    """Whoever knows all rooms of a rank, as the parts that look after one half of them see it."""

    def touch(self, room: Room) -> None:
        """Something happened to a room: conclusions are drawn once the event is done."""

    def fail(self, room: Room, error: KVBatonError) -> None:
        """End a room for its engine; the first root cause wins."""

    def begin(self, room: Room, transfer: Transfer) -> None:
        """Begin one of a room's transfers."""

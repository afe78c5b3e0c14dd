"""All rooms of this rank: what its engine asked for, what peers opened, and what is reported to the engine.

A room is the router's number for one request; it is the only thing that the two engines have in common, and nobody
guards it: it may be used again, used twice at once, or known here to one side only. So a *record* of a room is made by
whoever comes first and completed by whoever comes next, and a number that is used again gets a new record while the old
one still owes an answer. Only the current record of a number is reported; an older one ends what it owes in silence.

Source rooms. The two halves of a request start at once, so an ``Open`` may come before ``sender()`` or after the
chunks, and from several targets (all ranks of one decode group) in any order. Chunks are kept until every target has
opened it, or the engine withdraws them: a target that opens late gets all of them at once. Three memories make the
orders equal:

- a room that failed before our engine asked for it: the sender that comes later learns why, at once;
- a room that failed before every target had opened it: those still to come are refused with the reason, each once,
  and then the number is free for another request (:class:`_Unmet`);
- tombstones of transfers (see ``transfers``): a copy of an ``Open`` that was answered begins nothing.

Target rooms are opened in ``target_rooms``.

Conclusions are drawn in one place. Whatever happens touches a room; :meth:`Rooms.settle` looks at each touched room
once, after the event is done: it fails the room if one of its transfers has failed (the first root cause wins, and
every other transfer is then given up with it), reports what the engine does not know yet, and drops the record when
nothing is owed. A report therefore never shows a state between two effects of one event.

Failing and freeing are two things. ``fail`` ends a room for the engine now; its units stay leased until each transfer
has proof that no write can come. Nothing in this file frees by time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from kvbaton.errors import (
    ExpiredError,
    InternalError,
    KVBatonError,
    OverloadedError,
    RemoteProtocolError,
    TransferFailedError,
)
from kvbaton.plan.staging import StagingPool
from kvbaton.protocol.context import Context
from kvbaton.protocol.effects import Report, RoomStatus
from kvbaton.protocol.events import (
    AbortRequested,
    ChunkSubmitted,
    ChunksWithdrawn,
    SenderOpened,
    ShutdownRequested,
)
from kvbaton.protocol.grants import check_grants, check_staging, parts_of
from kvbaton.protocol.messages import Failed, Open, Role, clip
from kvbaton.protocol.peers import Peers
from kvbaton.protocol.room import Room, SourceRoom, TargetRoom
from kvbaton.protocol.session import Session, SessionState
from kvbaton.protocol.target_rooms import TargetRooms
from kvbaton.protocol.transfer import On, Outgoing, State, Transfer
from kvbaton.protocol.transfers import Transfers

#: Rooms that failed before the other party came (our engine, or a target), remembered so that it learns why.
MAX_RECENT_FAILURES = 1_024


@dataclass(frozen=True, slots=True)
class _Unmet:
    """Why a room failed before all parties had come, and the targets that had (``peers``, all of ``group``)."""

    error: KVBatonError
    group: str
    peers: set[str]

    def refuses(self, session: Session) -> bool:
        """Whether an Open belongs to the request that failed, and is refused for that, once: the next one of a target
        that has opened, or was refused, is a new request's."""
        if session.peer in self.peers or (self.peers and session.hello and session.hello.group != self.group):
            return False
        if self.peers:
            self.peers.add(session.peer)
        return True


class Rooms:
    """See the module. Every change touches a room; ``settle`` then draws the conclusions and reports."""

    def __init__(self, context: Context, peers: Peers, transfers: Transfers) -> None:
        self._context = context
        self._peers = peers
        self._transfers = transfers
        self._sources: dict[int, SourceRoom] = {}
        self._touched: dict[int, Room] = {}
        self.staging = StagingPool(context.identity.layout, context.settings.staging)
        self._homes: dict[Transfer, Room] = {}
        self._failed_before_sender: OrderedDict[int, _Unmet] = OrderedDict()
        self._failed_before_open: OrderedDict[int, _Unmet] = OrderedDict()
        self.targets = TargetRooms(context, peers, self, self.staging)

    def all(self) -> list[Room]:
        return [*self._sources.values(), *self.targets.rooms.values()]

    def sizes(self) -> dict[str, int]:
        return {
            "rooms": len(self._sources) + len(self.targets.rooms),
            "homes": len(self._homes),
            "early_failures": len(self._failed_before_sender) + len(self._failed_before_open),
            "groups_covered": self.targets.groups_covered,
            "sources_awaited": self.targets.sources_awaited,
            "staging_slots_busy": self.staging.slots - len(self.staging),
        }

    def find(self, room: int) -> list[Room]:
        """The records of a room, as source and as target."""
        return [record for record in (self._sources.get(room), self.targets.rooms.get(room)) if record is not None]

    def wants_chunks(self, room: int) -> bool:
        """Whether a chunk for this room would still be used."""
        source = self._sources.get(room)
        return source is not None and source.error is None

    def transfer_changed(self, transfer: Transfer) -> None:
        if transfer.incoming is not None and transfer.state is State.CLOSED:
            for lease in transfer.incoming.leases.values():
                self.staging.release(lease.slots)
            transfer.incoming.leases = {}
        room = self._homes.get(transfer)
        if room is not None:
            self.touch(room)

    # ---- source rooms -------------------------------------------------------------------------------------------

    def on_sender_opened(self, event: SenderOpened) -> None:
        room = self._sources.get(event.room)
        if room is None or (room.has_sender and room.released):  # the old record only has to announce its outcome
            room = self._sources[event.room] = SourceRoom(room=event.room)
            unmet = self._failed_before_sender.pop(event.room, None)
            room.error = unmet.error if unmet is not None else None
        self._failed_before_open.pop(event.room, None)
        room.has_sender = True
        self._context.record(event.room, "sender opened")
        self._await_targets(room)
        self.touch(room)

    def on_open(self, session: Session, message: Open) -> None:
        """A target opens a room here, perhaps before our engine knows it."""
        if session.state is not SessionState.READY or session.pair is None or session.hello is None:
            return
        key = message.key
        try:
            room = self._room_for(session, message)
            grants = check_grants(message.grants, session.hello.layout)
            expected = parts_of(session.pair, message.grants)
            if frozenset(expected) != frozenset(message.parts):
                raise RemoteProtocolError(
                    f"the parts wanted {message.parts} are not those of the plan {expected}", peer=session.name
                )
            leases = check_staging(message.staging, session.staged, grants)
        except KVBatonError as error:
            self._context.record(key.room, f"{key} from {session.name} refused: {error}")
            self._transfers.record_tombstone(
                session, key, error
            )  # "drained" is a promise, for late copies of the Open as well
            self._context.send_on(
                session.link,
                Failed(
                    sender=self._context.instance,
                    receiver=session.peer,
                    key=key,
                    code=error.code,
                    reason=clip(error.message),
                    drained=True,
                ),
            )
            return
        gathered = {part for part, lease in leases.items() if lease.token_stop >= grants[part.pool].token_stop}
        room.token_seconds += session.costs.token_seconds(session.pair, gathered)
        outgoing = Outgoing(
            pair=session.pair,
            grants=grants,
            parts=message.parts,
            token_count=message.token_count,
            at_most=message.at_most,
            leases=leases,
        )
        transfer = Transfer(key, session.peer, self._context, outgoing=outgoing)
        self._sources[key.room] = room
        room.group, room.expected = session.hello.group, session.hello.group_size
        self._failed_before_sender.pop(key.room, None)
        self._failed_before_open.pop(key.room, None)
        tokens = f"at most {message.token_count}" if message.at_most else message.token_count
        self._context.record(key.room, f"{key} opened by {session.name} for {tokens} tokens")
        self.begin(room, transfer)
        if room.error is not None:
            self._transfers.step(transfer, On.GIVEN_UP, room.error)
        for chunk in room.chunks:
            self._transfers.step(transfer, On.CHUNK_SUBMITTED, chunk)
        if room.opened:
            room.chunks.clear()
        self.touch(room)

    def _room_for(self, session: Session, message: Open) -> SourceRoom:
        key = message.key
        if self._transfers.is_forgotten(session.peer, key):
            raise RemoteProtocolError(f"transfer {key} has ended here; open the room again with a new id")
        self._transfers.check_load(session.peer, message.grants)
        room = self._sources.get(key.room)
        if room is None:
            for failed in (self._failed_before_open, self._failed_before_sender):
                unmet = failed.get(key.room)
                if unmet is not None and unmet.refuses(session):
                    raise unmet.error.again()
            if message.begun:
                error = TransferFailedError(
                    "the prefill rank has no such room (any more): it has ended there, or the rank was restarted",
                    room=key.room,
                )
                group = session.hello.group if session.hello is not None else ""
                self._remember(self._failed_before_sender, key.room, _Unmet(error, group, {session.peer}))
                raise error
            if len(self._sources) >= self._context.settings.rooms:
                raise OverloadedError(f"{len(self._sources)} rooms are live on the prefill rank; try again later")
            return SourceRoom(room=key.room)
        if session.peer in room.transfers:
            raise RemoteProtocolError(f"room {key.room} is open already for another request: rooms must be unique")
        if room.transfers and session.hello is not None and room.group != session.hello.group:
            raise RemoteProtocolError(f"room {key.room} is open already for decode group {room.group!r}")
        if room.opened and room.error is None:  # its units may be free already
            raise RemoteProtocolError(f"room {key.room} is open already for every rank of decode group {room.group!r}")
        return room

    def on_queued(self, session: Session, queued: Sequence[int]) -> None:
        """A target says that its engine will open these rooms once it has memory: no deadline of ours measures its
        queue, and while it lives it says so again."""
        for number in queued:
            room = self._sources.get(number)
            if room is None or room.opened or room.error is not None or not room.has_sender:
                continue
            if not room.transfers or (session.hello is not None and room.group == session.hello.group):
                self._await_targets(room)

    def _await_targets(self, room: SourceRoom) -> None:
        self._context.timers.set(room, "deadline", self._context.now + self._context.settings.bootstrap_timeout)

    def on_chunk_submitted(self, event: ChunkSubmitted) -> None:
        room = self._sources.get(event.room)
        if room is None or room.error is not None:
            return
        room.seen += 1
        self._context.counters["chunks_of_layers"] += event.chunk.layers is not None
        if not room.opened:  # a decode rank has its time from when something is there for it
            room.chunks.append(event.chunk)
            self._await_targets(room)
        self._context.record(event.room, f"{event.chunk} submitted{', the last' if event.chunk.last else ''}")
        for transfer in list(room.transfers.values()):
            self._transfers.step(transfer, On.CHUNK_SUBMITTED, event.chunk)
        self.touch(room)

    def on_chunks_withdrawn(self, event: ChunksWithdrawn) -> None:
        room = self._sources.get(event.room)
        if room is None or room.error is not None:
            return
        room.chunks.clear()
        room.seen = event.seen
        self._context.record(event.room, "chunks withdrawn, to be submitted again")
        for transfer in list(room.transfers.values()):
            self._transfers.step(transfer, On.CHUNKS_WITHDRAWN)
        self.touch(room)

    # ---- conclusions -------------------------------------------------------------------------------------------------

    def on_abort_requested(self, event: AbortRequested) -> None:
        room: Room | None
        room = self._sources.get(event.room) if event.role == "source" else self.targets.rooms.get(event.room)
        if room is None or room.status().ended:
            return
        self.fail(room, event.error)

    def on_shutdown(self, event: ShutdownRequested) -> None:
        for room in self.all():
            if not room.status().ended:
                self.fail(room, TransferFailedError(f"its rank is closing: {event.reason}", room=room.room))

    def fail(self, room: Room, error: KVBatonError) -> None:
        """First root cause wins; every transfer that still runs is given up with it."""
        if room.error is None:
            room.error = error.in_room(room.room, room.reported.poll.name)
            self._context.record(room.room, f"failed: {room.error}")
            if isinstance(room, TargetRoom) and not room.transfers:
                self.targets.give_up_unopened(room)
        for transfer in list(room.transfers.values()):
            self._transfers.step(transfer, On.GIVEN_UP, room.error)
        self.touch(room)

    def begin(self, room: Room, transfer: Transfer) -> None:
        room.transfers[transfer.peer] = transfer
        self._homes[transfer] = room
        self._transfers.begin(transfer)

    def touch(self, room: Room) -> None:
        self._touched[id(room)] = room

    def settle(self) -> None:
        """Draw the conclusions for every room that something happened to, and report what changed."""
        while self._touched:
            _, room = self._touched.popitem()
            status = room.status()
            if not status.ended:
                failed = next((t.error for t in room.transfers.values() if t.error is not None), None)
                if failed is not None:
                    self.fail(room, failed)
                    continue
            if isinstance(room, SourceRoom) and room.opened:
                self._context.timers.cancel(room, "deadline")
            self._report(room, status)
            if room.over(status):
                self._remove(room)

    def _report(self, room: Room, status: RoomStatus) -> None:
        """Tell our engine what changed. A room that it has not asked for yet is reported in full once it does."""
        if not self._is_current(room) or (isinstance(room, SourceRoom) and not room.has_sender):
            return
        if status != room.reported:
            room.reported = status
            role: Role = "source" if isinstance(room, SourceRoom) else "target"
            self._context.emit(Report(room.room, role, status))

    def _is_current(self, room: Room) -> bool:
        """Whether this record is the one that its number stands for; an older one only ends what it owes."""
        return self._sources.get(room.room) is room or self.targets.rooms.get(room.room) is room

    def _remove(self, room: Room) -> None:
        self._context.timers.cancel(room, "deadline")
        for transfer in room.transfers.values():
            self._homes.pop(transfer, None)
        if not self._is_current(room):
            return
        if isinstance(room, TargetRoom):
            self.targets.remove(room)
            return
        del self._sources[room.room]
        if room.error is not None and not (room.has_sender and room.opened):
            remembered = self._failed_before_open if room.has_sender else self._failed_before_sender
            self._remember(remembered, room.room, _Unmet(room.error, room.group, set(room.transfers)))

    def _remember(self, failures: OrderedDict[int, _Unmet], number: int, unmet: _Unmet) -> None:
        failures[number] = unmet
        if len(failures) > MAX_RECENT_FAILURES:
            failures.popitem(last=False)

    def abort_unopened(self, session: Session, number: int, error: KVBatonError) -> None:
        """A rank of a decode group gave up a room that it has not opened: the group never will, and our engine, which
        may ask for it later, is told."""
        group = session.hello.group if session.hello is not None else ""
        room = self._sources.get(number)
        if room is None:
            if number not in self._failed_before_open:
                self._remember(self._failed_before_sender, number, _Unmet(error, group, {session.peer}))
        elif not room.transfers or (room.group == group and session.peer not in room.transfers):
            self.fail(room, error)

    def _bootstrap_error(self, room: Room) -> KVBatonError:
        seconds = self._context.settings.bootstrap_timeout
        return ExpiredError(
            f"not started within {seconds:g} s, it waited for {self.waits_for(room)}; check that the other half got "
            "the request too, and send it again",
            room=room.room,
        )

    def waits_for(self, room: Room) -> str:
        """What a room waits for now, for people."""
        busy = [f"{t.peer} is {t.state.value}" for t in room.transfers.values() if t.state is not State.CLOSED]
        if busy:
            return "transfers: " + ", ".join(busy)
        if isinstance(room, SourceRoom):
            if not room.opened:
                return f"{room.expected or 'no'} decode ranks to open the room; {len(room.transfers)} have"
            return "the engine to submit chunks"
        if room.grants is None:
            return "the engine to publish pages"
        states = (f"{a}: {s.state.value if (s := self._peers.at(a)) else 'not dialled'}" for a in room.sources)
        return "sessions: " + ", ".join(states)

    def expire(self, room: Room) -> None:
        """A room did not start in time, or those that are to hear of its end have stayed away."""
        if isinstance(room, TargetRoom) and room.error is not None:
            room.untold.clear()
            self.touch(room)
        else:
            self.fail(room, self._bootstrap_error(room))

    def check_invariants(self) -> None:
        self.targets.check_invariants()
        for transfer in self._transfers.live():
            home = self._homes.get(transfer)
            if home is None or home.transfers.get(transfer.peer) is not transfer:
                raise InternalError(f"{transfer} belongs to no room")
        for room in self.all():
            unknown_to_engine = isinstance(room, SourceRoom) and not room.has_sender
            if not unknown_to_engine and room.reported != room.status():
                raise InternalError(f"room {room.room} was reported as {room.reported}, it is {room.status()}")

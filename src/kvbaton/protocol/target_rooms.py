"""The target half of a rank's rooms: agree with every source, open a room with all of them at once, or say that it
never will be opened.

A room is opened with all source ranks in one step, when pages are granted *and* every session is ready: one id is
minted for all of them, and the set of sources is checked to be one whole group that writes each byte of ours once.
Until then nothing of ours may be written, so a failure needs no drain; but its sources wait for an Open, so each is
told, now or as soon as it can be reached.

A room that is agreed and has no units waits in its own engine's queue, for as long as the engine wants and the sources
live: the queue is the engine's to bound. Pings tell the sources of it (:meth:`TargetRooms.queued`).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import cast

from kvbaton.errors import (
    CapacityError,
    ConfigError,
    IncompatibleError,
    InternalError,
    KVBatonError,
    PeerLostError,
)
from kvbaton.plan.pair import PairPlan, PartId, check_coverage
from kvbaton.plan.staging import StagingPool
from kvbaton.protocol.context import Context
from kvbaton.protocol.events import GrantsPublished, ReceiverOpened
from kvbaton.protocol.grants import parts_of
from kvbaton.protocol.messages import MAX_UNITS_PER_GRANT, Grant, PartBytes, TransferKey
from kvbaton.protocol.peers import Peers
from kvbaton.protocol.room import RoomKeeper, TargetRoom
from kvbaton.protocol.session import Session, SessionState
from kvbaton.protocol.transfer import Incoming, Lease, Prompt, Transfer


class TargetRooms:
    """See the module. ``keeper`` draws the conclusions from what happens to a room."""

    def __init__(self, context: Context, peers: Peers, keeper: RoomKeeper, staging: StagingPool) -> None:
        self._context = context
        self._peers = peers
        self._keeper = keeper
        self._staging = staging
        self.rooms: dict[int, TargetRoom] = {}  #: current records, by number
        self._by_source: dict[str, dict[int, TargetRoom]] = {}  # the same, by the addresses that they are filled from
        self._covered: OrderedDict[tuple[str, ...], None] = OrderedDict()

    @property
    def groups_covered(self) -> int:
        """Groups of sources that are known to write all of our memory, each byte once."""
        return len(self._covered)

    @property
    def sources_awaited(self) -> int:
        """Addresses that some room is to be filled from."""
        return len(self._by_source)

    def check_invariants(self) -> None:
        """Raise InternalError where the rooms by source are not the rooms."""
        listed = {(address, id(room)) for address, rooms in self._by_source.items() for room in rooms.values()}
        if listed != {(address, id(room)) for room in self.rooms.values() for address in room.sources}:
            raise InternalError(f"{len(self._by_source)} sources are listed with other rooms than the current ones")

    def needs(self, session: Session) -> bool:
        """Whether a room of ours still waits for a session."""
        return any(
            room.error is None or session.address in room.untold for room in self._filled_from(session.address).values()
        )

    def queued(self, session: Session) -> tuple[int, ...]:
        """Rooms to be filled by a session's peer that wait for our engine to publish units."""
        return tuple(
            number
            for number, room in self._filled_from(session.address).items()
            if room.agreed and room.grants is None and room.error is None
        )

    def _filled_from(self, address: str) -> dict[int, TargetRoom]:
        return self._by_source.get(address, {})

    def _add(self, room: TargetRoom) -> None:
        """Make a record the one that its number stands for."""
        earlier = self.rooms.get(room.room)
        if earlier is not None:
            self.remove(earlier)
        self.rooms[room.room] = room
        for address in room.sources:
            self._by_source.setdefault(address, {})[room.room] = room

    def remove(self, room: TargetRoom) -> None:
        """Forget a current record."""
        del self.rooms[room.room]
        for address in room.sources:
            rooms = self._by_source[address]
            del rooms[room.room]
            if not rooms:
                del self._by_source[address]

    def on_receiver_opened(self, event: ReceiverOpened) -> None:
        room = TargetRoom(room=event.room, sources=event.sources, begun=event.begun)
        self._add(room)
        self._context.record(event.room, f"receiver opened, to be filled from {', '.join(event.sources)}")
        self._context.timers.set(room, "deadline", self._context.now + self._context.settings.bootstrap_timeout)
        for address in event.sources:
            self._peers.dial(address)
            session = self._peers.at(address)
            if session is not None and session.refused_for_now:
                session.say_hello_again(self._context.now)
            elif session is not None and session.state in (SessionState.REFUSED, SessionState.LOST):
                self._keeper.fail(room, session.error or PeerLostError("the peer is lost", peer=session.name))
        self._go_on(room)

    def on_grants_published(self, event: GrantsPublished) -> None:
        room = self.rooms.get(event.room)
        if room is None or room.error is not None:
            return
        room.grants = event.grants
        room.prompt = Prompt(token_count=event.token_count, at_most=event.at_most)
        self._go_on(room)

    def _go_on(self, room: TargetRoom) -> None:
        """Agree once all sessions are ready; then open the room if it is granted."""
        self._keeper.touch(room)
        ready = self._ready(room)
        if room.transfers or room.error is not None or len(ready) < len(room.sources):
            return
        try:
            self._check_group(ready)
        except (IncompatibleError, ConfigError) as error:
            self._keeper.fail(room, error)
            return
        room.agreed = True
        self._context.timers.cancel(room, "deadline")  # from here on it is our engine's queue that it waits in
        if room.grants is not None:
            self._open(room, ready, room.grants)

    def _ready(self, room: TargetRoom) -> list[Session]:
        sessions = [self._peers.at(address) for address in room.sources]
        return [s for s in sessions if s is not None and s.state is SessionState.READY]

    def _open(self, room: TargetRoom, ready: list[Session], grants: tuple[Grant, ...]) -> None:
        """Open the room with every source rank."""
        try:
            manifests = [parts_of(cast(PairPlan, session.pair), grants) for session in ready]
            for grant in grants:
                if len(grant.units) > MAX_UNITS_PER_GRANT:
                    raise CapacityError(
                        f"pool {grant.pool!r}: {len(grant.units)} units are more than the {MAX_UNITS_PER_GRANT} that a "
                        "message carries; use larger pages"
                    )
        except (IncompatibleError, ConfigError) as error:
            self._keeper.fail(room, error)
            return
        key = TransferKey(room.room, self._context.mint())
        for session, parts in zip(ready, manifests, strict=True):
            incoming = Incoming(
                grants=grants,
                parts=parts,
                prompt=room.prompt,
                pair=session.pair,
                begun=room.begun,
                leases=self._lease_staging(session, parts, grants),
            )
            transfer = Transfer(key, session.peer, self._context, incoming=incoming)
            self._keeper.begin(room, transfer)
        self._context.timers.cancel(room, "deadline")
        self._context.record(room.room, f"{key} opened with {len(ready)} source ranks")

    def _lease_staging(
        self, session: Session, parts: tuple[PartBytes, ...], grants: tuple[Grant, ...]
    ) -> dict[PartId, Lease]:
        """Staging slots for the parts of one writer that travel cheaper that way, as far as slots are free."""
        wanted = {part.part for part in parts}
        by_pool = {grant.pool: grant for grant in grants}
        leases = {}
        for staged in session.staged:
            if staged is None or staged.part.id not in wanted:
                continue
            grant = by_pool[staged.part.id.pool]
            blocks = staged.part.blocks(grant.token_start, grant.token_stop)
            slots = self._staging.lease(staged, len(blocks), session.costs)
            if slots:
                leases[staged.part.id] = Lease(staged=staged, slots=slots, first=blocks.start)
        return leases

    def _check_group(self, sessions: list[Session]) -> None:
        """The sources must be one whole group whose ranks together write all of our memory, once."""
        instances = tuple(session.peer for session in sessions)
        if instances in self._covered:
            return
        hellos = [session.hello for session in sessions if session.hello is not None]
        if len({hello.group for hello in hellos}) != 1 or len(hellos) != hellos[0].group_size:
            raise IncompatibleError(
                f"the source addresses belong to groups {sorted({h.group for h in hellos})} with "
                f"{len(hellos)} ranks, a group of {hellos[0].group_size} is needed: give the address of every rank",
                field="sources",
            )
        check_coverage([hello.layout for hello in hellos], self._context.identity.layout)
        self._covered[instances] = None
        if len(self._covered) > self._context.settings.sessions:
            self._covered.popitem(last=False)

    def give_up_unopened(self, room: TargetRoom) -> None:
        """Tell every source, now or as soon as it can be reached: it would wait for an Open that never comes."""
        self._context.timers.set(room, "deadline", self._context.now + self._context.settings.announce_seconds)
        room.untold.update(room.sources)
        for address in room.sources:
            session = self._peers.at(address)
            if session is not None:
                self._tell_unopened(room, session)

    def _tell_unopened(self, room: TargetRoom, session: Session) -> None:
        never_met = session.state is SessionState.LOST and session.pair is None  # else it may hold it, and speak again
        if never_met or session.state in (SessionState.REFUSED, SessionState.GONE):
            room.untold.discard(session.address)
        if session.state is not SessionState.READY:
            return
        room.untold.discard(session.address)
        key = TransferKey(room.room, self._context.mint())
        transfer = Transfer(key, session.peer, self._context, incoming=Incoming())
        transfer.error = room.error
        self._keeper.begin(room, transfer)

    def dial_failed(self, address: str, error: KVBatonError) -> None:
        for room in list(self._filled_from(address).values()):
            if not room.transfers:
                self._keeper.fail(room, error)
            room.untold.discard(address)

    def session_changed(self, session: Session) -> None:
        """Rooms that wait for a session go on, or fail with its reason."""
        for room in list(self._filled_from(session.address).values()):
            if session.address in room.untold:
                self._tell_unopened(room, session)
                self._keeper.touch(room)
            if room.transfers:
                continue
            if session.state in (SessionState.REFUSED, SessionState.LOST, SessionState.GONE):
                self._keeper.fail(room, session.error or PeerLostError("the peer is gone", peer=session.name))
            elif session.state is SessionState.READY:
                self._go_on(room)

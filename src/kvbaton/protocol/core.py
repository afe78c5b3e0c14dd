"""The protocol core of one rank: owns the tables, routes events to sessions, transfers and rooms.

``handle(event, now)`` is the only mutator; it returns what is to be done, in order. ``next_deadline()`` says when to
call it again with :class:`TimePassed`. Messages are read before deadlines are judged, because the caller hands over
its inbox first. A peer's mistake never raises: it is counted, told in the room's story, and answered where that helps.
"""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import TypeVar, cast

from kvbaton.control.base import LinkId
from kvbaton.errors import (
    AbortedError,
    ExpiredError,
    IncompatibleError,
    InternalError,
    KVBatonError,
    LayoutError,
    MessageError,
    OverloadedError,
    PeerLostError,
    RemoteProtocolError,
    TransferFailedError,
    from_code,
)
from kvbaton.messages import (
    Abort,
    AnyMessage,
    Close,
    Done,
    Drained,
    Failed,
    Forgotten,
    Goodbye,
    Hello,
    Open,
    Opened,
    Ping,
    Pong,
    Query,
    Role,
    Stranger,
    TransferKey,
    Verdict,
    clip,
    decode,
    encode,
)
from kvbaton.plan import PairPlan, check_coverage
from kvbaton.protocol import table
from kvbaton.protocol.effects import CloseLink, Dial, Effect, FencePeer, KVPoll, Report, RoomStatus, Send
from kvbaton.protocol.events import (
    AbortRequested,
    ChunkSubmitted,
    Dialed,
    Event,
    GrantsPublished,
    LinkRefused,
    LinkUp,
    MessageArrived,
    PeerFenced,
    PeerPrepared,
    PeerUnprepared,
    ReceiverOpened,
    SenderOpened,
    ShutdownRequested,
    TimePassed,
    WriteBroken,
    WriteId,
    WriteSettled,
)
from kvbaton.protocol.grants import check_grants, parts_of
from kvbaton.protocol.room import Room, SourceRoom, TargetRoom
from kvbaton.protocol.session import Identity, Session, SessionState
from kvbaton.protocol.settings import Settings
from kvbaton.protocol.story import Line, Story
from kvbaton.protocol.timers import Timers
from kvbaton.protocol.transfer import Incoming, On, Outgoing, State, Transfer

#: Rooms that failed before our engine asked for them, remembered so that it learns why.
MAX_RECENT_FAILURES = 1_024

_MESSAGES_TO_SOURCE: dict[type, On] = {
    Open: On.OPEN_ARRIVED,
    Close: On.CLOSE_ARRIVED,
    Abort: On.ABORT_ARRIVED,
    Query: On.QUERY_ARRIVED,
}
_MESSAGES_TO_TARGET: dict[type, On] = {
    Opened: On.OPENED_ARRIVED,
    Done: On.DONE_ARRIVED,
    Failed: On.FAILED_ARRIVED,
    Drained: On.DRAINED_ARRIVED,
    Forgotten: On.FORGOTTEN_ARRIVED,
}

TransferAddress = tuple[str, Role, TransferKey]
Timed = Transfer | Session | SourceRoom | TargetRoom
R = TypeVar("R", SourceRoom, TargetRoom)


class Core:
    """See the module."""

    def __init__(self, identity: Identity, settings: Settings) -> None:
        self.identity = identity
        self.settings = settings
        self.counters: Counter[str] = Counter()
        self._now = 0.0
        self._effects: list[Effect] = []
        self._timers: Timers[Timed] = Timers()
        self._story = Story()
        self._dialing: set[str] = set()
        self._links: dict[LinkId, Session] = {}
        self._dialed: dict[str, Session] = {}
        self._peers: dict[tuple[str, Role], Session] = {}
        self._transfers: dict[TransferAddress, Transfer] = {}
        self._tombstones: OrderedDict[TransferAddress, Transfer] = OrderedDict()
        self._forgotten_below: dict[str, int] = {}
        self._writes: dict[WriteId, Transfer] = {}
        self._sources: dict[int, SourceRoom] = {}
        self._targets: dict[int, TargetRoom] = {}
        self._touched: dict[int, Room] = {}
        self._recent_failures: OrderedDict[int, KVBatonError] = OrderedDict()
        self._covered: OrderedDict[tuple[str, ...], None] = OrderedDict()
        self._write_ids = itertools.count(1)
        self._transfer_ids = itertools.count(1)
        self._handlers: dict[type, Callable[..., None]] = {
            Dialed: self._on_dialed,
            MessageArrived: self._on_message,
            LinkUp: self._on_link_up,
            LinkRefused: self._on_link_refused,
            SenderOpened: self._on_sender_opened,
            ChunkSubmitted: self._on_chunk_submitted,
            ReceiverOpened: self._on_receiver_opened,
            GrantsPublished: self._on_grants_published,
            AbortRequested: self._on_abort_requested,
            WriteSettled: self._on_write_settled,
            WriteBroken: self._on_write_broken,
            PeerPrepared: self._on_peer_prepared,
            PeerUnprepared: self._on_peer_unprepared,
            PeerFenced: self._on_peer_fenced,
            ShutdownRequested: self._on_shutdown,
            TimePassed: lambda _: None,
        }

    # ---- what the driver calls --------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Apply one event. Deadlines that have passed are judged after it."""
        self._now = now
        self._handlers[type(event)](event)
        self._settle_rooms()
        while (due := self._timers.pop_due(now)) is not None:
            self._on_timer(*due)
            self._settle_rooms()
        effects, self._effects = self._effects, []
        return effects

    def next_deadline(self) -> float | None:
        """When to call ``handle(TimePassed(), …)`` at the latest, in seconds of the caller's clock."""
        return self._timers.next()

    @property
    def receiving(self) -> bool:
        """Whether a peer may be writing our memory now."""
        return any(transfer.leased for room in self._targets.values() for transfer in room.transfers.values())

    def wants_chunks(self, room: int) -> bool:
        """Whether a chunk for this room would still be used."""
        source = self._sources.get(room)
        return source is not None and source.error is None

    @property
    def quiet(self) -> bool:
        """No write of ours is in flight."""
        return not self._writes

    @property
    def live_rooms(self) -> int:
        return len(self._sources) + len(self._targets)

    @property
    def quarantined(self) -> int:
        """Rooms that have failed while a peer may still write their units."""
        return sum(1 for room in self._targets.values() if room.reported.leased and room.error is not None)

    def sessions(self) -> list[tuple[str, str, str]]:
        """(peer, our role, state) of every session, for people."""
        known = {id(s): s for s in (*self._links.values(), *self._dialed.values())}
        return [(session.name, session.role, session.state.value) for session in known.values()]

    def farewell(self, reason: str) -> list[Effect]:
        """Goodbyes to every peer; only true, and only allowed, when the core is quiet."""
        if not self.quiet:
            raise InternalError("a farewell promises that no write is in flight")
        for session in list(self._peers.values()):
            self.send_on(
                session.link, Goodbye(sender=self.identity.instance, receiver=session.peer, reason=clip(reason))
            )
        effects, self._effects = self._effects, []
        return effects

    def story(self, room: int) -> list[Line]:
        """What happened to a room, and last what it waits for now."""
        lines = self._story.of(room)
        for record in (self._sources.get(room), self._targets.get(room)):
            if record is not None:
                lines.append(Line(self._now, f"now {record.status().poll.name}: {self._waits_for(record)}"))
        return lines

    def check_invariants(self) -> None:
        """Raise InternalError where the tables contradict each other. For tests and simulators."""
        for write, transfer in self._writes.items():
            if write not in transfer.as_source().outstanding:
                raise InternalError(f"write {write} is not outstanding in {transfer}")
        for address, transfer in self._transfers.items():
            if transfer.state is State.CLOSED or address in self._tombstones:
                raise InternalError(f"{transfer} is closed and live at once")
            rooms: dict[int, SourceRoom] | dict[int, TargetRoom]
            rooms = self._sources if transfer.outgoing is not None else self._targets
            home = rooms.get(transfer.key.room)
            if home is None or home.transfers.get(transfer.peer) is not transfer:
                raise InternalError(f"{transfer} belongs to no room")
            if self._timers.get(transfer, "deadline") is None and transfer.state is not State.DRAINING:
                waits_for_fence = transfer.state is State.SETTLING
                if not waits_for_fence:
                    raise InternalError(f"{transfer} has no deadline")
        for room in self._all_rooms():
            if room.reported != room.status():
                raise InternalError(f"room {room.room} was reported as {room.reported}, it is {room.status()}")
        if len(self._tombstones) > self.settings.tombstones:
            raise InternalError("too many tombstones")

    # ---- surroundings of sessions and transfers (Desk, Wire) ----------------------------------------------------

    @property
    def instance(self) -> str:
        return self.identity.instance

    def emit(self, effect: Effect) -> None:
        self._effects.append(effect)

    def send_on(self, link: LinkId, message: AnyMessage) -> None:
        self._effects.append(Send(link, encode(message)))

    def send(self, transfer: Transfer, message: AnyMessage) -> None:
        session = self._peers.get((transfer.peer, _role(transfer)))
        if session is not None:
            self.send_on(session.link, message)

    def mint_write(self, transfer: Transfer) -> WriteId:
        write = WriteId(next(self._write_ids))
        self._writes[write] = transfer
        return write

    def set_timer(self, transfer: Transfer, name: str, when: float) -> None:
        self._timers.set(transfer, name, when)

    def cancel_timers(self, transfer: Transfer) -> None:
        self._timers.cancel(transfer, "deadline", "retry")

    def set_session_timer(self, session: Session, name: str, when: float) -> None:
        self._timers.set(session, name, when)

    def cancel_session_timers(self, session: Session) -> None:
        self._timers.cancel(session, "deadline", "retry", "heartbeat", "forget")

    def tell(self, room: int, text: str) -> None:
        self._story.tell(room, self._now, text)

    # ---- links and sessions -------------------------------------------------------------------------------------

    def _on_dialed(self, event: Dialed) -> None:
        self._dialing.discard(event.address)
        session = Session(self, event.link, "target", event.address)
        self._links[event.link] = self._dialed[event.address] = session
        session.greet(self._now)

    def _on_link_up(self, event: LinkUp) -> None:
        session = self._links.get(event.link)
        if session is not None and session.role == "target":
            session.greet_again(self._now)

    def _on_link_refused(self, event: LinkRefused) -> None:
        session = self._links.get(event.link)
        if session is not None and session.role == "target":
            session.bury(
                PeerLostError(
                    f"nobody listens at {session.address} any more: the prefill rank is gone", peer=session.name
                ),
                self._now,
            )

    def session_changed(self, session: Session) -> None:
        """A session entered a state: transfers and rooms that depend on it learn it at once."""
        error = session.error or PeerLostError("the peer is gone", peer=session.name)
        if session.state is SessionState.READY:
            self._peers[session.peer, session.role] = session
        elif session.state is SessionState.LOST:
            self._step_all(session, On.PEER_LOST, error)
        elif session.state is SessionState.GONE:
            self._step_all(session, On.PEER_GONE, error)
            self._drop(session)
        if session.role == "target":
            self._wake_rooms(session)

    def _drop(self, session: Session) -> None:
        self.cancel_session_timers(session)
        if self._links.get(session.link) is session:
            del self._links[session.link]
            if session.role == "target":
                self.emit(CloseLink(session.link))
        if self._dialed.get(session.address) is session:
            del self._dialed[session.address]
        if self._peers.get((session.peer, session.role)) is session:
            del self._peers[session.peer, session.role]
        if session.role == "source" and session.peer:
            self._forgotten_below.pop(session.peer, None)
            self.emit(FencePeer(session.peer))

    def _wake_rooms(self, session: Session) -> None:
        for room in list(self._targets.values()):
            if session.address in room.sources and not room.transfers:
                if session.state in (SessionState.REFUSED, SessionState.LOST, SessionState.GONE):
                    self._fail_room(room, session.error or PeerLostError("the peer is gone", peer=session.name))
                elif session.state is SessionState.READY:
                    self._try_open(room)
                self._touch(room)

    def _step_all(self, session: Session, on: On, error: KVBatonError | None) -> None:
        for transfer in [t for t in self._transfers.values() if (t.peer, _role(t)) == (session.peer, session.role)]:
            self._step(transfer, on, error)

    def _on_peer_prepared(self, event: PeerPrepared) -> None:
        session = self._peers.get((event.peer, "source"))
        if session is not None:
            session.prepared(self._now)

    def _on_peer_unprepared(self, event: PeerUnprepared) -> None:
        session = self._peers.get((event.peer, "source"))
        if session is not None:
            session.unprepared(event.error, self._now)

    def _on_peer_fenced(self, event: PeerFenced) -> None:
        for transfer in [t for t in self._transfers.values() if t.peer == event.peer and t.outgoing is not None]:
            for write in transfer.as_source().outstanding:
                self._writes.pop(write, None)
            self._step(transfer, On.PEER_FENCED, None)
        session = self._peers.get((event.peer, "source"))
        if session is not None and session.state is SessionState.READY:
            session.prepare_again(self._now)

    # ---- messages -----------------------------------------------------------------------------------------------

    def _on_message(self, event: MessageArrived) -> None:
        try:
            message = decode(event.payload)
        except MessageError:
            self.counters["messages_malformed"] += 1
            return
        try:
            self._route(event.link, message)
        except RemoteProtocolError as error:
            self.counters["messages_forbidden"] += 1
            if error.room is not None:
                self.tell(error.room, f"forbidden: {error}")

    def _route(self, link: LinkId, message: AnyMessage) -> None:
        if isinstance(message, Hello):
            self._on_hello(link, message)
            return
        session = self._links.get(link)
        if isinstance(message, Stranger):
            if session is not None and session.role == "target" and message.receiver in ("", self.instance):
                session.greet_again(self._now)
            return
        if session is None or session.peer != message.sender or message.receiver != self.instance:
            self.counters["messages_from_strangers"] += 1
            self.send_on(link, Stranger(sender=self.instance, receiver=message.sender))
            return
        session.heard(self._now)
        if isinstance(message, Ping):
            self.send_on(link, Pong(sender=self.instance, receiver=message.sender))
        elif isinstance(message, Pong):
            pass
        elif isinstance(message, Verdict):
            session.judged(message, self._now)
        elif isinstance(message, Goodbye):
            session.bury(PeerLostError(f"the peer has closed: {message.reason}", peer=session.name), self._now)
        else:
            self._on_transfer_message(session, message)

    def _on_hello(self, link: LinkId, hello: Hello) -> None:
        session = self._links.get(link)
        if session is not None and session.role == "target":
            self._on_answer(session, hello)
        elif hello.answers:
            self.counters["messages_from_strangers"] += 1
        else:
            self._on_greeting(link, session, hello)

    def _on_answer(self, session: Session, hello: Hello) -> None:
        if hello.answers != self.instance:
            self.counters["messages_from_strangers"] += 1
            return
        if session.hello is not None and session.peer != hello.sender:
            successor = Session(self, session.link, "target", session.address)
            self._links[session.link] = self._dialed[session.address] = successor
            session.bury(
                PeerLostError(f"the prefill rank was replaced by {hello.sender} at its address", peer=session.name),
                self._now,
            )
            session = successor
        session.answered(hello, self._now)

    def _on_greeting(self, link: LinkId, session: Session | None, hello: Hello) -> None:
        known = self._peers.get((hello.sender, "source"))
        if known is not None and known.link != link:
            self._links.pop(known.link, None)
            known.link = link
            self._links[link] = known
            session = known
        if session is not None and session.peer != hello.sender:
            session.bury(PeerLostError(f"replaced by {hello.sender} on its link", peer=session.name), self._now)
            session = None
        if session is None:
            self._lose_predecessor(hello)
            if len(self._links) >= self.settings.sessions:
                self.counters["sessions_refused"] += 1
                return
            session = Session(self, link, "source")
            self._links[link] = self._peers[hello.sender, "source"] = session
        session.heard(self._now)
        session.greeted(hello, self._now)

    def _lose_predecessor(self, hello: Hello) -> None:
        """A new process stands where another one stood in its group: the other one will not be heard of again."""
        place = (hello.group, hello.coordinates)
        for (_, role), other in list(self._peers.items()):
            if role == "source" and other.hello and (other.hello.group, other.hello.coordinates) == place:
                other.lose(PeerLostError(f"replaced by {hello.sender}", peer=other.name), self._now)

    def _on_transfer_message(self, session: Session, message: AnyMessage) -> None:
        on_source = _MESSAGES_TO_SOURCE.get(type(message))
        on = on_source or _MESSAGES_TO_TARGET.get(type(message))
        if on is None:
            raise RemoteProtocolError(f"{type(message).__name__} is no message about a transfer", peer=session.name)
        key = cast(Open, message).key
        role: Role = "source" if on_source else "target"
        if role != session.role:
            raise RemoteProtocolError(f"{on.value} goes the other way on this link", peer=session.name, room=key.room)
        address = (session.peer, role, key)
        transfer = self._transfers.get(address) or self._tombstones.get(address)
        if transfer is not None:
            self._step(transfer, on, message)
        elif isinstance(message, Open):
            self._open_here(session, message)
        else:
            self._answer_unknown(session, message, key)

    def _answer_unknown(self, session: Session, message: AnyMessage, key: TransferKey) -> None:
        """A message about a transfer that we do not know (any more) creates nothing and is answered truthfully."""
        self.counters["messages_unknown_room"] += 1
        ours, link = self.instance, session.link
        if isinstance(message, Abort):
            self._entomb(session, key, from_code(message.code, message.reason, peer=session.peer, room=key.room))
            self.send_on(link, Drained(sender=ours, receiver=session.peer, key=key))
        elif isinstance(message, Query):
            self._entomb(session, key, TransferFailedError("forgotten here", peer=session.peer, room=key.room))
            self.send_on(link, Forgotten(sender=ours, receiver=session.peer, key=key))
        elif isinstance(message, Opened | Done | Failed):
            self.send_on(link, Close(sender=ours, receiver=session.peer, key=key, success=False))

    def _entomb(self, session: Session, key: TransferKey, error: KVBatonError) -> None:
        """Remember an end that we only heard of: its Open, should it still arrive, must not begin anything."""
        if session.pair is not None:
            transfer = Transfer(
                key, session.peer, self, outgoing=Outgoing(pair=session.pair, grants={}, parts=(), token_count=0)
            )
            transfer.error = error
            transfer.state = State.CLOSED
            self._bury_transfer(transfer)

    # ---- source rooms -------------------------------------------------------------------------------------------

    def _on_sender_opened(self, event: SenderOpened) -> None:
        room = self._sources.get(event.room)
        if room is None:
            room = self._sources[event.room] = SourceRoom(room=event.room)
            room.error = self._recent_failures.pop(event.room, None)
        room.has_sender = True
        self.tell(event.room, "sender opened")
        self._timers.set(room, "deadline", self._now + self.settings.bootstrap_seconds)
        self._touch(room)

    def _open_here(self, session: Session, message: Open) -> None:
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
        except (RemoteProtocolError, LayoutError, OverloadedError) as error:
            self.tell(key.room, f"{key} from {session.name} refused: {error}")
            self.send_on(
                session.link,
                Failed(
                    sender=self.instance,
                    receiver=session.peer,
                    key=key,
                    code=error.code,
                    reason=clip(error.message),
                    drained=True,
                ),
            )
            return
        outgoing = Outgoing(pair=session.pair, grants=grants, parts=message.parts, token_count=message.token_count)
        transfer = Transfer(key, session.peer, self, outgoing=outgoing)
        self._sources[key.room] = room
        room.group, room.expected = session.hello.group, session.hello.group_size
        room.transfers[session.peer] = transfer
        self._transfers[session.peer, "source", key] = transfer
        self._recent_failures.pop(key.room, None)
        self.tell(key.room, f"{key} opened by {session.name} for {message.token_count} tokens")
        table.begin(transfer, self._now)
        if room.error is not None:
            self._step(transfer, On.GIVEN_UP, room.error)
        for chunk in room.chunks:
            self._step(transfer, On.CHUNK_SUBMITTED, chunk)
        self._touch(room)

    def _room_for(self, session: Session, message: Open) -> SourceRoom:
        key = message.key
        if key.id <= self._forgotten_below.get(session.peer, 0):
            raise RemoteProtocolError(f"transfer {key} has ended here; open the room again with a new id")
        room = self._sources.get(key.room)
        if room is None:
            if len(self._sources) >= self.settings.rooms:
                raise OverloadedError(f"{len(self._sources)} rooms are live on the prefill rank; try again later")
            return SourceRoom(room=key.room)
        if session.peer in room.transfers:
            raise RemoteProtocolError(f"room {key.room} is open already for another request: rooms must be unique")
        if room.transfers and session.hello is not None and room.group != session.hello.group:
            raise RemoteProtocolError(f"room {key.room} is open already for decode group {room.group!r}")
        return room

    def _on_chunk_submitted(self, event: ChunkSubmitted) -> None:
        room = self._sources.get(event.room)
        if room is None or room.error is not None:
            return
        room.chunks.append(event.chunk)
        self.tell(
            event.room, f"chunk to token {event.chunk.token_stop} submitted{', the last' if event.chunk.last else ''}"
        )
        for transfer in list(room.transfers.values()):
            self._step(transfer, On.CHUNK_SUBMITTED, event.chunk)
        self._touch(room)

    # ---- target rooms -------------------------------------------------------------------------------------------

    def _on_receiver_opened(self, event: ReceiverOpened) -> None:
        room = self._targets[event.room] = TargetRoom(room=event.room, sources=event.sources)
        self.tell(event.room, f"receiver opened, to be filled from {', '.join(event.sources)}")
        self._timers.set(room, "deadline", self._now + self.settings.bootstrap_seconds)
        for address in event.sources:
            session = self._dialed.get(address)
            if session is None and address not in self._dialing:
                self._dialing.add(address)
                self.emit(Dial(address))
            elif session is not None and session.state in (SessionState.REFUSED, SessionState.LOST):
                self._fail_room(room, session.error or PeerLostError("the peer is lost", peer=session.name))
        self._touch(room)

    def _on_grants_published(self, event: GrantsPublished) -> None:
        room = self._targets.get(event.room)
        if room is None or room.error is not None:
            return
        room.grants, room.token_count = event.grants, event.token_count
        self._try_open(room)
        self._touch(room)

    def _try_open(self, room: TargetRoom) -> None:
        """Open the room with every source rank, once it is granted and all sessions are ready."""
        if room.grants is None or room.transfers or room.error is not None:
            return
        sessions = [self._dialed.get(address) for address in room.sources]
        ready = [s for s in sessions if s is not None and s.state is SessionState.READY]
        if len(ready) < len(sessions):
            return
        try:
            self._check_group(ready)
            manifests = [parts_of(cast(PairPlan, session.pair), room.grants) for session in ready]
        except (IncompatibleError, LayoutError) as error:
            self._fail_room(room, error)
            return
        key = TransferKey(room.room, next(self._transfer_ids))
        for session, parts in zip(ready, manifests, strict=True):
            wanted = {part.part.pool for part in parts}
            grants = tuple(grant for grant in room.grants if grant.pool in wanted)
            incoming = Incoming(grants=grants, parts=parts, token_count=room.token_count)
            transfer = Transfer(key, session.peer, self, incoming=incoming)
            room.transfers[session.peer] = self._transfers[session.peer, "target", key] = transfer
            table.begin(transfer, self._now)
        self._timers.cancel(room, "deadline")
        self.tell(room.room, f"{key} opened with {len(ready)} source ranks")

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
        check_coverage([hello.layout for hello in hellos], self.identity.layout)
        self._covered[instances] = None
        if len(self._covered) > self.settings.sessions:
            self._covered.popitem(last=False)

    # ---- both sides of a room -------------------------------------------------------------------------------------

    def _on_abort_requested(self, event: AbortRequested) -> None:
        room: Room | None
        room = self._sources.get(event.room) if event.role == "source" else self._targets.get(event.room)
        if room is None or room.status().poll in (KVPoll.Failed, KVPoll.Success):
            return
        self._fail_room(room, event.error)

    def _on_write_settled(self, event: WriteSettled) -> None:
        transfer = self._writes.pop(event.write, None)
        if transfer is not None:
            self._step(transfer, On.WRITE_SETTLED, event.write)

    def _on_write_broken(self, event: WriteBroken) -> None:
        transfer = self._writes.get(event.write)
        if transfer is not None:
            self._step(transfer, On.WRITE_BROKEN, event.error)

    def _on_shutdown(self, event: ShutdownRequested) -> None:
        for room in self._all_rooms():
            if room.status().poll not in (KVPoll.Failed, KVPoll.Success):
                self._fail_room(room, AbortedError(f"this rank is closing: {event.reason}", room=room.room))

    def _fail_room(self, room: Room, error: KVBatonError) -> None:
        """First root cause wins; every transfer that still runs is given up with it."""
        if room.error is None:
            error.room = room.room if error.room is None else error.room
            room.error = error
            self.tell(room.room, f"failed: {error}")
        for transfer in list(room.transfers.values()):
            self._step(transfer, On.GIVEN_UP, room.error)
        self._touch(room)

    def _all_rooms(self) -> list[Room]:
        return [*self._sources.values(), *self._targets.values()]

    def _touch(self, room: Room) -> None:
        self._touched[id(room)] = room

    def _settle_rooms(self) -> None:
        """Draw the conclusions for every room that something happened to, and report what changed."""
        while self._touched:
            _, room = self._touched.popitem()
            if room.error is None:
                failed = next((t.error for t in room.transfers.values() if t.error is not None), None)
                if failed is not None:
                    self._fail_room(room, failed)
                    continue
            if isinstance(room, SourceRoom) and room.opened:
                self._timers.cancel(room, "deadline")
            self._report(room)
            if room.over:
                self._remove(room)

    def _report(self, room: Room) -> None:
        status: RoomStatus = room.status()
        if status != room.reported:
            room.reported = status
            role: Role = "source" if isinstance(room, SourceRoom) else "target"
            if role == "target" or (isinstance(room, SourceRoom) and room.has_sender):
                self.emit(Report(room.room, role, status))

    def _remove(self, room: Room) -> None:
        self._timers.cancel(room, "deadline")
        if isinstance(room, TargetRoom):
            self._targets.pop(room.room, None)
            return
        self._sources.pop(room.room, None)
        if not room.has_sender and room.error is not None:
            self._recent_failures[room.room] = room.error
            if len(self._recent_failures) > MAX_RECENT_FAILURES:
                self._recent_failures.popitem(last=False)

    # ---- transfers ----------------------------------------------------------------------------------------------

    def _step(self, transfer: Transfer, on: On, detail: object) -> None:
        before = transfer.state
        try:
            table.step(transfer, on, self._now, detail)
        finally:
            self.counters[f"{before.value}:{on.value}"] += 1
            if transfer.state is State.CLOSED and before is not State.CLOSED:
                self._bury_transfer(transfer)
            room = (self._sources if transfer.outgoing is not None else self._targets).get(transfer.key.room)
            if room is not None and room.transfers.get(transfer.peer) is transfer:
                self._touch(room)

    def _bury_transfer(self, transfer: Transfer) -> None:
        """Move a closed transfer to the tombstones. What is forgotten is refused from then on, never taken for new."""
        address = (transfer.peer, _role(transfer), transfer.key)
        self._transfers.pop(address, None)
        self._tombstones[address] = transfer
        if transfer.quarantined:
            self.counters["leases_released_by_policy"] += 1
        if len(self._tombstones) > self.settings.tombstones:
            (peer, role, key), _ = self._tombstones.popitem(last=False)
            if role == "source":
                self._refuse_below(peer, key.id)

    def _refuse_below(self, peer: str, transfer_id: int) -> None:
        """Never accept an Open up to this id again: the target was told that nothing of it is in flight."""
        if (peer, "source") in self._peers:
            self._forgotten_below[peer] = max(self._forgotten_below.get(peer, 0), transfer_id)

    def _on_timer(self, owner: Timed, name: str) -> None:
        if isinstance(owner, Session):
            owner.timer(name, self._now)
        elif isinstance(owner, Transfer):
            self._step(owner, On.DEADLINE_REACHED if name == "deadline" else On.RETRY_DUE, None)
        else:
            self._fail_room(owner, self._bootstrap_error(owner))

    def _bootstrap_error(self, room: Room) -> KVBatonError:
        seconds = self.settings.bootstrap_seconds
        return ExpiredError(f"not started within {seconds:g} s: {self._waits_for(room)}", room=room.room)

    def _waits_for(self, room: Room) -> str:
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
        states = (f"{a}: {self._dialed[a].state.value if a in self._dialed else 'not dialled'}" for a in room.sources)
        return "sessions: " + ", ".join(states)


def _role(transfer: Transfer) -> Role:
    return "source" if transfer.outgoing is not None else "target"

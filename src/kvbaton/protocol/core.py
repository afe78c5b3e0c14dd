"""The protocol core of one rank: takes events, routes them to sessions, transfers and rooms, gives back effects.

``handle(event, now)`` is the only mutator; it returns what is to be done, in order. ``next_deadline()`` says when to
call it again with :class:`TimePassed`. Messages are read before deadlines are judged, because the caller hands over
its inbox first. A peer's mistake never raises: it is counted, told in the room's story, and answered where that helps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import cast

from kvbaton.control.base import LinkId
from kvbaton.errors import InternalError, MessageError, PeerLostError, RemoteProtocolError, from_code
from kvbaton.plan.staging import StagingPool
from kvbaton.protocol.context import Context
from kvbaton.protocol.effects import Effect, PeerLost
from kvbaton.protocol.events import (
    AbortRequested,
    AgentReplaced,
    ChunkSubmitted,
    ChunksWithdrawn,
    Dialed,
    DialFailed,
    Event,
    GrantsPublished,
    LinkRefused,
    LinkUp,
    MessageArrived,
    PeerFenced,
    PeerPrepared,
    PeerQuiesced,
    PeerUnprepared,
    ReceiverOpened,
    SenderOpened,
    ShutdownRequested,
    TimePassed,
    WriteBroken,
    WriteSettled,
    WriteUnderWay,
)
from kvbaton.protocol.messages import (
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
    UnknownPeer,
    Verdict,
    clip,
    decode,
)
from kvbaton.protocol.peers import Peers
from kvbaton.protocol.room import SourceRoom, TargetRoom
from kvbaton.protocol.rooms import Rooms
from kvbaton.protocol.session import Identity, Session, SessionState
from kvbaton.protocol.settings import Settings
from kvbaton.protocol.trace import TraceLine
from kvbaton.protocol.transfer import On, Transfer
from kvbaton.protocol.transfers import Transfers

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
_MESSAGES_OF_TRANSFERS = {**_MESSAGES_TO_SOURCE, **_MESSAGES_TO_TARGET}


class Core:
    """See the module."""

    def __init__(self, identity: Identity, settings: Settings) -> None:
        self._context = Context(identity, settings)
        self._context.session_needed = self._session_needed
        self._peers = Peers(self._context, self._session_changed)
        self._transfers = Transfers(self._context, self._peers, self._transfer_changed)
        self._rooms = Rooms(self._context, self._peers, self._transfers)
        self._context.queued = self._rooms.targets.queued
        self._handlers: dict[type, Callable[..., None]] = {
            Dialed: self._peers.on_dialed,
            DialFailed: self._on_dial_failed,
            LinkUp: self._peers.on_link_up,
            LinkRefused: self._peers.on_link_refused,
            PeerPrepared: self._peers.on_peer_prepared,
            PeerUnprepared: self._peers.on_peer_unprepared,
            AgentReplaced: self._peers.on_agent_replaced,
            PeerFenced: self._transfers.on_peer_fenced,
            PeerQuiesced: self._transfers.on_peer_quiesced,
            WriteUnderWay: self._transfers.on_write_under_way,
            WriteSettled: self._transfers.on_write_settled,
            WriteBroken: self._transfers.on_write_broken,
            SenderOpened: self._rooms.on_sender_opened,
            ChunkSubmitted: self._rooms.on_chunk_submitted,
            ChunksWithdrawn: self._rooms.on_chunks_withdrawn,
            ReceiverOpened: self._rooms.targets.on_receiver_opened,
            GrantsPublished: self._rooms.targets.on_grants_published,
            AbortRequested: self._rooms.on_abort_requested,
            ShutdownRequested: self._rooms.on_shutdown,
            MessageArrived: self._on_message,
            TimePassed: lambda _: None,
        }

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Apply one event. Deadlines are judged by TimePassed alone, which the caller feeds when its inbox is empty."""
        self._context.now = now
        self._handlers[type(event)](event)
        self._rooms.settle()
        while isinstance(event, TimePassed) and (due := self._context.timers.pop_due(now)) is not None:
            self._on_timer(*due)
            self._rooms.settle()
        return self._context.take_effects()

    def next_deadline(self) -> float | None:
        """When to call ``handle(TimePassed(), …)`` at the latest, in seconds of the caller's clock."""
        return self._context.timers.next()

    def farewell(self, reason: str) -> list[Effect]:
        """Goodbyes; only true, and only allowed, when the core is quiet. Not to a peer that has not proven yet that its
        writes to us have ended: it is still asked to."""
        if not self.quiet:
            raise InternalError("a farewell promises that no write is in flight")
        for session in self._peers.all():
            if session.peer and not self._transfers.any_with(session):
                goodbye = Goodbye(sender=self.instance, receiver=session.peer, reason=clip(reason))
                self._context.send_on(session.link, goodbye)
        return self._context.take_effects()

    # ---- what may be known from outside -------------------------------------------------------------------------

    @property
    def identity(self) -> Identity:
        return self._context.identity

    @property
    def instance(self) -> str:
        return self._context.instance

    @property
    def counters(self) -> Counter[str]:
        return self._context.counters

    @property
    def receiving(self) -> bool:
        """Whether a peer may be writing our memory now."""
        return self._transfers.receiving

    @property
    def moving(self) -> bool:
        """Whether a peer is writing our memory now and has said that it needs our help."""
        return self._transfers.moving

    @property
    def quiet(self) -> bool:
        """No write of ours is in flight."""
        return self._transfers.quiet

    @property
    def live_rooms(self) -> int:
        return len(self._rooms.all())

    @property
    def quarantined(self) -> int:
        """Rooms that have failed while a peer may still write their units."""
        return sum(1 for room in self._rooms.all() if room.error is not None and room.reported.leased)

    def wants_chunks(self, room: int) -> bool:
        """Whether a chunk for this room would still be used."""
        return self._rooms.wants_chunks(room)

    def sessions(self) -> list[tuple[str, str, str]]:
        """(peer, our role, state) of every session, for people."""
        return [(session.name, session.role, session.state.value) for session in self._peers.all()]

    @property
    def staging(self) -> StagingPool:
        """The slots of our staging memory, shared with the driver."""
        return self._rooms.staging

    def staging_lessee(self, slot: int) -> Transfer | None:
        """The transfer that one of our staging slots is leased to; None if it is free."""
        return next((t for t in self._transfers.live() if t.incoming is not None and t.incoming.has_slot(slot)), None)

    def plan_digest(self, peer: str, role: Role) -> str | None:
        """Digest of the plan that this rank, as ``role``, has agreed on with a peer; None without a session."""
        session = self._peers.of(peer, role)
        return session.pair.digest if session is not None and session.pair is not None else None

    def trace_and_state(self, room: int) -> list[TraceLine]:
        """What happened to a room, and last what it waits for now."""
        return [*self.trace(room), *(TraceLine(self._context.now, text) for text in self.state_of(room))]

    def trace(self, room: int) -> list[TraceLine]:
        """What happened to a room, as far as it is remembered."""
        return self._context.trace.of(room)

    def state_of(self, room: int) -> list[str]:
        """What a room is and waits for now, one line for each role of this rank in it; none when it is over."""
        return [
            f"now {record.status().poll.name}: {self._rooms.waits_for(record)}" for record in self._rooms.find(room)
        ]

    def sizes(self) -> dict[str, int]:
        """Entries of every table, by name: each is bounded, and but for the memories (tombstones, stories) returns to
        zero with the last room. For people who look for leaks."""
        return {
            **self._peers.sizes(),
            **self._transfers.sizes(),
            **self._rooms.sizes(),
            "repeating": self._context.repeating,
            "stories": len(self._context.trace),
            "links_answered_unasked": len(self._context.unasked),
            "timers": len(self._context.timers),
            "timer_entries": self._context.timers.entries,
        }

    def check_invariants(self) -> None:
        """Raise InternalError where the tables contradict each other. For tests and simulators."""
        self._transfers.check_invariants()
        self._rooms.check_invariants()

    # ---- routing ------------------------------------------------------------------------------------------------

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
                self._context.record(error.room, f"forbidden: {error}")

    def _route(self, link: LinkId, message: AnyMessage) -> None:
        if isinstance(message, Hello):
            self._peers.on_hello(link, message)
            return
        now = self._context.now
        session = self._peers.on_link(link)
        if isinstance(message, UnknownPeer):
            if session is not None and session.role == "target" and message.receiver in ("", self.instance):
                session.say_hello_again(now)
            return
        if session is None or session.peer != message.sender or message.receiver != self.instance:
            self.counters["messages_from_strangers"] += 1
            if self._context.unasked.take(link, now):
                self._context.send_on(link, UnknownPeer(sender=self.instance, receiver=message.sender))
            return
        session.on_message(now)
        on = _MESSAGES_OF_TRANSFERS.get(type(message))
        if on is not None:
            self._on_transfer_message(session, on, message)
        elif isinstance(message, Ping):
            self._context.send_on(link, Pong(sender=self.instance, receiver=message.sender))
            if session.role == "source":
                self._rooms.on_queued(session, message.queued)
        elif isinstance(message, Pong):
            pass
        elif isinstance(message, Verdict):
            session.on_verdict(message, now)
        elif isinstance(message, Goodbye):
            session.end(PeerLostError(f"the peer has closed: {message.reason}", peer=session.name), now)

    def _on_transfer_message(self, session: Session, on: On, message: AnyMessage) -> None:
        key, role = cast(Open, message).key, session.role
        if (type(message) in _MESSAGES_TO_SOURCE) != (role == "source"):
            raise RemoteProtocolError(f"{on.value} goes the other way on this link", peer=session.name, room=key.room)
        transfer = self._transfers.find(session.peer, role, key)
        if transfer is not None:
            self._transfers.step(transfer, on, message)
        elif isinstance(message, Open):
            self._rooms.on_open(session, message)
        else:
            self._transfers.answer_unknown(session, message, key)
            if isinstance(message, Abort):
                error = from_code(message.code, message.reason, peer=session.peer, room=key.room)
                self._rooms.abort_unopened(session, key.room, error)

    def _on_dial_failed(self, event: DialFailed) -> None:
        self._peers.on_dial_failed(event)
        self._rooms.targets.dial_failed(event.address, event.error)

    def _session_changed(self, session: Session) -> None:
        """A session entered a state: transfers and rooms that depend on it learn it at once."""
        error = session.error or PeerLostError("the peer is gone", peer=session.name)
        if session.state in (SessionState.LOST, SessionState.GONE):
            self._context.emit(PeerLost(session.peer, session.address, error))
        if session.state is SessionState.LOST:
            self._transfers.step_peer(session, On.PEER_LOST, error)
        elif session.state is SessionState.GONE:
            self._transfers.step_peer(session, On.PEER_GONE, error)
        if session.role == "target":
            self._rooms.targets.session_changed(session)
        else:
            self._rooms.staging.sends = True

    def _session_needed(self, session: Session) -> bool:
        return self._rooms.targets.needs(session) or self._transfers.any_with(session)

    def _transfer_changed(self, transfer: Transfer) -> None:
        self._rooms.transfer_changed(transfer)

    def _on_timer(self, owner: object, name: str) -> None:
        if isinstance(owner, Session):
            owner.timer(name, self._context.now)
        elif isinstance(owner, Transfer):
            self._transfers.step(owner, On.DEADLINE_REACHED if name == "deadline" else On.RETRY_DUE)
        elif isinstance(owner, SourceRoom | TargetRoom):
            self._rooms.expire(owner)

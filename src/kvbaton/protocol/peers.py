"""All sessions of this rank: by link, by the address that was dialled, by the peer's instance."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

from kvbaton.control.base import LinkId
from kvbaton.errors import PeerLostError
from kvbaton.protocol.effects import CloseLink, Dial, Effect, FencePeer
from kvbaton.protocol.events import AgentReplaced, Dialed, DialFailed, LinkRefused, LinkUp, PeerPrepared, PeerUnprepared
from kvbaton.protocol.messages import AnyMessage, Hello, Role
from kvbaton.protocol.session import Identity, Session, SessionState
from kvbaton.protocol.settings import Settings
from kvbaton.protocol.surroundings import Surroundings


class Peers:
    """See the module.

    Args:
        on_change: called for each state that a session enters, before anything else happens.
        is_needed: whether a room or a lease of ours depends on a session.
    """

    def __init__(
        self, around: Surroundings, on_change: Callable[[Session], None], is_needed: Callable[[Session], bool]
    ) -> None:
        self._around = around
        self._on_change = on_change
        self.is_needed = is_needed
        self._dialing: set[str] = set()
        self._by_link: dict[LinkId, Session] = {}
        self._by_address: dict[str, Session] = {}
        self._by_instance: dict[tuple[str, Role], Session] = {}
        self._replaced: OrderedDict[str, None] = OrderedDict()
        self._last_at: OrderedDict[str, str] = OrderedDict()  # instance that answered last, by address

    # ---- lookups ------------------------------------------------------------------------------------------------

    def on_link(self, link: LinkId) -> Session | None:
        return self._by_link.get(link)

    def at(self, address: str) -> Session | None:
        return self._by_address.get(address)

    def of(self, instance: str, role: Role) -> Session | None:
        return self._by_instance.get((instance, role))

    def all(self) -> list[Session]:
        return list({id(s): s for s in (*self._by_link.values(), *self._by_instance.values())}.values())

    def sizes(self) -> dict[str, int]:
        return {
            "sessions": len(self.all()),
            "sessions_by_link": len(self._by_link),
            "sessions_by_address": len(self._by_address),
            "sessions_by_instance": len(self._by_instance),
            "dialing": len(self._dialing),
            "instances_replaced": len(self._replaced),
            "instances_at_addresses": len(self._last_at),
        }

    def dial(self, address: str) -> None:
        """Begin a session with whoever listens at ``address``, unless there is one."""
        if address not in self._by_address and address not in self._dialing:
            self._dialing.add(address)
            self._around.emit(Dial(address))

    # ---- events -------------------------------------------------------------------------------------------------

    def on_dialed(self, event: Dialed) -> None:
        self._dialing.discard(event.address)
        session = Session(self, event.link, "target", event.address, self._last_at.get(event.address, ""))
        self._by_link[event.link] = self._by_address[event.address] = session
        session.greet(self._around.now)

    def on_dial_failed(self, event: DialFailed) -> None:
        self._dialing.discard(event.address)

    def on_link_up(self, event: LinkUp) -> None:
        session = self._by_link.get(event.link)
        if session is not None and session.role == "target":
            session.greet_again(self._around.now)

    def on_link_refused(self, event: LinkRefused) -> None:
        session = self._by_link.get(event.link)
        if session is not None and session.role == "target":
            session.bury(
                PeerLostError(
                    f"nobody listens at {session.address} any more: the prefill rank is gone, send the request again",
                    peer=session.name,
                ),
                self._around.now,
            )

    def on_peer_prepared(self, event: PeerPrepared) -> None:
        session = self._by_instance.get((event.peer, "source"))
        if session is not None:
            session.prepared(self._around.now)

    def on_peer_unprepared(self, event: PeerUnprepared) -> None:
        session = self._by_instance.get((event.peer, "source"))
        if session is not None:
            session.unprepared(event.error, self._around.now)

    def on_agent_replaced(self, event: AgentReplaced) -> None:
        """Sources that write to us reach our memory no more until they have our new metadata: say Hello again."""
        self._around.identity = replace(self._around.identity, agent_metadata=event.metadata)
        for session in self.all():
            if session.role == "target":
                session.greet_again(self._around.now)

    def on_hello(self, link: LinkId, hello: Hello) -> None:
        session = self._by_link.get(link)
        if session is not None and session.role == "target":
            self._on_answer(session, hello)
        elif hello.answers:
            self._around.counters["messages_from_strangers"] += 1
        else:
            self._on_greeting(link, session, hello)

    def _on_answer(self, session: Session, hello: Hello) -> None:
        if hello.answers != self._around.instance:
            self._around.counters["messages_from_strangers"] += 1
            return
        known = self._by_instance.get((hello.sender, "target"))
        if known is not None and known is not session and known.state is SessionState.READY:
            self._around.counters["messages_replayed"] += 1  # a rank has one address: this one repeats what it heard
            return
        if session.hello is not None and session.peer != hello.sender:
            successor = Session(self, session.link, "target", session.address)
            self._by_link[session.link] = self._by_address[session.address] = successor
            session.bury(
                PeerLostError(
                    f"the prefill rank was replaced by {hello.sender} at its address: send the request again",
                    peer=session.name,
                ),
                self._around.now,
            )
            session = successor
        self._last_at[session.address] = hello.sender
        if len(self._last_at) > self._around.settings.sessions:
            self._last_at.popitem(last=False)
        session.answered(hello, self._around.now)

    def _on_greeting(self, link: LinkId, session: Session | None, hello: Hello) -> None:
        known = self._by_instance.get((hello.sender, "source"))
        moves = known is not None and known.link != link
        if hello.sender in self._replaced or (known is not None and moves and not self._may_move(known, hello)):
            self._around.counters["messages_replayed"] += 1
            return
        if not self._around.unasked.take(link, self._around.now):
            self._around.counters["messages_unanswered"] += 1
            return
        if known is not None and moves:
            self._by_link.pop(known.link, None)
            known.link = link
            self._by_link[link] = known
            session = known
        if session is not None and session.peer != hello.sender:
            session.bury(PeerLostError(f"replaced by {hello.sender} on its link", peer=session.name), self._around.now)
            session = None
        if session is None:
            self._lose_predecessor(hello)
            if len(self._by_link) >= self._around.settings.sessions and not self._make_way():
                self._around.counters["sessions_refused"] += 1
                return
            session = Session(self, link, "source")
            self._by_link[link] = self._by_instance[hello.sender, "source"] = session
        session.heard(self._around.now)
        session.greeted(hello, self._around.now)

    def _may_move(self, known: Session, hello: Hello) -> bool:
        """Whether a greeting from another link is of the peer itself: newer than the last one, and meant for us."""
        meant = hello.receiver == self._around.instance or known.state is SessionState.LOST
        return hello.greeting > known.greeting and meant

    def _make_way(self) -> bool:
        """The table is full: whoever has been greeting, refused or lost for longest goes. False if all are ready."""
        waiting = (SessionState.PREPARING, SessionState.REFUSED, SessionState.LOST)
        oldest = next((s for s in self._by_link.values() if s.role == "source" and s.state in waiting), None)
        if oldest is not None:
            oldest.bury(PeerLostError("made way for another peer", peer=oldest.name), self._around.now)
        return oldest is not None

    def _lose_predecessor(self, hello: Hello) -> None:
        """A new process stands where another one stood in its group: the other one will not be heard of again."""
        place = (hello.group, hello.coordinates)
        for (_, role), other in list(self._by_instance.items()):
            if role == "source" and other.hello and (other.hello.group, other.hello.coordinates) == place:
                self._replaced[other.peer] = None  # its greetings, late or recorded, count no more
                if len(self._replaced) > self._around.settings.sessions:
                    self._replaced.popitem(last=False)
                other.lose(PeerLostError(f"replaced by {hello.sender}", peer=other.name), self._around.now)

    def fenced(self, instance: str) -> None:
        """Our writes towards a peer were cut off. If it lives, it will be reachable again."""
        session = self.of(instance, "source")
        if session is not None and session.state is SessionState.READY:
            session.cut_off(self._around.now)

    # ---- surroundings of sessions (Desk) --------------------------------------------------------------------------

    @property
    def identity(self) -> Identity:
        return self._around.identity

    @property
    def settings(self) -> Settings:
        return self._around.settings

    def emit(self, effect: Effect) -> None:
        self._around.emit(effect)

    def send_on(self, link: LinkId, message: AnyMessage) -> None:
        self._around.send_on(link, message)

    def mint_greeting(self) -> int:
        return next(self._around.serial)

    def set_session_timer(self, session: Session, name: str, when: float) -> None:
        self._around.timers.set(session, name, when)

    def cancel_session_timers(self, session: Session) -> None:
        self._around.timers.cancel(session, "deadline", "retry", "heartbeat", "forget")

    def session_changed(self, session: Session) -> None:
        if session.state is SessionState.READY:
            self._by_instance[session.peer, session.role] = session
        if session.state is SessionState.GONE:
            self._drop(session)
        self._on_change(session)

    def _drop(self, session: Session) -> None:
        self.cancel_session_timers(session)
        if self._by_link.get(session.link) is session:
            del self._by_link[session.link]
            if session.role == "target":
                self._around.emit(CloseLink(session.link))
        if self._by_address.get(session.address) is session:
            del self._by_address[session.address]
        if self._by_instance.get((session.peer, session.role)) is session:
            del self._by_instance[session.peer, session.role]
        if session.role == "source" and session.peer:
            self._around.emit(FencePeer(session.peer))

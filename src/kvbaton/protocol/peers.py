"""All sessions of this rank: by link, by the address that was dialled, by the peer's instance.

Three names for one peer, none of which is enough. A *link* is a connection, and another process may answer on it after
a restart. An *address* is where we dialled, and outlives its process. An *instance* is one process, minted when it
starts; it is the only name that a write may depend on. So messages are routed by link, rooms find their sources by
address, transfers are kept by instance, and each index is changed in one method only.

Who replaces whom:

- Target side, *another instance answers at an address*: the old process is gone for certain, since it held the address.
  Its session ends (its writes are over), and a new session takes the link and the address.
- Source side, *a known instance says hello on another link*: it has reconnected. The session moves, but only if the
  ``Hello`` is newer than the last one (its hello sequence has grown) and names us as its receiver; otherwise it is a
  recorded or delayed copy, and moving to it would hand the session to whoever replays messages.
- Source side, *a new instance stands at the place (group and coordinates) of another*: the other one is lost, not gone:
  a place is what the peer says of itself. Its later hellos count no more.
- *An instance that is ready at one address answers at another*: ignored, a rank has one address.

What we say first. A ``Hello`` that answers ours must name our instance, or it answers somebody else. A message that
fits no session is answered with ``UnknownPeer`` at most a few times a second for each link (``unasked``), so that
nobody can make us send more than he does.

Which sessions go. A target keeps dialling a lost peer for as long as a room waits for it or a lease depends on its
word, and forgets it some time after; so do sources with targets that stay away. When the table is full, those that have
been greeting, refused or lost for longest make way; sessions that are ready never do.

The memory behind a peer changes too: an agent that was replaced to stop a write has new metadata, which a new ``Hello``
carries on every session as a target (:meth:`Peers.on_agent_replaced`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

from kvbaton.control.base import LinkId
from kvbaton.errors import PeerLostError
from kvbaton.protocol.context import Context
from kvbaton.protocol.effects import CloseLink, Dial, FencePeer
from kvbaton.protocol.events import AgentReplaced, Dialed, DialFailed, LinkRefused, LinkUp, PeerPrepared, PeerUnprepared
from kvbaton.protocol.messages import Hello, Role
from kvbaton.protocol.session import Session, SessionState


class Peers:
    """See the module. ``on_change`` is called for each state that a session enters, before anything else happens."""

    def __init__(self, context: Context, on_change: Callable[[Session], None]) -> None:
        self._context = context
        self._on_change = on_change
        context.session_changed = self._session_changed
        context.session_link = self._link_of
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

    def _link_of(self, instance: str, role: Role) -> LinkId | None:
        session = self.of(instance, role)
        return session.link if session is not None else None

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
            self._context.emit(Dial(address))

    # ---- events -------------------------------------------------------------------------------------------------

    def on_dialed(self, event: Dialed) -> None:
        self._dialing.discard(event.address)
        session = Session(self._context, event.link, "target", event.address, self._last_at.get(event.address, ""))
        self._by_link[event.link] = self._by_address[event.address] = session
        session.say_hello(self._context.now)

    def on_dial_failed(self, event: DialFailed) -> None:
        self._dialing.discard(event.address)

    def on_link_up(self, event: LinkUp) -> None:
        session = self._by_link.get(event.link)
        if session is not None and session.role == "target":
            session.say_hello_again(self._context.now)

    def on_link_refused(self, event: LinkRefused) -> None:
        session = self._by_link.get(event.link)
        if session is not None and session.role == "target":
            session.end(
                PeerLostError(
                    f"nobody listens at {session.address} any more: the prefill rank is gone, send the request again",
                    peer=session.name,
                ),
                self._context.now,
            )

    def on_peer_prepared(self, event: PeerPrepared) -> None:
        session = self._by_instance.get((event.peer, "source"))
        if session is not None:
            session.prepared(self._context.now)

    def on_peer_unprepared(self, event: PeerUnprepared) -> None:
        session = self._by_instance.get((event.peer, "source"))
        if session is not None:
            session.unprepared(event.error, self._context.now)

    def on_agent_replaced(self, event: AgentReplaced) -> None:
        """Sources that write to us reach our memory no more until they have our new metadata: say Hello again."""
        self._context.identity = replace(self._context.identity, agent_metadata=event.metadata)
        for session in self.all():
            if session.role == "target":
                session.say_hello_again(self._context.now)

    def on_hello(self, link: LinkId, hello: Hello) -> None:
        session = self._by_link.get(link)
        if session is not None and session.role == "target":
            self._on_answer(session, hello)
        elif hello.answers:
            self._context.counters["messages_from_strangers"] += 1
        else:
            self._on_target_hello(link, session, hello)

    def _on_answer(self, session: Session, hello: Hello) -> None:
        if hello.answers != self._context.instance:
            self._context.counters["messages_from_strangers"] += 1
            return
        known = self._by_instance.get((hello.sender, "target"))
        if known is not None and known is not session and known.state is SessionState.READY:
            self._context.counters["messages_replayed"] += 1  # a rank has one address: this one repeats what it heard
            return
        if session.hello is not None and session.peer != hello.sender:
            successor = Session(self._context, session.link, "target", session.address)
            self._by_link[session.link] = self._by_address[session.address] = successor
            session.end(
                PeerLostError(
                    f"the prefill rank was replaced by {hello.sender} at its address: send the request again",
                    peer=session.name,
                ),
                self._context.now,
            )
            session = successor
        self._last_at[session.address] = hello.sender
        if len(self._last_at) > self._context.settings.sessions:
            self._last_at.popitem(last=False)
        session.answered(hello, self._context.now)

    def _on_target_hello(self, link: LinkId, session: Session | None, hello: Hello) -> None:
        known = self._by_instance.get((hello.sender, "source"))
        moves = known is not None and known.link != link
        if hello.sender in self._replaced or (known is not None and moves and not self._may_move(known, hello)):
            self._context.counters["messages_replayed"] += 1
            return
        if not self._context.unasked.take(link, self._context.now):
            self._context.counters["messages_unanswered"] += 1
            return
        if known is not None and moves:
            self._by_link.pop(known.link, None)
            known.link = link
            self._by_link[link] = known
            session = known
        if session is not None and session.peer != hello.sender:
            session.end(PeerLostError(f"replaced by {hello.sender} on its link", peer=session.name), self._context.now)
            session = None
        if session is None:
            self._lose_predecessor(hello)
            if len(self._by_link) >= self._context.settings.sessions and not self._make_way():
                self._context.counters["sessions_refused"] += 1
                return
            session = Session(self._context, link, "source")
            self._by_link[link] = self._by_instance[hello.sender, "source"] = session
        session.on_message(self._context.now)
        session.on_hello(hello, self._context.now)

    def _may_move(self, known: Session, hello: Hello) -> bool:
        """Whether a greeting from another link is of the peer itself: newer than the last one, and meant for us."""
        meant = hello.receiver == self._context.instance or known.state is SessionState.LOST
        return hello.hello_sequence > known.hello_sequence and meant

    def _make_way(self) -> bool:
        """The table is full: whoever has been greeting, refused or lost for longest goes. False if all are ready."""
        waiting = (SessionState.PREPARING, SessionState.REFUSED, SessionState.LOST)
        oldest = next((s for s in self._by_link.values() if s.role == "source" and s.state in waiting), None)
        if oldest is not None:
            oldest.end(PeerLostError("made way for another peer", peer=oldest.name), self._context.now)
        return oldest is not None

    def _lose_predecessor(self, hello: Hello) -> None:
        """A new process stands where another one stood in its group: the other one will not be heard of again."""
        place = (hello.group, hello.coordinates)
        for (_, role), other in list(self._by_instance.items()):
            if role == "source" and other.hello and (other.hello.group, other.hello.coordinates) == place:
                self._replaced[other.peer] = None  # its greetings, late or recorded, count no more
                if len(self._replaced) > self._context.settings.sessions:
                    self._replaced.popitem(last=False)
                other.lose(PeerLostError(f"replaced by {hello.sender}", peer=other.name), self._context.now)

    def fenced(self, instance: str) -> None:
        """Our writes towards a peer were cut off. If it lives, it will be reachable again."""
        session = self.of(instance, "source")
        if session is not None and session.state is SessionState.READY:
            session.cut_off(self._context.now)

    # ---- states of sessions ---------------------------------------------------------------------------------------

    def _session_changed(self, session: Session) -> None:
        if session.state is SessionState.READY:
            self._by_instance[session.peer, session.role] = session
        if session.state is SessionState.GONE:
            self._drop(session)
        self._on_change(session)

    def _drop(self, session: Session) -> None:
        self._context.cancel_timers(session)
        if self._by_link.get(session.link) is session:
            del self._by_link[session.link]
            if session.role == "target":
                self._context.emit(CloseLink(session.link))
        if self._by_address.get(session.address) is session:
            del self._by_address[session.address]
        if self._by_instance.get((session.peer, session.role)) is session:
            del self._by_instance[session.peer, session.role]
        if session.role == "source" and session.peer:
            self._context.emit(FencePeer(session.peer))

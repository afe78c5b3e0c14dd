"""What this rank knows of one peer instance: greeting, verdict, heartbeat, loss, proof of death.

A session is directed: its *role* is what we are in it. The target dials; the source answers::

    target:  GREETING → JUDGING → READY            source:  PREPARING → READY
    both:    → REFUSED (told to both)    → LOST (silent; proves nothing)    → GONE (proof: writes are over)

- GREETING   target: Hello sent, no answer yet; repeated
- JUDGING    target: the peer's Hello fits, its verdict is to come
- PREPARING  source: the peer's Hello fits, the transport builds its tables
- READY      transfers may run
- REFUSED    the pairing cannot work; the reason is kept for every request that asks. Where the transport failed, the
  next request begins the greeting again: what it lacked (a file descriptor, a route) may be there now
- LOST       no sign of life for ``silence_seconds``, or it never answered; memory may still be written. Not at once
  where we ourselves stood still, as all ranks of a machine that was paused did: the peer is asked first
- GONE       the instance is fenced: its process closed, died, or another one answers at its address. Or nobody needs
  the session any more: LOST or REFUSED for a while, and no room or lease of ours depends on the peer

A session of a restarted peer is a new session: the instance id is minted when a process starts. The target of a LOST
peer keeps pinging; a sign of life starts the greeting again. A target's pings name the rooms that its engine has in its
queue: they wait at the source for as long as it goes on saying so. This module decides states and messages; what a
change means for transfers is the core's business, told through ``Context.session_changed``.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from msgspec import structs

from kvbaton.control.base import LinkId
from kvbaton.errors import IncompatibleError, KVBatonError, LayoutError, PeerLostError, TransportError, from_code
from kvbaton.layout import CacheLayout, Coordinates
from kvbaton.plan.compatibility import differences
from kvbaton.plan.costs import Costs
from kvbaton.plan.pair import PairPlan, pair_plan
from kvbaton.plan.staging import StagedPart, stage
from kvbaton.plan.verify import check_bounds
from kvbaton.protocol.context import Context
from kvbaton.protocol.effects import PreparePeer
from kvbaton.protocol.messages import MAX_QUEUED, PROTOCOL_VERSION, Hello, Ping, Role, Verdict, clip


class SessionState(enum.Enum):
    GREETING = "greeting"
    JUDGING = "judging"
    PREPARING = "preparing"
    READY = "ready"
    REFUSED = "refused"
    LOST = "lost"
    GONE = "gone"


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """Who we are: what our Hello says."""

    instance: str
    group: str
    group_size: int
    coordinates: Coordinates
    layout: CacheLayout
    agent_metadata: bytes
    transport: str
    machine: str = ""

    def hello(self, answers: str = "", hello_sequence: int = 0, receiver: str = "") -> Hello:
        return Hello(
            sender=self.instance,
            version=PROTOCOL_VERSION,
            group=self.group,
            group_size=self.group_size,
            coordinates=self.coordinates,
            layout=self.layout,
            agent_metadata=self.agent_metadata,
            transport=self.transport,
            answers=answers,
            hello_sequence=hello_sequence,
            receiver=receiver,
            machine=self.machine,
        )


class Session:
    """See the module. ``error`` says why the session is REFUSED, LOST or GONE."""

    def __init__(self, context: Context, link: LinkId, role: Role, address: str = "", expected: str = "") -> None:
        self.context = context
        self.link = link
        self.role = role
        self.address = address
        self.expected = expected  # who stood at the address when we last heard of it
        self.state = SessionState.GREETING if role == "target" else SessionState.PREPARING
        self.hello: Hello | None = None
        self.pair: PairPlan | None = None
        self.staged: tuple[StagedPart | None, ...] = ()
        self.error: KVBatonError | None = None
        self.last_message_at = 0.0
        self._beats_at = 0.0
        self._excused = False  # the last heartbeat came late, and its silence was taken for ours
        self.hello_sequence = 0  # ours as a target, the latest that arrived as a source
        self._retry_pause = context.settings.retry_seconds
        self._awaits_life = False

    def __repr__(self) -> str:
        return f"<Session {self.role} of {self.peer or self.address}: {self.state.value}>"

    @property
    def peer(self) -> str:
        """The peer's instance; empty before it has said Hello."""
        return self.hello.sender if self.hello else ""

    @property
    def costs(self) -> Costs:
        """What choosing how bytes travel between the peer and us is decided with."""
        ours = self.context.identity
        near = self.hello is not None and bool(ours.machine) and self.hello.machine == ours.machine
        return self.context.settings.costs_of(ours.layout, near=near)

    @property
    def name(self) -> str:
        """The peer for people."""
        where = f" at {self.address}" if self.address else ""
        return f"{self.peer or 'nobody yet'}{where}"

    @property
    def refused_for_now(self) -> bool:
        """Refused because the transport failed, not because the two do not fit: worth another greeting."""
        return self.state is SessionState.REFUSED and isinstance(self.error, TransportError)

    # ---- target: dial, greet, judge ---------------------------------------------------------------------------

    def say_hello(self, now: float) -> None:
        """Say Hello, for the first time or again after a loss."""
        self._enter(SessionState.GREETING, now)
        self._retry_pause = self.context.settings.retry_seconds
        self.hello_sequence = self.context.mint()
        self.context.set_timer(self, "deadline", now + self.context.settings.handshake_timeout)
        self._send_hello(now)

    def say_hello_again(self, now: float) -> None:
        """The peer does not know us, or the link is new: another process may be behind it."""
        if self.state is not SessionState.GONE:
            self.say_hello(now)

    def _send_hello(self, now: float) -> None:
        self._say_hello()
        self.context.set_timer(self, "retry", now + self._retry_pause)
        self._retry_pause = min(2 * self._retry_pause, self.context.settings.retry_most_seconds)

    def _say_hello(self) -> None:
        hello = self.context.identity.hello(hello_sequence=self.hello_sequence, receiver=self.peer or self.expected)
        self.context.send_on(self.link, hello)

    def answered(self, hello: Hello, now: float) -> None:
        """The peer's Hello in answer to ours. Another instance than before must be a new session."""
        if self.state not in (SessionState.GREETING, SessionState.LOST, SessionState.REFUSED):
            return
        self.hello = hello
        try:
            self.pair = self._check_peer(hello, source=hello.layout, target=self.context.identity.layout)
        except (IncompatibleError, LayoutError) as error:
            self._refuse(error, now)
            return
        self._enter(SessionState.JUDGING, now)
        self.context.set_timer(self, "deadline", now + self.context.settings.handshake_timeout)
        self.context.set_timer(self, "retry", now + self._retry_pause)

    # ---- source: be greeted, prepare --------------------------------------------------------------------------

    def on_hello(self, hello: Hello, now: float) -> None:
        """A target's Hello: judge it, and prepare to write to it. A repeated Hello gets the same answer again, unless
        the target's agent was replaced since: then its memory is reached anew."""
        newest = hello.hello_sequence >= self.hello_sequence
        self.hello_sequence = max(self.hello_sequence, hello.hello_sequence)
        if self.hello is not None:
            if newest and hello.agent_metadata != self.hello.agent_metadata:
                self.hello = structs.replace(self.hello, agent_metadata=hello.agent_metadata)
                self.prepare_again(now)
            elif self.refused_for_now:
                self.prepare_again(now)
            elif self.state in (SessionState.READY, SessionState.REFUSED):
                self._answer()
            return
        self.hello = hello
        try:
            self.pair = self._check_peer(hello, source=self.context.identity.layout, target=hello.layout)
        except (IncompatibleError, LayoutError) as error:
            self._refuse(error, now)
            return
        self._enter(SessionState.PREPARING, now)
        self.context.set_timer(self, "deadline", now + self.context.settings.handshake_timeout)
        self.context.emit(PreparePeer(hello.sender, hello.agent_metadata, self.pair, self.staged))

    def prepared(self, now: float) -> None:
        if self.state is SessionState.PREPARING:
            self._enter(SessionState.READY, now)
            self._answer()

    def unprepared(self, error: KVBatonError, now: float) -> None:
        if self.state is SessionState.PREPARING:
            self._refuse(TransportError(f"cannot reach the decode rank's memory: {error.message}", peer=self.peer), now)

    def _answer(self) -> None:
        self.context.send_on(self.link, self.context.identity.hello(answers=self.peer))
        self._send_verdict()

    # ---- both -------------------------------------------------------------------------------------------------

    def _check_peer(self, hello: Hello, *, source: CacheLayout, target: CacheLayout) -> PairPlan:
        ours = self.context.identity
        for field, mine, theirs in (
            ("version", PROTOCOL_VERSION, hello.version),
            ("transport", ours.transport, hello.transport),
        ):
            if mine != theirs:
                raise IncompatibleError(
                    f"{field}: we have {mine!r}, the peer has {theirs!r}: start both sides with the same",
                    field=field,
                    ours=str(mine),
                    theirs=str(theirs),
                    peer=self.name,
                )
        hello.layout.validate()
        for difference in differences(source, target):
            raise difference if self.role == "source" else difference.swapped()
        pair = pair_plan(source, target)
        check_bounds(pair, source, target)
        try:
            self.staged = stage(pair, source, target)
        except IncompatibleError as error:
            raise error if self.role == "source" else error.swapped() from None
        return pair

    def _refuse(self, error: KVBatonError, now: float) -> None:
        error.peer = error.peer or self.name
        self.error = error
        self._enter(SessionState.REFUSED, now)
        if self.role == "source":
            self._answer()
        else:
            self._send_verdict()

    def _send_verdict(self) -> None:
        error = self.error
        digest = self.pair.digest if self.pair is not None else ""
        if error is None:
            verdict = Verdict(
                sender=self.context.identity.instance, receiver=self.peer, compatible=True, plan_digest=digest
            )
        else:
            swapped = error if isinstance(error, IncompatibleError) else None
            verdict = Verdict(
                sender=self.context.identity.instance,
                receiver=self.peer,
                compatible=False,
                code=error.code,
                reason=clip(error.message),
                field=clip(swapped.field) if swapped else "",
                ours=clip(swapped.ours) if swapped else "",
                theirs=clip(swapped.theirs) if swapped else "",
            )
        self.context.send_on(self.link, verdict)

    def on_verdict(self, verdict: Verdict, now: float) -> None:
        """The peer's verdict. The target answers a good one with its own; both must have the same plan."""
        if self.pair is None or self.state not in (SessionState.JUDGING, SessionState.READY):
            return
        if not verdict.compatible:
            self._refused_by_peer(verdict, now)
        elif verdict.plan_digest != self.pair.digest:
            self._refuse(
                IncompatibleError(
                    "plan: the two sides computed different plans from the same layouts; run the same kvbaton version",
                    field="plan_digest",
                    ours=self.pair.digest,
                    theirs=verdict.plan_digest,
                ),
                now,
            )
        elif self.state is SessionState.JUDGING:
            self._enter(SessionState.READY, now)
            self._send_verdict()

    def _refused_by_peer(self, verdict: Verdict, now: float) -> None:
        if verdict.field:
            self.error = IncompatibleError(
                verdict.reason, field=verdict.field, ours=verdict.theirs, theirs=verdict.ours, peer=self.name
            )
        else:
            self.error = from_code(verdict.code, verdict.reason, peer=self.name)
        self._enter(SessionState.REFUSED, now)

    def cut_off(self, now: float) -> None:
        """Our writes towards the peer were cut off, perhaps because it has died: ask for a sign of life, and reach for
        its memory again only then. Reaching for the dead costs UCX a descriptor each time."""
        self._enter(SessionState.PREPARING, now)
        self._awaits_life = True
        self.context.set_timer(self, "deadline", now + self.context.settings.handshake_timeout)
        self.context.send_on(self.link, Ping(sender=self.context.identity.instance, receiver=self.peer))

    def prepare_again(self, now: float) -> None:
        """The peer is alive: make its memory reachable again."""
        if self.hello is not None and self.pair is not None:
            self._enter(SessionState.PREPARING, now)
            self.context.set_timer(self, "deadline", now + self.context.settings.handshake_timeout)
            self.context.emit(PreparePeer(self.hello.sender, self.hello.agent_metadata, self.pair, self.staged))

    def on_message(self, now: float) -> None:
        """Any message of the peer arrived."""
        self.last_message_at = now
        if self._awaits_life:
            self.prepare_again(now)
        if self.state is not SessionState.LOST:
            return
        if self.role == "target":
            self.say_hello(now)
        else:
            self.prepare_again(now)

    def lose(self, error: KVBatonError, now: float) -> None:
        """No sign of life. The target goes on pinging, for the sign of life that ends a quarantine."""
        if self.state in (SessionState.LOST, SessionState.GONE):
            return
        self.error = error
        self._enter(SessionState.LOST, now)

    def end(self, error: KVBatonError, now: float) -> None:
        """Proof that no write of this instance can happen any more."""
        if self.state is SessionState.GONE:
            return
        self.error = error
        self._enter(SessionState.GONE, now)

    def timer(self, name: str, now: float) -> None:
        settings = self.context.settings
        if name == "retry":
            self._send_hello(now)
        elif name == "forget" and self.error is not None:
            if self.role == "target" and self.context.session_needed(self):
                self.context.set_timer(self, "forget", now + settings.announce_seconds)
            else:
                self.end(self.error, now)
        elif name == "deadline":
            self.lose(_unanswered(settings.handshake_timeout, self.name), now)
        elif name == "heartbeat":
            if self._stood_still(now):
                self.last_message_at = now
            if self.state is SessionState.READY and now - self.last_message_at >= settings.silence_seconds:
                silence = now - self.last_message_at
                self.lose(_silent(silence, self.name), now)
                return
            if self.peer:
                self._ping()
            else:
                self._say_hello()
            self._beat_later(now)

    def _beat_later(self, now: float) -> None:
        self._beats_at = now + self.context.settings.heartbeat_interval
        self.context.set_timer(self, "heartbeat", self._beats_at)

    def _stood_still(self, now: float) -> bool:
        """Whether the silence may be ours: the heartbeat itself comes a whole interval late, as after a pause of the
        machine, of which the peer is asked once before it is judged."""
        excused, self._excused = self._excused, now - self._beats_at >= self.context.settings.heartbeat_interval
        return self._excused and not excused

    def _ping(self) -> None:
        """With what our engine's queue has of the peer: a room may wait there for as long as we live."""
        queued = self.context.queued(self)
        for first in range(0, max(1, len(queued)), MAX_QUEUED):
            some = queued[first : first + MAX_QUEUED]
            ping = Ping(sender=self.context.identity.instance, receiver=self.peer, queued=some)
            self.context.send_on(self.link, ping)

    def _enter(self, state: SessionState, now: float) -> None:
        self.context.cancel_timers(self)
        self.state = state
        self._awaits_life = False
        self.last_message_at = now
        if state is SessionState.READY:
            self.error = None
        if state is SessionState.READY or (state is SessionState.LOST and self.role == "target"):
            self._beat_later(now)
        if state in (SessionState.LOST, SessionState.REFUSED):
            self.context.set_timer(self, "forget", now + self.context.settings.announce_seconds)
        self.context.session_changed(self)


def _unanswered(seconds: float, peer: str) -> PeerLostError:
    return PeerLostError(
        f"no answer within {seconds:g} s to the handshake: check that the peer runs and that its control port can be "
        "reached from here",
        peer=peer,
    )


def _silent(seconds: float, peer: str) -> PeerLostError:
    return PeerLostError(
        f"no sign of life for {seconds:.1f} s: the peer hangs, has died or is cut off; send the request again",
        peer=peer,
    )

"""Simulated links: streams of messages that are lost, doubled, late, overtaken, cut and broken as a scenario says.

A link behaves as :class:`kvbaton.control.base.Links` promises: in order while nothing is done to it, re-dialled for as
long as it is open, REFUSED only where a process has closed or died and nobody stands at its address.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from kvbaton.control.base import Arrived, Changed, LinkChange, LinkId
from kvbaton.protocol.messages import Hello, Ping, Pong, decode
from kvbaton.testing.sim.clockwork import Clockwork
from kvbaton.testing.sim.scenario import LinkFault, MessageFault, Noise

if TYPE_CHECKING:
    from kvbaton.testing.sim.links import SimLinks

LATENCY_SECONDS = (0.00005, 0.0005)
REDIAL_SECONDS = 1.0
#: Most messages that wait at one rank, and on a link that is not up.
QUEUE_MESSAGES = 64
_PAST = {"drop": "dropped", "double": "doubled", "delay": "delayed"}


class _Tag(Struct):
    type: str


_tag = msgspec.msgpack.Decoder(_Tag)


@dataclass(eq=False, slots=True)
class End:
    """One end of a link. ``address`` is empty at the accepting end. ``arriving``: when the last message in order does.

    ``flushed``: its process has ended, but its system still delivers what was sent.
    """

    owner: SimLinks
    link: LinkId
    address: str
    peer: End | None = None
    backlog: deque[bytes] = field(default_factory=deque)
    flushed: bool = False
    arriving: float = 0.0


class SimNetwork:
    """All links of a run, and what is done to them."""

    def __init__(self, clockwork: Clockwork) -> None:
        self.clockwork = clockwork
        self._listeners: dict[str, SimLinks] = {}
        self._holes: set[str] = set()
        self._cuts: dict[tuple[str, str], list[LinkFault]] = {}
        self._held: list[tuple[End, End, bytes]] = []
        self._message_faults: list[MessageFault] = []
        self._noises: list[Noise] = []
        self._lingering: dict[str, list[Callable[[], None]]] = {}

    # ---- faults -------------------------------------------------------------------------------------------------

    def add_message_fault(self, fault: MessageFault) -> None:
        self._message_faults.append(fault)

    def add_noise(self, noise: Noise) -> None:
        self._noises.append(noise)
        self.clockwork.at(noise.at + noise.seconds, lambda: self._noises.remove(noise))

    def cut(self, fault: LinkFault) -> None:
        ways = [(fault.a, fault.b), (fault.b, fault.a)] if fault.both else [(fault.a, fault.b)]
        breaking = {(fault.a, fault.b), (fault.b, fault.a)}
        for way in ways:
            self._cuts.setdefault(way, []).append(fault)
        self.clockwork.fault(
            f"link cut {'both ways' if fault.both else 'one way'} ({fault.manner})", fault.a, f"to {fault.b}"
        )
        if fault.manner == "broken":
            for end in [e for links in list(self._listeners.values()) for e in list(links.ends.values())]:
                if end.peer is not None and end.address and (end.owner.name, end.peer.owner.name) in breaking:
                    self._break(end)
        self.clockwork.after(fault.seconds, lambda: self._heal(fault, ways))

    def _heal(self, fault: LinkFault, ways: list[tuple[str, str]]) -> None:
        for way in ways:
            self._cuts[way].remove(fault)
        self.clockwork.tell(fault.a, f"cut to {fault.b} healed")
        held, self._held = self._held, []
        for sender, receiver, payload in held:
            self.transmit(sender, receiver, payload, resent=True)

    def is_cut(self, sender: str, receiver: str) -> LinkFault | None:
        faults = self._cuts.get((sender, receiver))
        return faults[-1] if faults else None

    # ---- processes ----------------------------------------------------------------------------------------------

    def listen(self, links: SimLinks) -> None:
        self._listeners[links.address] = links

    def gone(self, links: SimLinks, *, hole: bool) -> None:
        """A process has ended. ``hole``: so has its host, and nothing at its address answers any more."""
        if self._listeners.get(links.address) is links:
            del self._listeners[links.address]
        if hole:
            self._holes.add(links.address)
        ends = list(links.ends.values())
        links.ends.clear()
        flushed = self.clockwork.stream(f"end of {links.name}").random() < 0.7
        for end in ends:
            if end.peer is not None and not hole:
                end.flushed = flushed
                self._break(end)

    def is_hole(self, address: str) -> bool:
        """Whether nothing at an address answers any more, not even with a refusal."""
        return address in self._holes and address not in self._listeners

    def end_faults(self) -> bool:
        """Nothing happens to messages any more. Whether something has, to the end, to those that make sessions."""
        kept_apart = any(fault.message in ("hello", "verdict") for fault in self._message_faults)
        self._message_faults.clear()
        return kept_apart

    def dialled(self, end: End) -> None:
        self.clockwork.after(LATENCY_SECONDS[1], lambda: self._connect(end))

    def _connect(self, end: End) -> None:
        owner = end.owner
        if owner.ends.get(end.link) is not end or end.peer is not None:
            return
        there = self._listeners.get(end.address)
        blocked = there is not None and (self.is_cut(owner.name, there.name) or self.is_cut(there.name, owner.name))
        if there is None and end.address not in self._holes:
            owner.put(Changed(end.link, LinkChange.REFUSED))
        elif there is not None and not blocked:
            end.peer = there.accept()
            end.peer.peer = end
            owner.put(Changed(end.link, LinkChange.UP))
            while end.backlog:
                self.transmit(end, end.peer, end.backlog.popleft())
            return
        self.clockwork.after(REDIAL_SECONDS, lambda: self._connect(end))

    def _break(self, end: End) -> None:
        """The stream of a link ends: its dialler is told and dials again, its acceptor is not told."""
        dialler = end if end.address else end.peer
        if end.peer is not None:
            end.peer.peer = None
            end.peer = None
        if dialler is not None and dialler.owner.ends.get(dialler.link) is dialler:
            down = Changed(dialler.link, LinkChange.DOWN)
            self.clockwork.after(2 * LATENCY_SECONDS[1], lambda: dialler.owner.put(down))
            self.clockwork.after(0.05, lambda: self._connect(dialler))

    # ---- messages -----------------------------------------------------------------------------------------------

    def transmit(self, sender: End, receiver: End, payload: bytes, *, resent: bool = False) -> None:
        clockwork, names = self.clockwork, (sender.owner.name, receiver.owner.name)
        tag = _tag.decode(payload).type
        if clockwork.trace is not None and not resent:
            message = decode(payload)
            if not isinstance(message, Ping | Pong):
                text = "Hello" if isinstance(message, Hello) else str(message)[:240]
                clockwork.tell(names[0], f"→ {names[1]} {text}")
        for arrive in self._lingering.pop(tag, ()):
            arrive()
        copies, delay, until = (1, 0.0, "") if resent else self._disturb(tag, names)
        cut = self.is_cut(*names)
        if cut is not None and copies:
            clockwork.faults[f"message {'held' if cut.manner == 'held' else 'lost'} by a cut"] += 1
            if cut.manner == "held":
                self._held.append((sender, receiver, payload))
            return
        latency = clockwork.stream(f"link {names[0]} {names[1]}").uniform(*LATENCY_SECONDS)
        for copy in range(copies):
            if copy or ((delay or until) and copies == 1):  # may be overtaken
                self._arrive_late(sender, receiver, payload, latency + (delay or latency), until)
                continue
            receiver.arriving = max(clockwork.now + latency, receiver.arriving)
            clockwork.at(receiver.arriving, lambda: self._arrive(sender, receiver, payload))

    def _arrive_late(self, sender: End, receiver: End, payload: bytes, seconds: float, until: str) -> None:
        def arrive() -> None:
            self.clockwork.after(seconds, lambda: self._arrive(sender, receiver, payload))

        if until:
            self._lingering.setdefault(until, []).append(arrive)
        else:
            arrive()

    def _disturb(self, tag: str, names: tuple[str, str]) -> tuple[int, float, str]:
        """What its faults and the noise make of a message: copies, extra delay, and the message that it waits for."""
        clockwork = self.clockwork
        number, total = clockwork.happened(tag), clockwork.happened("message")
        copies, delay, until = 1, 0.0, ""
        for fault in self._message_faults:
            count = number if fault.message else total
            if fault.message in ("", tag) and fault.nth <= count < fault.nth + fault.count:
                clockwork.fault(f"message {_PAST[fault.kind]}", names[0], tag)
                copies = {"drop": 0, "double": 2, "delay": copies}[fault.kind]
                if fault.kind != "drop":
                    delay, until = fault.seconds, fault.until
        for noise in self._noises:
            if noise.at <= clockwork.now:
                random = clockwork.stream(f"noise {names[0]} {names[1]}")
                lost, doubled, delayed = (random.random() for _ in range(3))
                if lost < noise.drop:
                    copies = 0
                    clockwork.fault("message dropped", names[0], tag)
                elif doubled < noise.double:
                    copies *= 2
                    clockwork.fault("message doubled", names[0], tag)
                elif delayed < noise.delay:
                    delay += noise.delay_seconds * random.random()
                    clockwork.fault("message delayed", names[0], tag)
        return copies, delay, until

    def _arrive(self, sender: End, receiver: End, payload: bytes) -> None:
        if (receiver.peer is sender or sender.flushed) and receiver.owner.ends.get(receiver.link) is receiver:
            receiver.owner.put(Arrived(receiver.link, payload))

"""The engines' only doorway: KVManager, KVSender, KVReceiver, KVPoll.

An engine keeps its own queues and polls. Nothing here blocks, does I/O or calls back: reads (``poll``, ``leased``,
``error``) are plain reads of what the driver thread published, and commands only enqueue. What can be judged at once
is judged at once: a wrong unit, a room used twice, a manager that is closed raise where the engine calls.

Units belong to the transfer from ``publish`` or ``submit`` until ``leased`` is false *and* ``poll`` is Failed or
Success: only then may they be freed. A failure is reported at once, the lease ends on proof.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

from kvbaton.control.address import Address
from kvbaton.control.base import Links
from kvbaton.control.zmq import ZmqLinks
from kvbaton.discovery import make_membership
from kvbaton.discovery.placement import group_of
from kvbaton.discovery.registry import Coordinates as RegistryCoordinates
from kvbaton.discovery.registry import Route, Sizes, check_inside
from kvbaton.errors import AbortedError, ConfigError, KVBatonError, LocalProtocolError, OverloadedError
from kvbaton.layout import CacheLayout, Coordinates
from kvbaton.protocol.core import Core
from kvbaton.protocol.effects import KVPoll, Report, RoomStatus
from kvbaton.protocol.events import (
    AbortRequested,
    Chunk,
    ChunkSubmitted,
    Event,
    GrantsPublished,
    ReceiverOpened,
    SenderOpened,
)
from kvbaton.protocol.grants import check_grants
from kvbaton.protocol.messages import Grant, Role
from kvbaton.protocol.session import Identity
from kvbaton.protocol.settings import Settings
from kvbaton.runtime.commands import Command, Fence
from kvbaton.runtime.driver import Driver
from kvbaton.runtime.posting import Window
from kvbaton.transports import make_transport
from kvbaton.transports.base import Transport

if TYPE_CHECKING:
    from kvbaton.discovery.membership import Membership

__all__ = [
    "ALWAYS_READY",
    "Finished",
    "KVManager",
    "KVPoll",
    "KVReceiver",
    "KVSender",
    "Span",
    "TraceEvent",
    "new_instance",
]

#: Units of one pool that hold a token range: ``Span(pool, token_start, token_stop, units)``. ``units`` are the page ids
#: of absolute pages ``token_start // page_size`` up to the page of ``token_stop - 1``: any order in memory, position in
#: the list is position in the prompt. Slot pools (aux, state): ``Span(pool, 0, 0, (slot,))``.
Span = Grant

MAX_ROOM = (1 << 63) - 1

#: The side of its rooms that a rank is on: prefill sends, decode receives.
RankRole = Literal["prefill", "decode", "both"]
_OPENS: dict[RankRole, tuple[Role, ...]] = {"prefill": ("source",), "decode": ("target",), "both": ("source", "target")}


def ALWAYS_READY() -> bool:  # noqa: N802 - used like a constant
    """The fence of data that is already in memory."""
    return True


def new_instance() -> str:
    """A fresh instance id: names one process for as long as it lives."""
    return uuid.uuid4().hex


@dataclass(frozen=True, slots=True)
class TraceEvent:
    """One line of a room's story, as old as ``seconds_ago`` when it was asked for: durations can be compared between
    machines, instants can not."""

    seconds_ago: float
    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    """A room that ended and whose units are free: told exactly once to engines that ask for it."""

    room: int
    role: Role
    error: KVBatonError | None


class _Side:
    """What sender and receiver share: the last status that the driver published."""

    role: Role

    def __init__(self, manager: KVManager, room: int) -> None:
        self.room = room
        self._manager = manager
        self._status = RoomStatus()
        self._started_at = manager.clock()
        self._ended_at: float | None = None
        self._handed_over = False

    def poll(self) -> KVPoll:
        """State of the room. Failed and Success never change any more."""
        return self._status.poll

    @property
    def error(self) -> KVBatonError | None:
        """The first root cause, once ``poll()`` is Failed."""
        return self._status.error

    @property
    def leased(self) -> bool:
        """A write may still touch this room's units, or will: they must not be freed."""
        return self._status.leased or (self._handed_over and not self._ended)

    @property
    def _ended(self) -> bool:
        return self._status.poll in (KVPoll.Failed, KVPoll.Success)

    @property
    def bytes(self) -> int:
        """Bytes that this room moves on this rank."""
        return self._status.bytes

    @property
    def handoff_seconds(self) -> float:
        """From ``publish`` (receiver) or creation (sender) to the outcome, or to now."""
        return (self._ended_at if self._ended_at is not None else self._manager.clock()) - self._started_at

    @property
    def released(self) -> bool:
        """Failed or Success, and no unit is leased: everything may be freed."""
        return self._ended and not self._status.leased

    @property
    def exposed_seconds(self) -> float:
        """What the hand-off adds to the prefill: from the last chunk's submission to its last byte having settled."""
        return self._status.exposed_seconds

    def fail(self, error: KVBatonError) -> None:
        """End the room on both sides, with ``error`` as the cause. Does nothing once it has ended."""
        self._manager._command(AbortRequested(self.room, self.role, error), even_if_closed=True)

    def abort(self, reason: str) -> None:
        """Give the room up on both sides. Does nothing once it has ended."""
        self.fail(AbortedError(reason, room=self.room))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} room {self.room}: {self.poll().name}{', leased' if self.leased else ''}>"


class KVSender(_Side):
    """The prefill side of one room. Made by :meth:`KVManager.sender`."""

    role: Role = "source"

    def __init__(self, manager: KVManager, room: int) -> None:
        super().__init__(manager, room)
        self._complete = False

    @property
    def prefix_len(self) -> int:
        """Tokens that every target holds already, known from WaitingForInput on; no need to submit them."""
        return self._status.prefix_len

    def submit(self, spans: Sequence[Span], *, last: bool, ready: Fence) -> None:
        """Hand over a chunk. Chunks come in token order and, but for the last, end on a page boundary; aux and state
        slots go with the last one.

        Args:
            spans: the units that hold the chunk, one span per pool.
            last: nothing follows; its token range ends with the prompt.
            ready: returns true once the data is in memory (a CUDA event's query, or :data:`ALWAYS_READY`). Nothing is
                read before that. Called from the driver thread; must not block.

        Raises:
            LayoutError: a span names units that do not exist or do not fit its token range.
            LocalProtocolError: the last chunk was submitted already, or the manager is closed.
        """
        if self._complete:
            raise LocalProtocolError(f"the last chunk of room {self.room} was submitted already", room=self.room)
        chunk = Chunk(spans=tuple(spans), last=last)
        check_grants(chunk.spans, self._manager.layout, distinct=False)
        self._handed_over, self._complete = True, last
        self._manager._command(ChunkSubmitted(self.room, chunk), ready)


class KVReceiver(_Side):
    """The decode side of one room. Made by :meth:`KVManager.receiver`."""

    role: Role = "target"

    def publish(self, spans: Sequence[Span], *, token_count: int) -> None:
        """Grant units to the sources. A paged span starts at the prefix that we hold already.

        Args:
            spans: one span per pool; the units are leased from now on.
            token_count: tokens of the whole prompt; both sides must agree.

        Raises:
            LayoutError: a span names units that do not exist, twice, or that do not fit its token range.
            LocalProtocolError: units were published already, or the manager is closed.
        """
        if self._handed_over:
            raise LocalProtocolError(f"units were published for room {self.room} already", room=self.room)
        grants = tuple(spans)
        check_grants(grants, self._manager.layout)
        self._handed_over = True
        self._started_at = self._manager.clock()
        self._manager._command(GrantsPublished(self.room, grants, token_count))


class KVManager:
    """One rank's end of all its transfers. A context manager; ``close`` is idempotent.

    :meth:`open` makes the parts by name; here they are given.

    Args:
        layout: this rank's memory; validated and registered here.
        transport: the data plane, not used by anybody else; closed with the manager, also where making it fails.
        links: the control links, likewise.
        instance: names this process; the same as the transport's.
        group: names the engine instance that this rank belongs to; ``group_size`` ranks share it.
        role: which side of rooms may be opened here.
        registry: the registry's client; started and closed with the manager.
        coordinates: this rank's place in the group.
        settings: deadlines and bounds.
        window: most in flight towards one peer.
        wakeup: set whenever a room's status changes; an engine loop may sleep on it.
        collect_finished: keep ended rooms for :meth:`take_finished` (step-driven engines).
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        layout: CacheLayout,
        transport: Transport,
        links: Links,
        *,
        instance: str,
        group: str,
        group_size: int = 1,
        coordinates: Coordinates | None = None,
        role: RankRole = "both",
        registry: Membership | None = None,
        settings: Settings | None = None,
        window: Window | None = None,
        wakeup: threading.Event | None = None,
        collect_finished: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.layout = layout
        self.instance = instance
        self.role: RankRole = role
        self.clock = clock
        self.wakeup = wakeup if wakeup is not None else threading.Event()
        self._links = links
        self._registry = registry
        self._settings = settings if settings is not None else Settings()
        with ExitStack() as given:  # what is ours from now on is closed, should this fail
            given.callback(links.close)
            given.callback(transport.close)
            if registry is not None:
                given.callback(registry.close)
            if role not in _OPENS:
                raise ConfigError(f"role: {role!r} is unknown; use one of: {', '.join(_OPENS)}")
            layout.validate()
            transport.register(layout.regions)
            identity = Identity(
                instance=instance,
                group=group,
                group_size=group_size,
                coordinates=coordinates if coordinates is not None else Coordinates(),
                layout=layout,
                agent_metadata=transport.metadata(),
                transport=transport.capabilities.name,
            )
            self._core = Core(identity, self._settings)
            self._driver = Driver(
                self._core,
                transport,
                links,
                on_report=self._report,
                window=window if window is not None else Window(),
                clock=clock,
            )
            given.pop_all()
        self._lock = threading.Lock()
        self._sides: dict[tuple[Role, int], _Side] = {}
        self._finished: deque[Finished] | None = deque() if collect_finished else None
        self.outcomes: Counter[str] = Counter()

    @classmethod
    def open(
        cls,
        layout: CacheLayout,
        *,
        role: RankRole,
        backend: str = "nixl",
        host: str = "127.0.0.1",
        port: int = 0,
        advertise: str = "",
        registry: str = "",
        secret: str | None = None,
        instance: str = "",
        group: str = "",
        sizes: Sizes | None = None,
        coordinates: Coordinates | None = None,
        settings: Settings | None = None,
        wakeup: threading.Event | None = None,
        collect_finished: bool = False,
    ) -> Self:
        """A started manager over ZeroMQ links and the data plane ``backend``.

        Args:
            layout: this rank's memory.
            role: the side of its rooms; ``both`` for an engine that prefills and decodes.
            backend: ``nixl``, or ``memory`` for processes of one host.
            host: IP address where the control links listen. Targets dial sources: only prefill needs one that others
                reach, and with it ``secret``.
            port: their port; 0: any.
            advertise: IP address that peers dial, where ``host`` is every interface or is translated.
            registry: ``HOST:PORT`` of the bootstrap registry: a prefill rank registers there, and the first of its
                group serves it; :meth:`lookup` asks it. Without one you carry :attr:`address` to the peers. Needs
                aiohttp.
            secret: shared by all ranks; control messages are then encrypted and the registry asks for a token.
            instance: names this process; default: a fresh id.
            group: names the engine instance, alike on its ranks and new at each launch; default for one rank: a fresh
                id.
            sizes, coordinates: how many ranks the engine has, and which of them this is.
            settings, wakeup, collect_finished: as the constructor takes them.

        Raises ConfigError for an argument that cannot be, a port in use, or a package that is missing; LayoutError for
        the layout; TransportError where the data plane does not come up.
        """
        sizes = sizes if sizes is not None else Sizes()
        place = coordinates if coordinates is not None else Coordinates()
        where = RegistryCoordinates(dp=place.dp, pp=place.pp, cp=place.cp, tp=place.tp)
        check_inside(where, sizes)
        if sizes.ranks > 1 and not group:
            raise ConfigError(f"group: name the engine instance that the {sizes.ranks} ranks belong to, alike on each")
        group, instance = group or new_instance(), instance or new_instance()
        with ExitStack() as made:
            links = ZmqLinks(str(Address(host, port)), secret=secret, advertise=advertise)
            made.callback(links.close)
            membership = None
            if registry:
                route = Route(
                    instance=instance,
                    group=group,
                    address=links.address,
                    layout_digest=layout.digest(),
                    http_port=0,
                    coordinates=where,
                    sizes=sizes,
                )
                membership = make_membership(registry, None if role == "decode" else route, secret)
                made.callback(membership.close)
            transport = make_transport(backend, instance)
            made.pop_all()  # the manager closes them from here on, whether it comes about or not
        manager = cls(
            layout,
            transport,
            links,
            instance=instance,
            group=group_of(group, place.dp, sizes.dp),
            group_size=sizes.ranks // sizes.dp,
            coordinates=place,
            role=role,
            registry=membership,
            settings=settings,
            wakeup=wakeup,
            collect_finished=collect_finished,
        )
        with ExitStack() as failed:
            failed.callback(manager.close)
            manager.start()
            failed.pop_all()
        return manager

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the driver thread; a manager that runs goes on. Raises LocalProtocolError once it is closed."""
        if self._driver.closing:
            raise LocalProtocolError("the manager is closed; make a new one")
        if self._driver.started:
            return
        if self._registry is not None:
            self._registry.start()
        self._driver.start()

    def close(self, reason: str = "shutdown") -> None:
        """Fail what is live, tell the peers, destroy the transport.

        A room that a peer may still write to stays ``leased``, and the links to its peers open, until the peer has
        said or its end has proven that nothing is under way: destroying the transport proves it for our own writes
        alone. The listening address is free at once.
        """
        if self._registry is not None:
            self._registry.close()
        self._driver.close(reason)

    @property
    def address(self) -> str:
        """Where targets dial this rank."""
        return self._links.address

    @property
    def registered(self) -> bool:
        """Whether the registry knows this rank; true where it need not. Raises what trying again cannot cure: another
        secret (AuthenticationError), an instance that was replaced (LocalProtocolError)."""
        return self._registry is None or self._registry.registered

    def lookup(self, room: int, *, registry: str = "", dp_rank: int | None = None) -> Future[tuple[str, ...]]:
        """Ask the registry which control addresses prefill ``room``; the answer is :meth:`receiver`'s ``sources``.

        Args:
            registry: ``HOST:PORT`` of another one than the manager was opened with.
            dp_rank: the data-parallel rank that the request names.

        The future raises RegistryError, AuthenticationError or ConfigError; ``close`` cancels it.

        Raises:
            ConfigError: the manager has no registry's client, or ``registry`` is no address.
            OverloadedError: too many lookups are under way.
        """
        if self._registry is None:
            raise ConfigError("this manager has no registry to ask: open it with registry='HOST:PORT'")
        return self._registry.sources(room, registry=registry, dp_rank=dp_rank)

    def sender(self, room: int) -> KVSender:
        """Begin to send a room.

        Raises:
            LocalProtocolError: the room is being sent already, or the manager is closed.
            OverloadedError: too many rooms are live.
        """
        sender = KVSender(self, room)
        self._add(sender)
        self._command(SenderOpened(room))
        return sender

    def receiver(self, room: int, sources: Sequence[str]) -> KVReceiver:
        """Begin to receive a room from the source ranks at the control addresses ``sources`` (all of one group).

        Raises:
            LocalProtocolError: the room is being received already, or the manager is closed.
            OverloadedError: too many rooms are live.
            ConfigError: no source is given, or one twice.
        """
        if not sources or len(set(sources)) != len(sources):
            raise ConfigError(f"room {room} needs the address of every prefill rank once, got {list(sources)}")
        receiver = KVReceiver(self, room)
        self._add(receiver)
        self._command(ReceiverOpened(room, tuple(sources)))
        return receiver

    def take_finished(self) -> list[Finished]:
        """Rooms that ended and whose units are free since the last call; each exactly once."""
        if self._finished is None:
            raise LocalProtocolError("this manager does not collect finished rooms; pass collect_finished=True")
        taken = []
        while self._finished:
            taken.append(self._finished.popleft())
        return taken

    @property
    def live_rooms(self) -> int:
        """Rooms that have not ended, or whose units are still leased."""
        return len(self._sides)

    @property
    def leased_rooms(self) -> int:
        """Rooms whose units a write may still touch."""
        with self._lock:
            return sum(1 for side in self._sides.values() if side.leased)

    @property
    def quarantined_rooms(self) -> int:
        """Of those, the ones that have failed: no peer has proven yet that its writes have ended."""
        with self._lock:
            return sum(1 for side in self._sides.values() if side.leased and side.poll() is KVPoll.Failed)

    @property
    def staging_slots_free(self) -> int:
        """Slots of staging memory that are neither leased to a room nor being sent."""
        return len(self._core.staging)

    def counters(self) -> dict[str, int]:
        """Everything that was counted, by name."""
        return {**self._core.counters, **self._driver.counters, **self.outcomes}

    def trace(self, room: int) -> list[str]:
        """What happened to a room and what it waits for now, one line each, times in seconds since the first."""
        moments = self.timeline(room)
        start = moments[0].seconds_ago if moments else 0.0
        return [f"+{start - moment.seconds_ago:.6f} {moment.text}" for moment in moments]

    def timeline(self, room: int) -> list[TraceEvent]:
        """The same as data, oldest first; what it waits for now is the last, of age 0. Waits for the driver's thread.

        Raises ExpiredError when that does not answer.
        """

        def look(core: Core, now: float) -> list[TraceEvent]:
            past = [TraceEvent(now - line.at, line.text) for line in core.trace(room)]
            return [*past, *(TraceEvent(0.0, text) for text in core.state_of(room))]

        return self._driver.ask(look)

    def sizes(self) -> dict[str, int]:
        """Entries of every table of this rank, by name; waits for the driver's thread like :meth:`timeline`."""
        tables = self._driver.ask(lambda core, _now: {**core.sizes(), **self._driver.sizes()})
        return {"sides": len(self._sides), **tables}

    def evidence(self) -> str:
        """How bytes were seen to travel from here to each peer, distinct answers joined; empty before any has."""
        return ", ".join(sorted({path for path in list(self._driver.evidence.values()) if path}))

    def _add(self, side: _Side) -> None:
        if not 0 <= side.room <= MAX_ROOM:
            raise ConfigError(f"room {side.room} is outside 0..2^63-1")
        if side.role not in _OPENS[self.role]:
            raise LocalProtocolError(f"a rank in role {self.role} opens no {side.role} of a room", room=side.room)
        with self._lock:
            if (side.role, side.room) in self._sides:
                raise LocalProtocolError(f"room {side.room} is live already: rooms must be unique", room=side.room)
            if len(self._sides) >= self._settings.rooms:
                raise OverloadedError(f"{len(self._sides)} rooms are live; try again later", room=side.room)
            self._sides[side.role, side.room] = side

    def _command(self, event: Event, fence: Fence | None = None, *, even_if_closed: bool = False) -> None:
        if self._driver.closing:
            if even_if_closed:
                return
            raise LocalProtocolError("the manager is closed")
        self._driver.post(Command(event, fence))

    def _report(self, report: Report) -> None:
        """Driver thread: publish a status to its side."""
        side = self._sides.get((report.role, report.room))
        if side is None:
            return
        ended_before = side._ended_at is not None
        ended = report.status.poll in (KVPoll.Failed, KVPoll.Success)
        if ended and not ended_before:
            side._ended_at = self.clock()
        side._status = report.status
        if ended and not ended_before:
            self.outcomes[f"{report.role}_{report.status.error.code if report.status.error else 'success'}"] += 1
        if side.released:
            with self._lock:
                self._sides.pop((report.role, report.room), None)
            if self._finished is not None:
                self._finished.append(Finished(report.room, report.role, report.status.error))
        if not self.wakeup.is_set():  # whoever clears it afterwards reads what is published here already
            self.wakeup.set()

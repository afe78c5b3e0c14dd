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
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal, Self

from kvbaton.collected import Collected
from kvbaton.control.address import Address
from kvbaton.control.base import Links
from kvbaton.discovery.registry import Sizes
from kvbaton.errors import ConfigError, DeclinedError, LocalProtocolError, OverloadedError, TransportError
from kvbaton.handles import ALWAYS_READY, Finished, Freed, KVReceiver, KVSender, RoomHandle, Span, TraceEvent
from kvbaton.layout import CacheLayout, Coordinates
from kvbaton.parts import make_parts, new_instance
from kvbaton.pieces import LayerRules
from kvbaton.protocol.core import Core
from kvbaton.protocol.effects import KVPoll, PeerLost, Report
from kvbaton.protocol.events import (
    AbortRequested,
    Event,
    ReceiverOpened,
    SenderOpened,
)
from kvbaton.protocol.messages import Role
from kvbaton.protocol.session import Identity
from kvbaton.protocol.settings import Settings
from kvbaton.runtime.commands import Command, Fence
from kvbaton.runtime.driver import Driver
from kvbaton.runtime.machine import machine
from kvbaton.runtime.posting import Window
from kvbaton.runtime.staging_memory import with_staging
from kvbaton.transports.base import Transport

if TYPE_CHECKING:
    from kvbaton.discovery.membership import Membership

__all__ = [
    "ALWAYS_READY",
    "Finished",
    "Freed",
    "KVManager",
    "KVPoll",
    "KVReceiver",
    "KVSender",
    "PeerLost",
    "Span",
    "TraceEvent",
    "new_instance",
]

MAX_ROOM = (1 << 63) - 1

#: The side of its rooms that a rank is on: prefill sends, decode receives.
RankRole = Literal["prefill", "decode", "both"]
_OPENS: dict[RankRole, tuple[Role, ...]] = {"prefill": ("source",), "decode": ("target",), "both": ("source", "target")}


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
        self._collected = Collected(wanted=collect_finished)
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
                machine=machine(),
            )
            self._core = Core(identity, self._settings)
            self._driver = Driver(
                self._core,
                transport,
                links,
                on_report=self._report,
                on_peer_lost=self._collected.note_lost,
                on_news=self._wake,
                window=window if window is not None else Window(),
                clock=clock,
            )
            given.pop_all()
        self._layer_rules = LayerRules(layout, self._settings.layers_ahead, self._settings.costs_of(layout, near=False))
        self._lock = threading.Lock()
        self._away = False
        self._staging_memory: object = None  # lives as long as peers may write it
        self._sides: dict[tuple[Role, int], RoomHandle] = {}
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
        staging_bytes: int | None = 0,
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
            staging_bytes: memory that the manager makes beside the pages, through which small pieces travel together
                where tensor-parallel sizes differ; None: as much as these pages need; 0: none but the layout's own.
            settings, wakeup, collect_finished: as the constructor takes them.

        Raises ConfigError for an argument that cannot be, a port in use, or a package that is missing; LayoutError for
        the layout; TransportError where the data plane does not come up.
        """
        sizes = sizes if sizes is not None else Sizes()
        place = coordinates if coordinates is not None else Coordinates()
        instance = instance or new_instance()
        layout, staging_memory = with_staging(layout, staging_bytes) if staging_bytes != 0 else (layout, None)
        parts = make_parts(
            layout.digest(),
            backend=backend,
            bind=Address(host, port),
            advertise=advertise,
            registry=registry,
            registers=role != "decode",
            secret=secret,
            instance=instance,
            group=group,
            sizes=sizes,
            coordinates=place,
        )
        manager = cls(
            layout,
            parts.transport,
            parts.links,
            instance=instance,
            group=parts.group,
            group_size=sizes.ranks // sizes.dp,
            coordinates=place,
            role=role,
            registry=parts.registry,
            settings=settings,
            wakeup=wakeup,
            collect_finished=collect_finished,
        )
        manager._staging_memory = staging_memory
        return manager.__enter__()

    def __enter__(self) -> Self:
        with ExitStack() as failed:
            failed.callback(self.close)
            self.start()
            failed.pop_all()
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

        Raises:
            ExpiredError: the data plane has not come back from a call for a minute, so that nothing is proven: keep the
                memory, or end the process.
        """
        if self._registry is not None:
            self._registry.close()
        self._driver.close(reason)

    def deregister(self) -> None:
        """Let go of the layout's memory, for an engine that gives it back to its device for a while. No room may be
        live, and none begins until :meth:`register`; peers stay. Waits for the driver's thread.

        Raises:
            LocalProtocolError: rooms are live or their units still leased, or the manager is closed.
            TransportError: the data plane cannot let go of it.
            ExpiredError: the driver's thread has not answered, and may let go of it later: call again, or
                :meth:`register`; no room begins before that.
        """
        with self._lock:
            if self._sides:
                raise LocalProtocolError(f"{len(self._sides)} rooms are live: their memory cannot go before they end")
            if self._driver.closing:
                raise LocalProtocolError("the manager is closed")
            self._away = True
        try:
            self._driver.deregister()
        except TransportError:
            self._away = False
            raise

    def register(self) -> None:
        """The layout's memory is back, at the same addresses: peers are told, rooms may begin. Does nothing where it
        was not let go of. Raises as :meth:`deregister`; no room begins then."""
        if self._driver.closing:
            raise LocalProtocolError("the manager is closed")
        if self._away:
            self._driver.register(self.layout.regions)
            self._away = False

    @property
    def address(self) -> str:
        """Where targets dial this rank."""
        return self._links.address

    @property
    def registered(self) -> bool:
        """Whether the registry knows this rank; true where it need not. Raises what trying again cannot cure: another
        secret (AuthenticationError), a place of the registry's own process (LocalProtocolError)."""
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

    def sender(self, room: int, *, tag: Any = None) -> KVSender:
        """Begin to send a room. ``tag`` is the engine's own name for it, and comes back with :class:`Finished`.

        Raises:
            LocalProtocolError: the room is being sent already, or the manager is closed.
            OverloadedError: too many rooms are live.
        """
        sender = KVSender(room, self.layout, self._command, self.clock, tag, self._layer_rules)
        self._add(sender)
        self._command(SenderOpened(room))
        return sender

    def receiver(self, room: int, sources: Sequence[str], *, begun: bool = False, tag: Any = None) -> KVReceiver:
        """Begin to receive a room from the source ranks at the control addresses ``sources`` (all of one group).

        Args:
            begun: prefill has answered that it has this room (decode is asked after it): a rank that has not, since the
                room has ended there or the rank was restarted, then refuses at once. Otherwise it may still be told of
                it, and is waited for.
            tag: the engine's own name for the room; comes back with :class:`Finished`.

        Raises:
            LocalProtocolError: the room is being received already, or the manager is closed.
            OverloadedError: too many rooms are live.
            ConfigError: no source is given, or one twice.
        """
        if not sources or len(set(sources)) != len(sources):
            raise ConfigError(f"room {room} needs the address of every prefill rank once, got {list(sources)}")
        receiver = KVReceiver(room, self.layout, self._command, self.clock, tag)
        self._add(receiver)
        self._command(ReceiverOpened(room, tuple(sources), begun))
        return receiver

    def decline(self, room: int, sources: Sequence[str], reason: str, *, tag: Any = None) -> KVReceiver:
        """Let the source ranks know that nothing is wanted of a room, whatever its prompt is: this engine has it all,
        or its request has ended. The room ends on both sides with :class:`DeclinedError`, and prefill frees its pages
        at once. Raises as :meth:`receiver`, in whose place it is called."""
        receiver = self.receiver(room, sources, tag=tag)
        receiver.fail(DeclinedError(reason, room=room))
        return receiver

    def take_finished(self) -> list[Finished]:
        """Rooms that ended and whose units are free since the last call; each exactly once."""
        return self._collected.take_finished()

    def take_freed(self) -> list[Freed]:
        """Rooms whose units became free since the last call; each exactly once, never after :meth:`take_finished` has
        told it. Senders are told before their rooms end."""
        return self._collected.take_freed()

    def take_lost_peers(self) -> list[PeerLost]:
        """Peers that went silent, ended or were replaced since the last call: what is remembered of them (addresses,
        who has what cached) is out of date. Their rooms fail by themselves."""
        return self._collected.take_lost_peers()

    def wait(self, seconds: float) -> bool:
        """Sleep until something has changed since the last ``wait``, at most so long. Whether it has. For one thread:
        an engine that sleeps on :attr:`wakeup` itself clears it before it looks."""
        changed = self.wakeup.wait(seconds)
        self.wakeup.clear()
        return changed

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
        events = self.timeline(room)
        start = events[0].seconds_ago if events else 0.0
        return [f"+{start - event.seconds_ago:.6f} {event.text}" for event in events]

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
        return {"sides": len(self._sides), "freed_untold": len(self._collected), **tables}

    def evidence(self) -> str:
        """How bytes were seen to travel from here to each peer, distinct answers joined; empty before any has."""
        return ", ".join(sorted({path for path in list(self._driver.evidence.values()) if path}))

    def _add(self, side: RoomHandle) -> None:
        if not 0 <= side.room <= MAX_ROOM:
            raise ConfigError(f"room {side.room} is outside 0..2^63-1")
        if side.role not in _OPENS[self.role]:
            raise LocalProtocolError(f"a rank in role {self.role} opens no {side.role} of a room", room=side.room)
        with self._lock:
            if self._away:
                raise LocalProtocolError("this rank's memory is not registered; call register() first", room=side.room)
            if (side.role, side.room) in self._sides:
                raise LocalProtocolError(f"room {side.room} is live already: rooms must be unique", room=side.room)
            if len(self._sides) >= self._settings.rooms:
                raise OverloadedError(f"{len(self._sides)} rooms are live; try again later", room=side.room)
            self._sides[side.role, side.room] = side

    def _command(self, event: Event, fence: Fence | None = None) -> None:
        if not self._driver.closing:
            self._driver.post(Command(event, fence))
        elif not isinstance(event, AbortRequested):  # a closed manager has ended every room
            raise LocalProtocolError("the manager is closed")

    def _report(self, report: Report) -> None:
        """Driver thread: publish a status to its side."""
        side = self._sides.get((report.role, report.room))
        if side is None:
            return
        if side.on_status(report.status):
            self.outcomes[f"{report.role}_{report.status.error.code if report.status.error else 'success'}"] += 1
        self._collected.note_status(side)
        if side.released:
            with self._lock:
                self._sides.pop((report.role, report.room), None)
            self._collected.note_end(side)

    def _wake(self) -> None:
        """Driver thread, after what it has published."""
        if not self.wakeup.is_set():  # whoever clears it afterwards reads what is published here already
            self.wakeup.set()

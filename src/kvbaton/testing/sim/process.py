"""One simulated process: the real facade, driver and core, over simulated links and transport, on its own clock."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvbaton.layout import Coordinates
from kvbaton.manager import KVManager
from kvbaton.protocol.core import Core
from kvbaton.protocol.effects import Effect, Report
from kvbaton.protocol.events import Event
from kvbaton.runtime.driver import Driver
from kvbaton.runtime.posting import Window
from kvbaton.testing.sim.engine import SimEngine
from kvbaton.testing.sim.links import SimLinks
from kvbaton.testing.sim.memory import RankMemory
from kvbaton.testing.sim.scenario import Clock, SimGroup
from kvbaton.testing.sim.transport import SimTransport

if TYPE_CHECKING:
    from kvbaton.testing.sim.world import SimWorld

#: Between two turns of a driver that has work, and of one that polls.
TURN_SECONDS = 0.00002
POLL_SECONDS = 0.002
STIR_SECONDS = 0.00001


class SimManager(KVManager):
    """The real facade; every report is shown to the judge before the engine can see it."""

    process: Process

    def _report(self, report: Report) -> None:
        self.process.world.judge.reported(self.process, report)
        super()._report(report)

    def stop(self, reason: str) -> None:
        """Begin to close, without a thread to wait for."""
        self._closed = True
        self._driver.stop(reason)

    def side_of(self, report: Report) -> object | None:
        return self._sides.get((report.role, report.room))

    @property
    def driver(self) -> Driver:
        return self._driver

    @property
    def core(self) -> Core:
        return self._core


class Process:
    """See the module. ``alive`` until it is killed or has closed; ``parted`` once its transport is destroyed, while it
    waits for the proof that nobody writes its memory."""

    def __init__(
        self, world: SimWorld, group: SimGroup, number: int, memory: RankMemory, instance: str, *, source: bool
    ) -> None:
        self.world = world
        self.clockwork = world.clockwork
        self.group = group
        self.number = number
        self.name = group.rank(number)
        self.instance = instance
        self.source = source
        self.alive = True
        self.closing = False
        self.parted = False
        self.born_at = world.clockwork.now
        self.paused_until = 0.0
        self.paused_seconds = 0.0
        self.least_pause = TURN_SECONDS
        self._clock = group.clocks[number % len(group.clocks)] if group.clocks else Clock()
        self._turn_at: float | None = None
        self._turned_at = -1.0
        self.memory = memory
        self.links = SimLinks(world.network, self.name, f"sim://{self.name}", self.stir)
        self.transport = SimTransport(
            world.fabric, self, must_progress=group.must_progress, fence_breaks_others=group.fence_breaks_others
        )
        tuning = world.scenario.tuning
        self.manager = SimManager(
            memory.layout,
            self.transport,
            self.links,
            instance=instance,
            group=group.name,
            group_size=group.size,
            coordinates=Coordinates(pp=number // group.tp, tp=number % group.tp),
            settings=world.settings,
            window=Window(bytes=tuning.window_bytes, entries=tuning.window_entries),
            clock=self.clock,
        )
        self.manager.process = self
        self.handling: Event | None = None
        self._core_handle = self.manager.core.handle
        setattr(self.manager.core, "handle", self._handle)  # noqa: B010 - seen from here, not changed
        self.engine = SimEngine(self)

    def __repr__(self) -> str:
        return f"<Process {self.name} {self.instance}{'' if self.alive else ' dead'}>"

    @property
    def rate(self) -> float:
        return self._clock.rate

    def clock(self) -> float:
        """This rank's own time."""
        return self.clockwork.now * self._clock.rate + self._clock.offset

    def _handle(self, event: Event, now: float) -> list[Effect]:
        self.handling = event
        return self._core_handle(event, now)

    def owner_of(self, unit: int, *, reading: bool) -> object | None:
        """Who may have a unit touched now: a job's tenancy; for a staging slot the write that reads it or the transfer
        that it is leased to."""
        slot = unit - len(self.memory.owners)
        if slot < 0:
            return self.memory.owners[unit]
        return self.manager.driver.staging_reader(slot) if reading else self.manager.core.staging_lessee(slot)

    def in_two_roles(self, unit: int) -> bool:
        """Whether a staging slot is used to send from while it is leased to a source of ours."""
        slot = unit - len(self.memory.owners)
        driver, core = self.manager.driver, self.manager.core
        return slot >= 0 and driver.staging_reader(slot) is not None and core.staging_lessee(slot) is not None

    # ---- turning ------------------------------------------------------------------------------------------------

    def stir(self) -> None:
        """There is something to do."""
        self._turn_by(self.clockwork.now + STIR_SECONDS)

    def _turn_by(self, when: float) -> None:
        when = max(when, self._turned_at + self.least_pause, self.paused_until)
        if self.alive and (self._turn_at is None or when < self._turn_at):
            self._turn_at = when
            self.clockwork.at(when, lambda: self._turn(when))

    def _turn(self, when: float) -> None:
        if not self.alive or self._turn_at != when:
            return
        self._turn_at = None
        if self.paused_until > when:
            self._turn_by(self.paused_until)
            return
        self._turned_at = when
        driver = self.manager.driver
        driver.turn()
        self.world.judge.turned(self)
        if self.manager.wakeup.is_set():
            self.manager.wakeup.clear()
            self.engine.notice()
        if driver.finished() and not self.parted:
            driver.part()
            self.parted = True
            self.world.judge.closed(self)
            self.engine.notice()
        if self.parted and driver.gone:
            self.world.judge.gone(self)
            driver.hang_up()
            self._end()
            return
        self._plan_next_turn(driver)

    def _plan_next_turn(self, driver: Driver) -> None:
        now = self.clockwork.now
        if driver.pending or self.links.inbox:
            self._turn_by(now + TURN_SECONDS)
        if driver.quiescing or (self.closing and not self.parted):
            self._turn_by(now + POLL_SECONDS)
        deadline = self.manager.core.next_deadline()
        if deadline is not None:
            self._turn_by((deadline - self._clock.offset) / self._clock.rate + 1e-9)

    # ---- faults -------------------------------------------------------------------------------------------------

    def pause(self, seconds: float) -> None:
        if self.alive:
            self.clockwork.fault("rank paused", self.name, f"for {seconds:g} s")
            until = self.clockwork.now + seconds
            self.paused_seconds += max(0.0, until - max(self.paused_until, self.clockwork.now))
            self.paused_until = max(self.paused_until, until)

    def read_slowly(self, seconds: float) -> None:
        if self.alive:
            self.clockwork.fault("slow reader", self.name, f"for {seconds:g} s")
            self.links.batch, self.least_pause = 1, seconds / 10
            self.clockwork.after(seconds, self._read_fast)

    def _read_fast(self) -> None:
        self.links.batch, self.least_pause = 256, TURN_SECONDS
        self.stir()

    def kill(self, *, hole: bool) -> None:
        if self.alive:
            self.clockwork.fault("host lost" if hole else "rank killed", self.name, self.instance)
            self.alive = False
            self.transport.die()
            self.world.network.gone(self.links, hole=hole)
            self._end()

    def close(self) -> None:
        """Begin to close in good order."""
        if self.alive and not self.closing:
            self.clockwork.tell(self.name, "closes")
            self.closing = True
            self.manager.stop("the simulator says so")
            self.stir()

    def _end(self) -> None:
        self.alive = False
        self.transport.die()
        self.world.process_over(self)

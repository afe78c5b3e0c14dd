"""Simulated engines: what a scheduler does with rooms, units and its own clock. One per process.

Engines are honest and greedy: a unit is freed in the moment in which the facade says ``released``, and given to the
next room at once, the last freed one first, so that whatever still touches it is caught.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kvbaton.errors import AbortedError, KVBatonError, LocalProtocolError, OverloadedError
from kvbaton.layout import NO_LAYER
from kvbaton.manager import KVPoll, KVReceiver, KVSender, Span
from kvbaton.testing.sim.memory import RankMemory
from kvbaton.testing.sim.scenario import SimRequest, SimStep

if TYPE_CHECKING:
    import random

    from kvbaton.testing.sim.process import Process

ENDED = (KVPoll.Failed, KVPoll.Success)


class Tenancy:
    """One job's hold on some units: while it owns them nobody else's bytes may come there. ``number`` is its own."""

    _numbers = itertools.count(1)

    def __init__(self, job: SimJob) -> None:
        self.number = next(self._numbers)
        self.job = job
        self.units: dict[str, list[int]] = {}

    def __repr__(self) -> str:
        return f"request {self.job.request.number}'s (room {self.job.request.room})"


class SimAllocator:
    """Free units of each pool of one rank. All or nothing; the last freed unit is given out first."""

    def __init__(self, memory: RankMemory, random: random.Random) -> None:
        self.memory = memory
        self._free: dict[str, list[int]] = {}
        for pool in memory.layout.pools:
            self._free[pool.name] = list(range(pool.units))
            random.shuffle(self._free[pool.name])

    def take(self, tenancy: Tenancy, wanted: dict[str, int]) -> bool:
        if any(len(self._free[pool]) < count for pool, count in wanted.items()):
            return False
        for pool, count in wanted.items():
            units = [self._free[pool].pop() for _ in range(count)]
            tenancy.units[pool] = units
            first = self.memory.first_unit[pool]
            for unit in units:
                self.memory.owners[first + unit] = tenancy
            if units:
                self.memory.poison(pool, units)
        return True

    def give_back(self, tenancy: Tenancy) -> list[int]:
        """Free all units of a tenancy; returns them, numbered over all pools."""
        freed = []
        for pool, units in tenancy.units.items():
            first = self.memory.first_unit[pool]
            for unit in units:
                self.memory.owners[first + unit] = None
                freed.append(first + unit)
            self._free[pool].extend(reversed(units))
        tenancy.units = {}
        return freed

    @property
    def taken(self) -> int:
        return sum(1 for owner in self.memory.owners if owner is not None)


class SimJob(ABC):
    """One request on one rank. ``outcome`` is the first terminal poll that was reported, and must stay it."""

    role = ""

    def __init__(self, process: Process, request: SimRequest) -> None:
        self.process = process
        self.request = request
        self.tenancy = Tenancy(self)
        self.side: KVSender | KVReceiver | None = None
        self.started_at = process.clockwork.now
        self.outcome: KVPoll | None = None
        self.ended_at: float | None = None
        self.refused = False
        self.over = False

    def __repr__(self) -> str:
        return f"request {self.request.number} (room {self.request.room}) as {self.role} on {self.process.name}"

    @property
    def aborts_here(self) -> bool:
        return not self.request.lone_abort or self.process.number == 0

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        """The engine's own timer: it waits while the process is stopped, and dies with it."""
        process = self.process

        def fire() -> None:
            if not process.alive or self.over:
                return
            if process.paused_until > process.clockwork.now:
                process.clockwork.at(process.paused_until, fire)
            else:
                action()

        process.clockwork.after(seconds, fire)

    def begin(self) -> None:
        try:
            self.side = self.open()
        except (LocalProtocolError, OverloadedError) as error:
            self.process.clockwork.tell(self.process.name, f"engine: {self} refused: {error}")
            self.refused = self.over = True
            self.process.world.job_over(self)
            return
        self.process.clockwork.tell(self.process.name, f"engine: {self} begins")
        self.schedule()

    @abstractmethod
    def open(self) -> KVSender | KVReceiver: ...

    @abstractmethod
    def schedule(self) -> None: ...

    def look(self) -> None:
        """The room may have changed: go on, or let go."""
        if self.over or self.side is None:
            return
        if self.side.freed:
            self.free()
        if self.side.released:
            self.end()
        else:
            self.go_on()

    @abstractmethod
    def go_on(self) -> None: ...

    def abort(self) -> None:
        if self.side is not None and not self.over:
            self.process.clockwork.tell(self.process.name, f"engine: {self} aborts")
            self.process.clockwork.faults[f"abort at the {self.role}"] += 1
            self.process.world.judge.aborted(self)
            self.side.fail(AbortedError("the client has gone", room=self.request.room))

    def free(self) -> None:
        """Nothing touches the units any more, whatever becomes of the room."""
        freed = self.process.engine.allocator.give_back(self.tenancy)
        if freed:
            self.process.clockwork.tell(self.process.name, f"engine: {self} frees {len(freed)} units")
            self.process.world.judge.freed(self, freed)

    def end(self) -> None:
        """Concluded."""
        self.over = True
        self.process.world.judge.released(self)
        self.process.clockwork.tell(self.process.name, f"engine: {self} over")
        self.process.engine.forget(self)
        self.process.engine.look_at_all()
        self.process.world.job_over(self)


class SourceJob(SimJob):
    """A prompt that is prefilled: computed chunk by chunk, or layers of chunks in any order; each step is submitted as
    soon as the room waits for input."""

    role = "source"

    def __init__(self, process: Process, request: SimRequest) -> None:
        super().__init__(process, request)
        self._steps = request.steps or tuple(SimStep(number) for number in range(len(request.chunks)))
        self._step_every = request.chunk_every * len(request.chunks) / len(self._steps)
        self._computed = 0
        self._submitted = 0
        self._begin: int | None = None
        self._allocated = False
        self._ready: set[int] = set()
        self._life = 0  # how often it was preempted: what was planned before is void
        self._evicted = False

    def open(self) -> KVSender:
        return self.process.manager.sender(self.request.room)

    def schedule(self) -> None:
        if self.request.source_abort is not None and self.aborts_here:
            self.later(self.request.source_abort, self.abort)
        if self.request.preempt is not None:
            self.later(self.request.preempt, self._preempt)
        self.go_on()

    def _preempt(self) -> None:
        """Our units are wanted by others: they are free as soon as nothing reads them, and all is computed again."""
        side = self.side
        if not isinstance(side, KVSender) or side.poll() in ENDED or not self._allocated:
            return
        try:
            if not side.withdraw():
                return
        except LocalProtocolError:
            return  # the rank is closing
        self.process.clockwork.fault("preempted", self.process.name, f"{self}")
        self._life, self._evicted = self._life + 1, True
        self._computed = self._submitted = 0
        self._begin, self._ready = None, set()
        self.go_on()

    def go_on(self) -> None:
        if not isinstance(self.side, KVSender) or self.side.poll() in ENDED:
            return
        if self._evicted:
            if not self.side.settled:
                return
            self.free()
            self._evicted = self._allocated = False
        if not self._allocated:
            if not self.request.eager and self.side.poll() < KVPoll.WaitingForInput:
                return
            tokens = self.request.tokens
            wanted = {p.name: -(-tokens // p.rows) if p.paged else 1 for p in self.process.memory.layout.pools}
            self._allocated = self.process.engine.allocator.take(self.tenancy, wanted)
            if not self._allocated:
                self.process.clockwork.faults["pool full"] += 1
                return
            self._compute_later()
        self._submit_what_is_computed()

    def _compute_later(self) -> None:
        life = self._life
        self.later(self._step_every, lambda: self._compute(life))

    def _compute(self, life: int) -> None:
        if self.side is None or self.side.poll() in ENDED or life != self._life:
            return
        self._computed += 1
        if self._computed < len(self._steps):
            self._compute_later()
        self._submit_what_is_computed()

    def _submit_what_is_computed(self) -> None:
        side = self.side
        while isinstance(side, KVSender) and self._submitted < self._computed and side.poll() not in ENDED:
            if not self.request.eager and side.poll() < KVPoll.WaitingForInput:
                return
            number, self._submitted = self._submitted, self._submitted + 1
            try:
                self._submit(side, number)
            except LocalProtocolError:
                return  # the rank is closing

    def _submit(self, side: KVSender, number: int) -> None:
        stops = self.request.chunks
        if self._begin is None:
            prefix = side.prefix_len if self.request.skip_prefix and not self.request.eager else 0
            page = self.process.group.page_size
            self._begin = prefix if prefix >= self.request.tokens else prefix // page * page
        step, last = self._steps[number], number == len(self._steps) - 1
        start = min(max(self._begin, stops[step.chunk - 1] if step.chunk else 0), stops[step.chunk])
        stop, layers = stops[step.chunk], self._layers(step)
        final = last or (step.stop > 0 and stop == self.request.tokens)  # slots: the state of each layer, and aux
        if (start >= stop and not final) or not (layers or last):
            return
        if self.request.gap == number > 0 and not last:
            return
        spans = []
        for pool in self.process.memory.layout.pools:
            if pool.paged:
                first, after = start // pool.rows, -(-stop // pool.rows)
                units = self.tenancy.units[pool.name][first:after] if start < stop else []
                spans.append(Span(pool.name, start, stop, tuple(units)))
            elif final:
                spans.append(Span(pool.name, 0, 0, tuple(self.tenancy.units[pool.name])))
        if last:
            layers = (*layers, NO_LAYER)
        if self.request.ready_after:
            self.process.clockwork.faults["fence opens late"] += 1
            life = self._life
            self.later(self.request.ready_after, lambda: self._fill(number, spans, layers, life, stir=True))
        else:
            self._fill(number, spans, layers, self._life, stir=False)
        self.process.clockwork.tell(self.process.name, f"engine: {self} submits tokens {start}..{stop} of {layers}")
        some = (step.start, step.stop) if step.stop and layers != (NO_LAYER,) else None
        side.submit(spans, last=last, ready=lambda: self._is_ready(number), layers=some)

    def _layers(self, step: SimStep) -> tuple[int, ...]:
        """Those of a step that this rank has."""
        here = {plane.layer for pool in self.process.memory.layout.pools for plane in pool.planes} - {NO_LAYER}
        return tuple(sorted(layer for layer in here if not step.stop or step.start <= layer < step.stop))

    def _is_ready(self, number: int) -> bool:
        if number in self._ready and number + 1 == self.request.ready_raises:
            self.process.clockwork.fault("fence raises", self.process.name, f"chunk {number} of {self}")
            self.process.world.judge.fence_raised(self)
            raise RuntimeError("the accelerator has failed")
        return number in self._ready

    def _fill(self, number: int, spans: Sequence[Span], layers: Sequence[int], life: int, *, stir: bool) -> None:
        """The accelerator has written these layers of the chunk."""
        if self.over or life != self._life:
            return
        for span in spans:
            if span.units:
                first = span.token_start // self.process.group.page_size
                seed = self.request.number
                self.process.memory.fill(span.pool, seed, span.token_start, span.token_stop, span.units, first, layers)
        self._ready.add(number)
        if stir:
            self.process.stir()


class TargetJob(SimJob):
    """A prompt that is expected: units are published when there are enough, and read once the room has succeeded."""

    role = "target"

    def __init__(self, process: Process, request: SimRequest, sources: Sequence[str]) -> None:
        super().__init__(process, request)
        self._sources = sources
        self._due = False
        self.spans: list[Span] = []
        self.opened_at: float | None = None

    def open(self) -> KVReceiver:
        manager, room = self.process.manager, self.request.room
        if not self.request.declines:
            return manager.receiver(room, self._sources)
        self.process.world.judge.aborted(self)
        self.process.clockwork.faults["room declined"] += 1
        return manager.decline(room, self._sources, "the simulator wants nothing of it")

    def schedule(self) -> None:
        if self.request.declines:
            return
        if self.request.target_abort is not None and self.aborts_here:
            self.later(self.request.target_abort, self.abort)
        self.later(self.request.publish_after, self._publish_now)

    def _publish_now(self) -> None:
        self._due = True
        self.go_on()

    def go_on(self) -> None:
        side = self.side
        if not self._due or self.spans or not isinstance(side, KVReceiver) or side.poll() in ENDED:
            return
        starts = {pool.name: self._start(pool.window) for pool in self.process.memory.layout.pools if pool.paged}
        tokens = self.request.tokens + (self.request.spare or 0)
        wanted = {}
        for pool in self.process.memory.layout.pools:
            start = starts.get(pool.name, 0)
            full = start >= tokens
            wanted[pool.name] = (0 if full else -(-tokens // pool.rows) - start // pool.rows) if pool.paged else 1
        if not self.process.engine.allocator.take(self.tenancy, wanted):
            self.process.clockwork.faults["pool full"] += 1
            return
        for pool in self.process.memory.layout.pools:
            units = tuple(self.tenancy.units[pool.name])
            if pool.paged:
                self.spans.append(Span(pool.name, starts[pool.name], tokens, units))
                self._fill_prefix(pool.name, starts[pool.name], units)
            else:
                self.spans.append(Span(pool.name, 0, 0, units))
        self.process.clockwork.tell(self.process.name, f"engine: {self} publishes {self.spans}")
        try:
            side.publish(self.spans, token_count=None if self.request.spare is not None else tokens)
        except KVBatonError as error:
            self.process.clockwork.tell(self.process.name, f"engine: {self} cannot publish: {error}")

    def _start(self, window: int) -> int:
        page = self.process.group.page_size
        prefix = min(self.request.prefix, self.request.tokens)
        return max(prefix, (self.request.tokens - window) // page * page) if window else prefix

    def _fill_prefix(self, pool: str, start: int, units: Sequence[int]) -> None:
        """Rows of the first page that we hold already: they must stay what they are."""
        page = self.process.group.page_size
        if units and start % page:
            first = start // page
            self.process.memory.fill(pool, self.request.number, first * page, start, units, first)

    def wrong(self, seeds: Sequence[int]) -> str:
        """What in our units is not the content of one of these requests; empty if all is right."""
        page, memory = self.process.group.page_size, self.process.memory
        for span in self.spans:
            first = span.token_start // page
            if not span.units:
                continue
            stop = min(span.token_stop, self.request.tokens) if span.token_stop else 1
            wrong = stop > span.token_start and memory.wrong(
                span.pool, seeds, span.token_start, stop, span.units, first
            )
            if wrong:
                return f"{span.pool} tokens {wrong}"
            if span.token_start % page:
                own = [self.request.number]
                held = memory.wrong(span.pool, own, first * page, span.token_start, span.units, first)
                if held:
                    return f"{span.pool} tokens {held}, which it held already,"
        return ""


class SimEngine:
    """The scheduler of one rank: its jobs and its units."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.allocator = SimAllocator(process.memory, process.clockwork.stream(f"engine {process.name}"))
        self.jobs: list[SourceJob | TargetJob] = []
        self._looking = False

    def add(self, job: SourceJob | TargetJob) -> None:
        self.jobs.append(job)
        job.begin()
        if job.over:
            self.forget(job)

    def forget(self, job: SimJob) -> None:
        self.jobs = [other for other in self.jobs if other is not job]

    def notice(self) -> None:
        """Something was reported: look at it when we get round to it."""
        if self._looking:
            return
        self._looking = True
        process = self._process
        delay = process.group.lazy * process.clockwork.stream(f"lazy {process.name}").random()

        def look() -> None:
            if not process.alive:
                return
            if process.paused_until > process.clockwork.now:
                process.clockwork.at(process.paused_until, look)
                return
            self._looking = False
            self.look_at_all()

        process.clockwork.after(delay, look)

    def look_at_all(self) -> None:
        for job in list(self.jobs):
            job.look()

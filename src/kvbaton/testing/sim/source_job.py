"""A request on a simulated prefill rank: it is computed in steps, and each step is handed over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvbaton.errors import LocalProtocolError
from kvbaton.layout import NO_LAYER
from kvbaton.manager import KVPoll, KVSender, Span
from kvbaton.testing.sim.job import ENDED, SimJob
from kvbaton.testing.sim.scenario import SimRequest, SimStep

if TYPE_CHECKING:
    from kvbaton.testing.sim.process import Process


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
        self._fresh = 0  # the first token that is computed here

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
                first, start = span.token_start // self.process.group.page_size, max(span.token_start, self._fresh)
                seed = self.prompt if span.token_stop else self.request.number
                self.process.memory.fill(span.pool, seed, start, span.token_stop, span.units, first, layers)
        self._ready.add(number)
        if stir:
            self.process.stir()

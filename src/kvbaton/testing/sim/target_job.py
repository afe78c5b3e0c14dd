"""A request on a simulated decode rank: units are taken and published, and what has arrived is compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvbaton.errors import KVBatonError
from kvbaton.manager import KVReceiver, Span
from kvbaton.testing.sim.job import ENDED, SimJob
from kvbaton.testing.sim.scenario import SimRequest

if TYPE_CHECKING:
    from kvbaton.testing.sim.process import Process


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

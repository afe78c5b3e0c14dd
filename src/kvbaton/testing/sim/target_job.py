"""A request on a simulated decode rank: units are taken and published, and what has arrived is compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvbaton.errors import KVBatonError
from kvbaton.layout import Pool
from kvbaton.manager import KVPoll, KVReceiver, Span
from kvbaton.testing.sim.job import ENDED, SimJob
from kvbaton.testing.sim.scenario import SimRequest

if TYPE_CHECKING:
    from kvbaton.testing.sim.process import Process

#: How long a request that could be published may wait for units in its engine's queue; then it is refused.
QUEUE_SECONDS = 60.0


class TargetJob(SimJob):
    """A prompt that is expected: units are published when there are enough, and read once the room has succeeded."""

    role = "target"

    def __init__(self, process: Process, request: SimRequest, sources: Sequence[str]) -> None:
        super().__init__(process, request)
        self._sources = sources
        self._onward = process.world.onward.get(request.number)
        self._due = False
        self.spans: list[Span] = []
        self.opened_at: float | None = None

    def open(self) -> KVReceiver:
        manager, room = self.process.manager, self.request.room
        if self.request.begun == "lost":
            self.process.world.judge.aborted(self)
            self.process.clockwork.faults["room lost by prefill"] += 1
        if not self.request.declines:
            return manager.receiver(room, self._sources, begun=bool(self.request.begun))
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
        self.later(QUEUE_SECONDS, self._refuse)

    def _refuse(self) -> None:
        if not self.spans:
            self.abort()

    def go_on(self) -> None:
        side = self.side
        if not self._due or self.spans or not isinstance(side, KVReceiver) or side.poll() in ENDED:
            return
        tokens = self.request.tokens + (self.request.spare or 0)
        pools = self.process.memory.layout.pools
        wanted = {pool.name: len(self._pages(pool, tokens)) if pool.paged else 1 for pool in pools}
        if not self.process.engine.allocator.take(self.tenancy, wanted):
            self.process.clockwork.faults["pool full"] += 1
            return
        for pool in pools:
            units = tuple(self.tenancy.units[pool.name])
            if not pool.paged:
                self.spans.append(Span(pool.name, 0, 0, units))
                continue
            start, held = self._start(pool.window), self._pages(pool, tokens).start
            self._fill_prefix(pool.name, start, units, held)
            first, after = start // pool.rows - held, -(-tokens // pool.rows) - held
            self.spans.append(Span(pool.name, start, tokens, units[first:after] if start < tokens else ()))
        self.process.clockwork.tell(self.process.name, f"engine: {self} publishes {self.spans}")
        try:
            side.publish(self.spans, token_count=None if self.request.spare is not None else tokens)
        except KVBatonError as error:
            self.process.clockwork.tell(self.process.name, f"engine: {self} cannot publish: {error}")

    def _start(self, window: int) -> int:
        page = self.process.group.page_size
        prefix = min(self.request.prefix, self.request.tokens)
        return max(prefix, (self.request.tokens - window) // page * page) if window else prefix

    def _pages(self, pool: Pool, tokens: int) -> range:
        """Those that units are taken for: what is wanted, and what goes on from here is there as a whole."""
        if self._onward is not None:
            return range(-(-max(tokens, self._onward.tokens) // pool.rows))
        start = self._start(pool.window)
        return range(start // pool.rows, -(-tokens // pool.rows) if start < tokens else start // pool.rows)

    def _fill_prefix(self, pool: str, start: int, units: Sequence[int], first: int) -> None:
        """What we hold already, from page ``first`` on: it must stay what it is."""
        page = self.process.group.page_size
        if units and start > first * page:
            self.process.memory.fill(pool, self.prompt, first * page, start, units, first)

    def free(self) -> None:
        """What has come and goes on to another target stays where it is, as the engine's own; see ``departing``."""
        if self._onward is None or self.side is None or self.side.poll() is not KVPoll.Success:
            super().free()
        else:
            self.process.world.judge.freed(self, [])
            self.process.engine.keep(self._onward, self)

    def wrong(self, seeds: Sequence[int]) -> str:
        """What in our units is not the content of one of these requests; empty if all is right."""
        page, memory = self.process.group.page_size, self.process.memory
        for span in self.spans:
            first = span.token_start // page
            asked = [self.prompt] if span.token_stop and self.prompt != self.request.number else seeds
            if not span.units:
                continue
            stop = min(span.token_stop, self.request.tokens) if span.token_stop else 1
            wrong = stop > span.token_start and memory.wrong(
                span.pool, asked, span.token_start, stop, span.units, first
            )
            if wrong:
                return f"{span.pool} tokens {wrong}"
            if span.token_start % page:
                held = memory.wrong(span.pool, [self.prompt], first * page, span.token_start, span.units, first)
                if held:
                    return f"{span.pool} tokens {held}, which it held already,"
        return ""

"""Simulated engines: what a scheduler does with its jobs, their units and its own clock. One per process.

Engines are honest and greedy: a unit is freed in the moment in which the facade says ``released``, and given to the
next room at once, the last freed one first, so that whatever still touches it is caught.
"""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING

from kvbaton.testing.sim.allocator import SimAllocator, Tenancy
from kvbaton.testing.sim.job import SimJob
from kvbaton.testing.sim.scenario import SimRequest
from kvbaton.testing.sim.source_job import SourceJob
from kvbaton.testing.sim.target_job import TargetJob

if TYPE_CHECKING:
    from kvbaton.testing.sim.process import Process


class SimEngine:
    """The scheduler of one rank: its jobs and its units."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.allocator = SimAllocator(process.memory, process.clockwork.stream(f"engine {process.name}"))
        self.jobs: list[SourceJob | TargetJob] = []
        self._kept: dict[int, Tenancy] = {}
        self._looking = False

    def add(self, job: SourceJob | TargetJob) -> None:
        self.jobs.append(job)
        job.begin()
        if job.over:
            self.forget(job)

    def keep(self, onward: SimRequest, job: TargetJob) -> None:
        """What has come for a job stays until ``onward`` hands it on, or is known never to."""
        if onward.number not in self._kept:
            kept = self._kept[onward.number] = Tenancy(job)
            self.allocator.pass_on(job.tenancy, kept)

    def keeps(self, onward: SimRequest) -> bool:
        return onward.number in self._kept

    def keeps_what_came(self, requests: Container[int]) -> bool:
        """Whether something of these is to be handed on from here."""
        return any(kept.job.request.number in requests for kept in self._kept.values())

    def take_kept(self, onward: SimRequest) -> Tenancy | None:
        """What is handed on from here, once."""
        return self._kept.pop(onward.number, None)

    def drop_kept(self, onward: SimRequest) -> None:
        """It will not be handed on."""
        kept = self.take_kept(onward)
        if kept is not None:
            self.allocator.give_back(kept)
            self.look_at_all()

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

"""Bugs of rooms that are handed on, planted: of an engine that leaves, and of a rank that is source and target at once.

The rules of an engine are those of ``serving/engine/departures``; the simulator's engine keeps them in
``testing/sim/departing``, and there they are broken.
"""

from __future__ import annotations

from typing import Any

from sim_mutants import MUTANTS, Mutant, Patches, mutant

from kvbaton.manager import KVPoll
from kvbaton.protocol.peers import Peers
from kvbaton.protocol.transfers import Transfers
from kvbaton.testing.sim.allocator import Tenancy
from kvbaton.testing.sim.departing import DepartingJob
from kvbaton.testing.sim.engine import SimEngine
from kvbaton.testing.sim.job import SimJob
from kvbaton.testing.sim.source_job import SourceJob
from kvbaton.testing.sim.target_job import TargetJob

_BEFORE = len(MUTANTS)


@mutant("what has failed is handed on as well, while its old source may still write it (our own)", 82)
def failed_room_handed_on(patches: Patches) -> None:
    original = SimJob.look

    def look(self: Any) -> None:
        onward = self._onward if isinstance(self, TargetJob) and self.spans else None
        if onward is not None and not self.over and self.side.poll() is KVPoll.Failed:
            self.process.engine.keep(onward, self)
            self.end()
        else:
            original(self)

    patches.set(SimJob, "look", look)


@mutant("what an engine held before a room came to it stays behind when that is handed on (our own)", 269)
def prefix_left_behind(patches: Patches) -> None:
    original = DepartingJob.open

    def open_(self: Any) -> Any:
        kept = self.process.engine._kept.get(self.request.number)
        starts = [span.token_start for span in kept.job.spans if span.token_stop] if kept is not None else []
        page = self.process.group.page_size
        self._begin = max(starts, default=0) // page * page or None
        return original(self)

    patches.set(DepartingJob, "open", open_)


@mutant("an answer is handed on before its last token has been computed (our own)", 110)
def departure_does_not_wait_for_its_step(patches: Patches) -> None:
    original = SourceJob._is_ready
    patches.set(SourceJob, "_is_ready", lambda self, n: isinstance(self, DepartingJob) or original(self, n))


@mutant("states and the aux row are handed on as they came, not as they are now (our own)", 110)
def slots_handed_on_as_they_came(patches: Patches) -> None:
    original = SourceJob._fill

    def fill(self: Any, number: int, spans: Any, *rest: Any, **more: Any) -> None:
        kept = [span for span in spans if span.token_stop] if isinstance(self, DepartingJob) else spans
        original(self, number, kept, *rest, **more)

    patches.set(SourceJob, "_fill", fill)


@mutant("an answer goes on being computed in the units that it is handed on from (our own)", 148)
def answer_goes_on_while_it_departs(patches: Patches) -> None:
    original = SourceJob._submit

    def submit(self: Any, side: Any, number: int) -> None:
        original(self, side, number)
        if isinstance(self, DepartingJob):
            for pool in self.process.memory.layout.pools:
                if not pool.paged:
                    self.process.memory.fill(pool.name, self.request.number + 1, 0, 0, self.tenancy.units[pool.name], 0)

    patches.set(SourceJob, "_submit", submit)


@mutant("units are free when their room has ended, although they are handed on (our own)", 322)
def handed_on_units_freed_with_their_first_room(patches: Patches) -> None:
    def keep(self: Any, onward: Any, job: Any) -> None:
        if onward.number not in self._kept:
            kept = self._kept[onward.number] = Tenancy(job)
            kept.units = {pool: list(units) for pool, units in job.tenancy.units.items()}
            self.allocator.give_back(job.tenancy)

    patches.set(SimEngine, "keep", keep)


#: Those above, rules of an engine that leaves; two ranks that send to each other show those below as well.
ONWARD_ONLY: list[Mutant] = MUTANTS[_BEFORE:]


@mutant("what is forgotten of a peer's writes to us is refused of our writes to it (our own)", 9)
def forgotten_in_either_role(patches: Patches) -> None:
    original = Transfers._forget

    def forget(self: Any, address: Any) -> None:
        original(self, address)
        self._refuse_below(address[0], address[2].id)

    patches.set(Transfers, "_forget", forget)


@mutant("a peer in both roles has one session, whichever came first (our own)")
def one_session_for_both_roles(patches: Patches) -> None:
    def of(self: Any, instance: str, _role: Any) -> Any:
        return self._by_instance.get((instance, "target")) or self._by_instance.get((instance, "source"))

    patches.set(Peers, "of", of)

"""The units of one simulated rank: the last freed one goes first, so that whatever still touches it is caught."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from kvbaton.testing.sim.memory import RankMemory

if TYPE_CHECKING:
    import random

    from kvbaton.testing.sim.job import SimJob


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

    def pass_on(self, before: Tenancy, after: Tenancy) -> None:
        """All units of one tenancy are another's from now on, as they are."""
        after.units, before.units = before.units, {}
        for pool, units in after.units.items():
            for unit in units:
                self.memory.owners[self.memory.first_unit[pool] + unit] = after

    @property
    def taken(self) -> int:
        return sum(1 for owner in self.memory.owners if owner is not None)

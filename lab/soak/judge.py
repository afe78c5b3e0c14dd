"""Whether something grew: a straight line through what was held after the warm-up, against its own noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lab.soak.config import SoakConfig
from lab.soak.run import Half

#: What is judged for growth: name, and below what a difference is rounding. Memory comes in arenas of 1 MiB, Python's
#: and the C library's: one of each. More rooms make the same rounding a smaller leak. What Python holds is counted in
#: blocks of its allocator: a rank has half a million, knows no fragmentation there, and 1 % is a table that fills.
WATCHED = {"rss_kib": 2048.0, "python_blocks": 5000.0, "threads": 0.5, "fds": 1.0, "transport_regions": 0.5}
#: A growth is noise if it is less than so many standard deviations of the residuals.
DEVIATIONS = 3.0


@dataclass(frozen=True, slots=True)
class Slope:
    """Growth of one quantity after the warm-up. ``growth``: slope times the judged rooms, in the quantity's unit."""

    survivor: str
    name: str
    per_thousand_rooms: float
    growth: float
    noise: float
    least: float
    most: float

    @property
    def ok(self) -> bool:
        return self.growth <= max(DEVIATIONS * self.noise, WATCHED[self.name])


def slopes(config: SoakConfig, halves: Sequence[Half]) -> list[Slope]:
    return [_slope(config, half, name) for half in halves for name in WATCHED]


def _slope(config: SoakConfig, half: Half, name: str) -> Slope:
    begin = config.warmup * half.samples[-1].rooms
    judged = [sample for sample in half.samples if sample.rooms >= begin]
    rooms = np.array([sample.rooms for sample in judged], dtype=float)
    held = np.array([sample.sizes.get(name, 0) for sample in judged], dtype=float)
    slope, offset = np.polyfit(rooms, held, 1)
    noise = float(np.std(held - (slope * rooms + offset)))
    growth = float(slope * (rooms[-1] - rooms[0]))
    return Slope(half.survivor, name, float(slope * 1000), growth, noise, float(held.min()), float(held.max()))


def complaints(config: SoakConfig, halves: Sequence[Half]) -> list[str]:
    """Everything that must not be; empty when the soak is passed."""
    found = []
    for slope in slopes(config, halves):
        if not slope.ok:
            found.append(
                f"{slope.name} of the {slope.survivor} grew by {slope.growth:.1f} after the warm-up "
                f"({slope.per_thousand_rooms:.2f} per 1,000 rooms), noise {slope.noise:.1f}"
            )
    for half in halves:
        if half.left and any(half.left.values()):
            found.append(f"the {half.survivor} still held {half.left} at the end")
        corrupt = half.outcomes["corrupt"] + half.peer_outcomes["corrupt"]
        if corrupt:
            found.append(f"CORRUPT: {corrupt} rooms while the {half.survivor} lived on")
    return found

"""What was measured of one prompt length: every round, by way, and what moving and computing it take."""

from __future__ import annotations

import statistics
from typing import Literal

from msgspec import Struct, field

Way = Literal["without", "ahead"]
WAYS: tuple[Way, Way] = ("without", "ahead")


def _by_way() -> dict[str, list[float]]:
    return {way: [] for way in WAYS}


class Case(Struct, kw_only=True):
    """Seconds. ``first``: until the target has everything, and with it the first token; ``exposed``: of that, after the
    last chunk was submitted; ``cpu``: of the processors, on both sides. ``writes``: posted for it. ``moving``: of the
    whole chunk; ``computing``: all layers."""

    tokens: int
    bytes: int = 0
    moving: float = 0.0
    computing: float = 0.0
    first: dict[str, list[float]] = field(default_factory=_by_way)
    exposed: dict[str, list[float]] = field(default_factory=_by_way)
    cpu: dict[str, list[float]] = field(default_factory=_by_way)
    writes: dict[str, int] = field(default_factory=dict)

    def note(self, way: Way, first: float, exposed: float, cpu: float, writes: int) -> None:
        self.first[way].append(first)
        self.exposed[way].append(exposed)
        self.cpu[way].append(cpu)
        self.writes[way] = writes

    @property
    def ratio(self) -> float:
        """Of the medians of the time to the first token: with layers ahead, of that without."""
        return statistics.median(self.first["ahead"]) / statistics.median(self.first["without"])

    def milliseconds(self) -> list[float]:
        """Medians: first without and ahead, exposed without and ahead, and so of the processors' time."""
        return [statistics.median(times[way]) * 1e3 for times in (self.first, self.exposed, self.cpu) for way in WAYS]

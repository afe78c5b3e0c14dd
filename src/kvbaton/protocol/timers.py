"""A table of deadlines: at most one per (owner, name), ordered by time."""

from __future__ import annotations

import heapq
from typing import Generic, TypeVar

Owner = TypeVar("Owner")


class Timers(Generic[Owner]):
    """Deadlines of many owners. Cancelled and replaced entries are dropped lazily; the heap stays within 2 × live."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Owner, str]] = []
        self._live: dict[tuple[Owner, str], tuple[float, int]] = {}
        self._serial = 0

    def set(self, owner: Owner, name: str, when: float) -> None:
        self._serial += 1
        self._live[owner, name] = (when, self._serial)
        heapq.heappush(self._heap, (when, self._serial, owner, name))
        if len(self._heap) > 64 + 2 * len(self._live):
            self._heap = [(*self._live[key], *key) for key in self._live]
            heapq.heapify(self._heap)

    def cancel(self, owner: Owner, *names: str) -> None:
        for name in names:
            self._live.pop((owner, name), None)

    def get(self, owner: Owner, name: str) -> float | None:
        entry = self._live.get((owner, name))
        return entry[0] if entry else None

    def next(self) -> float | None:
        """The earliest deadline, None if there is none."""
        while self._heap and not self._is_live(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def pop_due(self, now: float) -> tuple[Owner, str] | None:
        """Remove and return one deadline that has passed, the earliest first; None if there is none."""
        when = self.next()
        if when is None or when > now:
            return None
        _, _, owner, name = heapq.heappop(self._heap)
        del self._live[owner, name]
        return owner, name

    def __len__(self) -> int:
        return len(self._live)

    @property
    def entries(self) -> int:
        """Entries of the heap, those that are to be dropped included."""
        return len(self._heap)

    def _is_live(self, entry: tuple[float, int, Owner, str]) -> bool:
        return self._live.get((entry[2], entry[3])) == (entry[0], entry[1])

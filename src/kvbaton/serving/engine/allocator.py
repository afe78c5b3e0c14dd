"""Free lists of ids: who holds which unit is decided here, and given back is only what is out."""

from __future__ import annotations

from collections.abc import Sequence

from kvbaton.errors import CapacityError, ConfigError, InternalError


class Allocator:
    """A free list of ``units`` ids. ``free`` and ``used`` may be read from any thread."""

    def __init__(self, units: int, noun: str) -> None:
        if units < 1:
            raise ConfigError(f"a pool needs at least one {noun}, not {units}")
        self._units = units
        self._noun = noun
        self._free = list(range(units - 1, -1, -1))
        self._taken = bytearray(units)

    @property
    def available(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self._units - len(self._free)

    @property
    def units(self) -> int:
        return self._units

    def too_full(self, count: int) -> bool:
        """Whether ``count`` ids cannot be had now. CapacityError where they never can be."""
        if count > self._units:
            raise CapacityError(f"{count} {self._noun}s never fit a pool of {self._units}")
        return count > len(self._free)

    def allocate(self, count: int) -> tuple[int, ...] | None:
        """``count`` ids, or None where there are not that many free now. CapacityError where there never can be."""
        if self.too_full(count):
            return None
        taken = tuple(self._free.pop() for _ in range(count))
        for unit in taken:
            self._taken[unit] = 1
        return taken

    def free(self, units: Sequence[int]) -> None:
        """Return ids. InternalError, with nothing changed, where one of them is not out."""
        distinct = set(units)
        wrong = [unit for unit in distinct if not (0 <= unit < self._units and self._taken[unit])]
        if wrong or len(distinct) != len(units):
            raise InternalError(f"{self._noun}s {sorted(wrong) or list(units)} are given back but are not out")
        for unit in units:
            self._taken[unit] = 0
            self._free.append(unit)

    def __repr__(self) -> str:
        return f"Allocator({self._noun}: {self.used} used, {self.available} free)"

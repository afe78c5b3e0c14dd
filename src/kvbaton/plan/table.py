"""Descriptor tables: blocks of memory as strided rows of integers, addressed by entry number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from kvbaton.layout import MemoryKind


@dataclass(frozen=True, kw_only=True)
class Table:
    """Addressable blocks on one side of a peering.

    Args:
        rows: int64 array of shape ``[n, 5]``: address, length, device, stride, count. Row r stands for ``count``
            blocks of ``length`` bytes, ``stride`` bytes apart. Entries are numbered row by row: the blocks of
            row 0, then those of row 1, and so on. All values in bytes except device and count.
        memory: memory kind of all rows.
    """

    rows: NDArray[np.int64]
    memory: MemoryKind = "DRAM"

    @cached_property
    def entries(self) -> int:
        """Blocks of all rows."""
        return int(self.rows[:, 4].sum())

    def addresses(self, entries: NDArray[np.int64] | NDArray[np.int32]) -> NDArray[np.int64]:
        """Addresses of the given entries."""
        row, block = self._locate(entries)
        addresses: NDArray[np.int64] = self.rows[row, 0] + block * self.rows[row, 3]
        return addresses

    def lengths(self, entries: NDArray[np.int64] | NDArray[np.int32]) -> NDArray[np.int64]:
        """Lengths in bytes of the given entries."""
        row, _ = self._locate(entries)
        lengths: NDArray[np.int64] = self.rows[row, 1]
        return lengths

    def _locate(self, entries: NDArray[np.int64] | NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        ends = np.cumsum(self.rows[:, 4])
        row = np.searchsorted(ends, entries, side="right")
        return row, entries - (ends[row] - self.rows[row, 4])


def join(tables: Sequence[Table]) -> Table:
    """Tables of one kind of memory as one: the rows of each follow those of the one before, and so do its entries."""
    if len(tables) == 1:
        return tables[0]
    return Table(rows=np.concatenate([table.rows for table in tables]), memory=tables[0].memory)

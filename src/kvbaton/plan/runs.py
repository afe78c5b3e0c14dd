"""Coalesced runs: table entries turned into (source address, target address, length), merged where adjacent.

The number of runs is what a write costs; transports that merge by themselves (NIXL) never need this file, everything
that moves bytes itself or explains a plan does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvbaton.plan.table import Table


@dataclass(frozen=True, kw_only=True, slots=True)
class Runs:
    """Equal-length arrays of runs; every run is contiguous on both sides. Bytes."""

    source: NDArray[np.int64]
    target: NDArray[np.int64]
    length: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.length)

    @property
    def bytes(self) -> int:
        return int(self.length.sum())


def merge(source: Table, source_entries: NDArray[np.int32], target: Table, target_entries: NDArray[np.int32]) -> Runs:
    """Runs of a write, neighbours that are adjacent on both sides merged into one. O(entries), vectorised."""
    source_at = source.addresses(source_entries)
    target_at = target.addresses(target_entries)
    length = source.lengths(source_entries)
    if not len(length):
        return Runs(source=source_at, target=target_at, length=length)
    adjacent = (source_at[1:] == source_at[:-1] + length[:-1]) & (target_at[1:] == target_at[:-1] + length[:-1])
    starts = np.flatnonzero(np.concatenate(([True], ~adjacent)))
    return Runs(source=source_at[starts], target=target_at[starts], length=np.add.reduceat(length, starts))

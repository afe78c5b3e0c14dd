"""Proof by enumeration that a plan is right: nothing out of bounds, nothing written twice, nothing missing.

Bounds are checked at the handshake, before a peer's tables are used; overlap in tests and tools. Coverage over the
ranks of a source group is :func:`kvbaton.plan.pair.check_coverage`.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from kvbaton.errors import LayoutError
from kvbaton.layout import CacheLayout, Region
from kvbaton.plan.pair import PairPlan
from kvbaton.plan.runs import Runs
from kvbaton.plan.table import Table


def check_bounds(pair: PairPlan, source: CacheLayout, target: CacheLayout) -> None:
    """Raise LayoutError if any table row of ``pair`` leaves the regions of its side."""
    for part in pair.parts:
        _check_table(part.source.table, source.regions, f"part {part.id}, source")
        _check_table(part.target.table, target.regions, f"part {part.id}, target")


def _check_table(table: Table, regions: Iterable[Region], where: str) -> None:
    rows = table.rows
    ends = rows[:, 0] + (rows[:, 4] - 1) * rows[:, 3] + rows[:, 1]
    inside = np.zeros(len(rows), dtype=bool)
    for region in regions:
        inside |= (rows[:, 0] >= region.address) & (ends <= region.address + region.length)
    if not inside.all():
        bad = int(np.flatnonzero(~inside)[0])
        raise LayoutError(f"{where}: table row {rows[bad].tolist()} is outside every registered region")


def check_disjoint(writes: Iterable[Runs]) -> None:
    """Raise LayoutError if two runs write the same byte of the target."""
    starts = np.concatenate([runs.target for runs in writes])
    lengths = np.concatenate([runs.length for runs in writes])
    order = np.argsort(starts, kind="stable")
    starts, lengths = starts[order], lengths[order]
    overlapping = np.flatnonzero(starts[1:] < starts[:-1] + lengths[:-1])
    if len(overlapping):
        raise LayoutError(f"two runs write the byte at {int(starts[overlapping[0] + 1])}")

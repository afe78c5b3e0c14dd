"""The lanes of a part as grids in memory: what gather and scatter copy at once.

A block is one piece of every lane, and lanes are regular: the rows of a page at one distance, the tensors of a layer
at another, layers at a third. So the pieces of a block are, on either side, a few *grids*: nested distances, from the
first piece of the block on. Where pieces are dense they are one longer piece. All of it follows from the plan, once for
each pair of ranks; a copy only says which blocks. Pure arithmetic; no memory is touched here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvbaton.layout import MemoryKind
from kvbaton.plan.table import Table

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]

#: Columns of a table's rows.
_ADDRESS, _STRIDE = 0, 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """Pieces of ``length`` bytes, ``counts`` of them at ``steps`` from each other, outermost first.

    In pages, block b begins at ``base + index(b) * unit``; in a slot's block, pieces follow each other from ``offset``
    on. ``units`` entries of a lane are one block position of all units, each ``unit_steps`` from the next; from one
    position to the next it is ``position_steps``. Bytes, but for counts, indices and steps of units.
    """

    base: int
    unit: int
    rows: int
    units: int
    unit_steps: int
    position_steps: int
    counts: tuple[int, ...]
    steps: tuple[int, ...]
    length: int
    offset: int

    @property
    def bytes(self) -> int:
        """Of one block."""
        return math.prod(self.counts) * self.length

    @property
    def span(self) -> int:
        """Bytes from the first to the last byte in pages."""
        inner = sum((count - 1) * step for count, step in zip(self.counts, self.steps, strict=True))
        return (self.rows - 1) * self.unit + inner + self.length

    @property
    def dense_steps(self) -> tuple[int, ...]:
        """Distances of the pieces in a slot's block."""
        return tuple(math.prod(self.counts[i + 1 :]) * self.length for i in range(len(self.counts)))

    def index(self, blocks: Int32s) -> Int64s:
        """Where blocks (entries of the first lane) begin, in multiples of ``unit`` from ``base``."""
        position, unit = np.divmod(blocks.astype(np.int64), self.units)
        index: Int64s = position * self.position_steps + unit * self.unit_steps
        return index


@dataclass(frozen=True, kw_only=True, slots=True)
class Lanes:
    """One side of a part for gather and scatter. ``device`` is where all of its memory lies."""

    grids: tuple[Grid, ...]
    block_bytes: int
    memory: MemoryKind
    device: int


def lanes_of(table: Table, lane_bytes: Int64s, units: int, positions: int) -> Lanes:
    """The grids of one side. ``table`` has a row for each lane and block position, ``positions`` rows a lane."""
    rows = table.rows.reshape(len(lane_bytes), positions, 5)
    at, unit_stride = rows[:, 0, _ADDRESS], rows[:, 0, _STRIDE]
    position_stride = rows[:, 1, _ADDRESS] - at if positions > 1 else np.zeros_like(at)
    offsets = np.concatenate(([0], np.cumsum(lane_bytes)))
    alike = np.stack((lane_bytes, unit_stride, position_stride))
    ends = [*(np.flatnonzero((alike[:, 1:] != alike[:, :-1]).any(axis=0)) + 1).tolist(), len(lane_bytes)]
    grids: list[Grid] = []
    start = 0
    for end in ends:
        between, position = int(unit_stride[start]), int(position_stride[start])
        unit = math.gcd(between, position) or int(lane_bytes[start])
        for first, counts, steps in _nests(at[start:end]):
            counts, steps, length = _without_dense(counts, steps, int(lane_bytes[start]))
            grids.append(
                Grid(
                    base=int(at[start + first]),
                    unit=unit,
                    rows=((units - 1) * between + (positions - 1) * position) // unit + 1,
                    units=units,
                    unit_steps=between // unit,
                    position_steps=position // unit,
                    counts=counts,
                    steps=steps,
                    length=length,
                    offset=int(offsets[start + first]),
                )
            )
        start = end
    return Lanes(grids=tuple(grids), block_bytes=int(offsets[-1]), memory=table.memory, device=int(table.rows[0, 2]))


_Nest = tuple[int, tuple[int, ...], tuple[int, ...]]


def _nests(at: Int64s) -> Iterator[_Nest]:
    """(first lane, counts, steps) of each grid: one if the addresses nest, else one for each run of equal distances."""
    nest = _nest(at)
    if nest is not None:
        yield (0, *nest)
        return
    start = 0
    for end in [*(np.flatnonzero(np.diff(np.diff(at))) + 2).tolist(), len(at)]:
        if end <= start:
            continue
        step = int(at[start + 1] - at[start]) if end - start > 1 else 1
        if step > 0:
            yield start, (end - start,), (step,)
        else:
            for lane in range(start, end):
                yield lane, (1,), (1,)
        start = end


def _nest(at: Int64s) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Counts and growing distances, outermost first; None if addresses are not nested like that."""
    counts: list[int] = []
    steps: list[int] = []
    while len(at) > 1:
        between = np.diff(at)
        step = int(between[0])
        others = np.flatnonzero(between != step)
        count = int(others[0]) + 1 if len(others) else len(at)
        if step <= 0 or len(at) % count:
            return None
        runs = at.reshape(-1, count)
        if (np.diff(runs, axis=1) != step).any():
            return None
        counts.insert(0, count)
        steps.insert(0, step)
        at = runs[:, 0]
    return tuple(counts), tuple(steps)


def _without_dense(
    counts: tuple[int, ...], steps: tuple[int, ...], length: int
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Pieces that follow each other without a gap are one."""
    while counts and steps[-1] == length:
        length *= counts[-1]
        counts, steps = counts[:-1], steps[:-1]
    return counts, steps, length

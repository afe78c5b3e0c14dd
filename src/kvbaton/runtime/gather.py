"""Gather and scatter between pages and staging slots in host memory, a few large copies at a time.

Lanes that lie at equal distances in every block (the tokens of a page, say) are copied together: one fancy-indexed copy
of shape ``(blocks, lanes, lane bytes)``. Only memory of this process, and only addresses that the plan has checked
against registered regions, are ever passed in.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from kvbaton.table import Table

#: From this size of a block's lanes on, a copy for each block is faster than one indexed copy of all, which goes
#: through a temporary.
LOOP_BYTES = 4096

Bytes = NDArray[np.uint8]
Int64s = NDArray[np.int64]


def memory(address: int, length: int) -> Bytes:
    """The bytes at an address of this process, as an array that shares them."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * length).from_address(address))


def gather(table: Table, lane_bytes: Int64s, entries: NDArray[np.int32], out: Bytes) -> None:
    """Copy table entries (lane by lane, as the plan orders them) into ``out`` of shape ``(blocks, block_bytes)``."""
    for pages, index, columns in _groups(table, lane_bytes, entries, out):
        if columns[0].size >= LOOP_BYTES:
            for number, page in enumerate(index.tolist()):
                columns[number] = pages[page]
        else:
            columns[...] = pages[index]


def scatter(table: Table, lane_bytes: Int64s, entries: NDArray[np.int32], data: Bytes) -> None:
    """The inverse of :func:`gather`: copy ``data`` of shape ``(blocks, block_bytes)`` to the table entries."""
    for pages, index, columns in _groups(table, lane_bytes, entries, data):
        if columns[0].size >= LOOP_BYTES:
            for number, page in enumerate(index.tolist()):
                pages[page] = columns[number]
        else:
            pages[index] = columns


def _groups(
    table: Table, lane_bytes: Int64s, entries: NDArray[np.int32], blocks: Bytes
) -> Iterator[tuple[Bytes, Int64s, Bytes]]:
    """For each group of alike lanes: a view of memory ``(any, lanes, bytes)``, the index of each block in it, and the
    columns of ``blocks`` that belong to the group, in the same shape."""
    lanes, count = len(lane_bytes), len(blocks)
    at = table.addresses(entries).reshape(lanes, count)
    offsets = np.concatenate(([0], np.cumsum(lane_bytes)))
    start = 0
    while start < lanes:
        stop = _group_end(at, lane_bytes, start)
        length, width = int(lane_bytes[start]), stop - start
        step = int(at[start + 1, 0] - at[start, 0]) if width > 1 else length
        base = int(at[start].min())
        index = at[start] - base
        unit = int(np.gcd.reduce(index)) or 1
        index //= unit
        span = int(index.max()) * unit + (width - 1) * step + length
        pages = np.lib.stride_tricks.as_strided(
            memory(base, span), (int(index.max()) + 1, width, length), (unit, step, 1)
        )
        columns = blocks[:, offsets[start] : offsets[stop]].reshape(count, width, length)
        yield pages, index, columns
        start = stop


def _group_end(at: Int64s, lane_bytes: Int64s, start: int) -> int:
    """End of the lanes from ``start`` on that have equal length and lie at equal, growing distances in every block."""
    lanes = len(lane_bytes)
    if start + 1 >= lanes or lane_bytes[start + 1] != lane_bytes[start]:
        return start + 1
    step = at[start + 1, 0] - at[start, 0]
    if step < lane_bytes[start] or (at[start + 1] - at[start] != step).any():
        return start + 1
    alike = (np.diff(at[start:], axis=0) == step).all(axis=1) & (lane_bytes[start + 1 :] == lane_bytes[start])
    different = np.flatnonzero(~alike)
    return start + 1 + (int(different[0]) if len(different) else lanes - start - 1)

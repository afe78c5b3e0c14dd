"""Gather and scatter between pages and staging slots, a few large copies at a time.

Lanes that lie at equal distances in every block (the tokens of a page, say) are copied together: one indexed copy of
shape ``(blocks, lanes, lane bytes)``. Host memory is copied with numpy here, memory of a GPU with torch in
``gather_torch``, which is imported only there. Both return when the bytes are in place. Only memory of this process,
and only addresses that the plan has checked against registered regions, are ever passed in.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvbaton.plan.table import Table

#: From this size of a block's lanes on, a copy for each block is faster than one indexed copy of all, which goes
#: through a temporary.
LOOP_BYTES = 4096

Bytes = NDArray[np.uint8]
Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneGroup:
    """Lanes that are copied together. In pages, the piece of block b and lane i begins at
    ``base + index[b] * unit + i * step``; in a slot's block, at ``offset + i * length``. All in bytes but ``index``."""

    base: int
    index: Int64s
    unit: int
    lanes: int
    step: int
    length: int
    offset: int

    @property
    def rows(self) -> int:
        """Units that the index reaches over."""
        return int(self.index.max()) + 1

    @property
    def span(self) -> int:
        """Bytes from the first to the last byte in pages."""
        return (self.rows - 1) * self.unit + (self.lanes - 1) * self.step + self.length

    @property
    def columns(self) -> slice:
        """Bytes of a slot's block that belong to the group."""
        return slice(self.offset, self.offset + self.lanes * self.length)


def memory(address: int, length: int) -> Bytes:
    """The bytes at an address of this process, as an array that shares them."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * length).from_address(address))


def gather(table: Table, lane_bytes: Int64s, entries: Int32s, slot: int) -> None:
    """Copy table entries (lane by lane, as the plan orders them) block by block to address ``slot`` of the same device.

    Raises TransportError where the device refuses.
    """
    if table.memory == "VRAM":
        from kvbaton.runtime import gather_torch  # torch is not needed without a GPU

        gather_torch.gather(table, lane_bytes, entries, slot)
        return
    for group, blocks in _host_groups(table, lane_bytes, entries, slot):
        pages, columns = _pages(group), _columns(group, blocks)
        if columns[0].size >= LOOP_BYTES:
            for number, page in enumerate(group.index.tolist()):
                columns[number] = pages[page]
        else:
            columns[...] = pages[group.index]


def scatter(table: Table, lane_bytes: Int64s, entries: Int32s, slot: int) -> None:
    """The inverse of :func:`gather`: copy the blocks at address ``slot`` to the table entries.

    Raises TransportError where the device refuses.
    """
    if table.memory == "VRAM":
        from kvbaton.runtime import gather_torch

        gather_torch.scatter(table, lane_bytes, entries, slot)
        return
    for group, blocks in _host_groups(table, lane_bytes, entries, slot):
        pages, columns = _pages(group), _columns(group, blocks)
        if columns[0].size >= LOOP_BYTES:
            for number, page in enumerate(group.index.tolist()):
                pages[page] = columns[number]
        else:
            pages[group.index] = columns


def lane_groups(table: Table, lane_bytes: Int64s, entries: Int32s) -> Iterator[LaneGroup]:
    """The lanes of all blocks of ``entries``, in as few groups as their addresses allow. Touches no memory."""
    lanes = len(lane_bytes)
    at = table.addresses(entries).reshape(lanes, -1)
    offsets = np.concatenate(([0], np.cumsum(lane_bytes)))
    start = 0
    while start < lanes:
        stop = _group_end(at, lane_bytes, start)
        length, width = int(lane_bytes[start]), stop - start
        base = int(at[start].min())
        index = at[start] - base
        unit = int(np.gcd.reduce(index)) or length
        yield LaneGroup(
            base=base,
            index=index // unit,
            unit=unit,
            lanes=width,
            step=int(at[start + 1, 0] - at[start, 0]) if width > 1 else length,
            length=length,
            offset=int(offsets[start]),
        )
        start = stop


def _host_groups(table: Table, lane_bytes: Int64s, entries: Int32s, slot: int) -> Iterator[tuple[LaneGroup, Bytes]]:
    """Each group, with the slot's blocks as an array ``(blocks, block bytes)``."""
    count, size = len(entries) // len(lane_bytes), int(lane_bytes.sum())
    blocks = memory(slot, count * size).reshape(count, size)
    for group in lane_groups(table, lane_bytes, entries):
        yield group, blocks


def _pages(group: LaneGroup) -> Bytes:
    """A view of pages, ``(any, lanes, length)``, that ``group.index`` indexes."""
    shape, strides = (group.rows, group.lanes, group.length), (group.unit, group.step, 1)
    return np.lib.stride_tricks.as_strided(memory(group.base, group.span), shape, strides)


def _columns(group: LaneGroup, blocks: Bytes) -> Bytes:
    """The group's part of a slot's blocks, ``(blocks, lanes, length)``."""
    return blocks[:, group.columns].reshape(len(blocks), group.lanes, group.length)


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

"""Gather and scatter between pages and staging slots: whole blocks, as strided views of memory.

The lanes of a block are a few grids (``plan.lanes``), known once for a pair of ranks, so that a block is a handful of
strided copies however many tokens, heads and layers it has. Host memory is copied with numpy here, memory of a GPU with
torch in ``gather_torch``, which is imported only there. Both return when the bytes are in place. Only memory of this
process, and only addresses that the plan has checked against registered regions, are ever passed in.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from kvbaton.plan.lanes import Grid, Lanes

#: From this size of a block on, a copy for each block is faster than one indexed copy of all, which goes through a
#: temporary.
LOOP_BYTES = 4096

Bytes = NDArray[np.uint8]
Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]
Pieces = NDArray[np.void]


def memory(address: int, length: int) -> Bytes:
    """The bytes at an address of this process, as an array that shares them."""
    return np.frombuffer(memoryview((ctypes.c_uint8 * length).from_address(address)), np.uint8)


def gather(lanes: Lanes, blocks: Int32s, slot: int) -> None:
    """Copy blocks, entries of the first lane, to address ``slot`` of the same device, one after the other.

    Raises TransportError where the device refuses.
    """
    if lanes.memory == "VRAM":
        from kvbaton.runtime import gather_torch  # torch is not needed without a GPU

        gather_torch.gather(lanes, blocks, slot)
        return
    for pages, index, places in _views(lanes, blocks, slot):
        if places[0].nbytes >= LOOP_BYTES:
            for number, page in enumerate(index.tolist()):
                places[number] = pages[page]
        else:
            places[...] = pages[index]


def scatter(lanes: Lanes, blocks: Int32s, slot: int) -> None:
    """The inverse of :func:`gather`: copy what is at address ``slot`` to blocks, entries of the first lane.

    Raises TransportError where the device refuses.
    """
    if lanes.memory == "VRAM":
        from kvbaton.runtime import gather_torch

        gather_torch.scatter(lanes, blocks, slot)
        return
    for pages, index, places in _views(lanes, blocks, slot):
        if places[0].nbytes >= LOOP_BYTES:
            for number, page in enumerate(index.tolist()):
                pages[page] = places[number]
        else:
            pages[index] = places


def _views(lanes: Lanes, blocks: Int32s, slot: int) -> Iterator[tuple[Pieces, Int64s, Pieces]]:
    """For each grid: its pages as ``(any, *counts)`` pieces, the index of each block in them, and the grid's part of
    the slot as ``(blocks, *counts)`` pieces."""
    for grid in lanes.grids:
        taken = (len(blocks) - 1) * lanes.block_bytes + grid.bytes
        yield (
            _pieces(grid, grid.base, grid.span, (grid.rows, *grid.counts), (grid.unit, *grid.steps)),
            grid.index(blocks),
            _pieces(
                grid, slot + grid.offset, taken, (len(blocks), *grid.counts), (lanes.block_bytes, *grid.dense_steps)
            ),
        )


def _pieces(grid: Grid, address: int, span: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Pieces:
    """A view of pieces as opaque items, which numpy moves whole."""
    return np.ndarray(shape, np.dtype((np.void, grid.length)), memory(address, span), strides=strides)

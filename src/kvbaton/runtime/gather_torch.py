"""Gather and scatter of ``gather``, in torch: for memory of a GPU, whose pages are reached by raw pointers.

Copies run on a stream of their own, so that they wait for nothing that the engine computes, and are over when a call
returns: the write that follows may be posted, the success that follows may be reported. What the engine writes into
pages is in memory before, because a chunk waits for its fence. Words as wide as all offsets allow are copied, not
bytes. The same code runs on tensors of host memory; that is how it is tested without a GPU. Of torch only this file
of the runtime knows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvbaton.errors import TransportError
from kvbaton.plan.lanes import Grid, Lanes
from kvbaton.runtime.gather import Int32s, memory

#: By bytes of a word.
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def device_memory(length: int, device: int) -> tuple[object, int]:
    """Bytes of a GPU that are not zeroed: what owns them, and their address."""
    buffer = torch.empty(length, dtype=torch.uint8, device=f"cuda:{device}")
    return buffer, buffer.data_ptr()


def gather(lanes: Lanes, blocks: Int32s, slot: int) -> None:
    """Copy blocks to address ``slot`` of the same device. Raises TransportError."""
    device = _device(lanes)
    with _copying(device):
        for pages, index, places in _views(lanes, blocks, slot, device):
            if places.is_contiguous():
                torch.index_select(pages, 0, index, out=places)
            else:
                places.copy_(pages.index_select(0, index))


def scatter(lanes: Lanes, blocks: Int32s, slot: int) -> None:
    """Copy what is at address ``slot`` to blocks of the same device. Raises TransportError."""
    device = _device(lanes)
    with _copying(device):
        for pages, index, places in _views(lanes, blocks, slot, device):
            pages.index_copy_(0, index, places)


def _device(lanes: Lanes) -> Any:
    return torch.device("cuda", lanes.device) if lanes.memory == "VRAM" else torch.device("cpu")


@contextmanager
def _copying(device: Any) -> Iterator[None]:
    """Copies inside run on our stream of the device and are over afterwards. torch's errors become TransportError."""
    try:
        if device.type != "cuda":
            yield
            return
        stream = _stream(device.index)
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()
    except (RuntimeError, AssertionError) as error:  # CUDA's errors; a torch that was built without it asserts
        raise TransportError(f"{device} cannot copy between pages and staging: {error}") from error


@functools.cache
def _stream(device: int) -> Any:
    return torch.cuda.Stream(device)


def _views(lanes: Lanes, blocks: Int32s, slot: int, device: Any) -> Iterator[tuple[Any, Any, Any]]:
    """For each grid: pages as ``(any, *counts, words)``, the index of each block in them, and the grid's part of the
    slot as ``(blocks, *counts, words)``."""
    for grid in lanes.grids:
        word = _word(grid, slot, lanes.block_bytes)
        unit, block, words = (n // word for n in (grid.unit, lanes.block_bytes, grid.length))
        inner = (*grid.counts, words)
        steps, dense = ([n // word for n in some] for some in (grid.steps, grid.dense_steps))
        count = len(blocks)
        taken = (count - 1) * lanes.block_bytes + grid.bytes
        pages = _tensor(grid.base, grid.span, word, device).as_strided((grid.rows, *inner), (unit, *steps, 1))
        places = _tensor(slot + grid.offset, taken, word, device).as_strided((count, *inner), (block, *dense, 1))
        yield pages, torch.from_numpy(grid.index(blocks)).to(device), places


def _word(grid: Grid, slot: int, block_bytes: int) -> int:
    """Bytes of the widest word that every address, distance and length is a multiple of."""
    return math.gcd(8, grid.base, grid.unit, *grid.steps, grid.length, grid.offset, slot, block_bytes)


@dataclass(frozen=True, slots=True)
class _Pointer:
    """Memory of a GPU as libraries pass it to each other."""

    __cuda_array_interface__: dict[str, object]


def _tensor(address: int, length: int, word: int, device: Any) -> Any:
    """A flat tensor of words that shares the memory at ``address``. ``length`` in bytes."""
    if device.type != "cuda":
        return torch.from_numpy(memory(address, length).view(np.dtype(f"i{word}" if word > 1 else "u1")))
    described = {"shape": (length // word,), "typestr": f"<i{word}" if word > 1 else "|u1", "version": 3}
    return torch.as_tensor(_Pointer({**described, "data": (address, False), "strides": None}), device=device)

"""The tensors behind the pools: pages, slots of states; and the regions and pools that describe them.

Rules: memory is allocated once, page-aligned, and never moves: peers hold its addresses.

This file must not know who holds which unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from kvbaton.errors import ConfigError
from kvbaton.layout import NO_LAYER, InteriorOrder, Plane, Pool, Region
from kvbaton.runtime.staging_memory import ALIGNMENT_BYTES
from kvbaton.serving.engine.geometry import DTYPES, CachedTensor, PagedGeometry, PagedTensor
from kvbaton.serving.engine.shard import RankShard
from kvbaton.serving.engine.threads import aside


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolConfig:
    """Sizes: ``pages`` of ``page_size`` tokens each, ``aux_slots`` requests in hand-off at once, as many with states.

    ``chunk_tokens``: most tokens of one request that are computed at once; a window's ring must hold them beside it.
    ``staging_bytes``, ``staging_slot_bytes``: of the memory through which small pieces travel together, see
    :func:`~kvbaton.runtime.staging_memory.staging_size`; 0: none.
    """

    pages: int = 1024
    page_size: int = 16
    aux_slots: int = 64
    order: InteriorOrder = "HND"
    chunk_tokens: int = 512
    staging_bytes: int | None = 0
    staging_slot_bytes: int = 0


class PagedMemory:
    """One paged pool of this rank: ``tensors[layer, name]`` is shaped ``[pages, heads here, page_size, width]`` for HND
    and ``[pages, page_size, heads here, width]`` for NHD."""

    def __init__(
        self, geometry: PagedGeometry, pages: int, config: PoolConfig, shard: RankShard, dtype: str, device: str
    ) -> None:
        if config.page_size < 1 or config.order not in ("HND", "NHD"):
            raise ConfigError(f"page_size={config.page_size} must be positive and order={config.order!r} HND or NHD")
        self.geometry = geometry
        self.pages = pages
        self.page_size = config.page_size
        self.order = config.order
        self.dtype = dtype
        self.tensors: dict[tuple[int, str], Any] = {}
        self._shard = shard
        sizes = [pages * self._page_elements(tensor) for tensor in geometry.tensors]
        self._buffer: Any = aligned((sum(sizes),), DTYPES[dtype], device)
        for tensor, part in zip(geometry.tensors, self._buffer.split(sizes), strict=True):
            heads = shard.axis(tensor.heads).width
            interior = (heads, self.page_size) if self.order == "HND" else (self.page_size, heads)
            self.tensors[tensor.layer, tensor.name] = part.view(pages, *interior, tensor.width)

    def _page_elements(self, tensor: PagedTensor) -> int:
        return self._shard.axis(tensor.heads).width * self.page_size * tensor.width

    @property
    def region(self) -> Region:
        return region_of(self._buffer)

    def pool(self, region: int) -> Pool:
        """This memory as region number ``region`` of a layout."""
        item = int(DTYPES[self.dtype].itemsize)
        planes, offset = [], 0
        for tensor in self.geometry.tensors:
            axis = self._shard.axis(tensor.heads)
            width, unit = tensor.width * item, self._page_elements(tensor) * item
            row, head = (width, self.page_size * width) if self.order == "HND" else (axis.width * width, width)
            planes.append(Plane(tensor.layer, tensor.name, region, offset, unit, row, head, width, axis))
            offset += self.pages * unit
        known = self.geometry
        return Pool(known.name, known.kind, self.pages, self.page_size, True, self.dtype, tuple(planes), known.window)


class StateMemory:
    """Slots of recurrent states: ``tensors[layer, name]`` is shaped ``[slots, *shape]``. Every rank of a stage holds
    them whole, as transformers computes them whole on each."""

    def __init__(self, states: Sequence[CachedTensor], slots: int, shard: RankShard, device: str) -> None:
        self.tensors: dict[tuple[int, str], Any] = {}
        self.slots = slots
        self._states = states
        self._shard = shard
        self._buffer: Any = aligned((slots * sum(state.bytes for state in states),), torch.uint8, device)
        parts = self._buffer.split([slots * state.bytes for state in states])
        for state, part in zip(states, parts, strict=True):
            self.tensors[state.layer, state.name] = part.view(DTYPES[state.dtype]).view(slots, *state.shape)

    @property
    def region(self) -> Region:
        return region_of(self._buffer)

    def pool(self, region: int) -> Pool:
        axis = self._shard.axis(1)
        planes, offset = [], 0
        for state in self._states:
            size = state.bytes
            planes.append(Plane(state.layer, state.name, region, offset, size, size, size, size, axis))
            offset += self.slots * size
        dtype = "+".join(sorted({state.dtype for state in self._states}))
        return Pool("state", "state", self.slots, 1, False, dtype, tuple(planes))


class RecordMemory:
    """Pages of fixed-size records, one for each token: ``tensor`` is shaped ``[pages, page_size, record_bytes]``. Every
    rank of a stage holds them whole. On the device of the pages, for staging memory is there."""

    def __init__(self, name: str, pages: int, page_size: int, record_bytes: int, shard: RankShard, device: str) -> None:
        self.tensor: Any = aligned((pages, page_size, record_bytes), torch.uint8, device)
        self._name = name
        self._shard = shard

    @property
    def region(self) -> Region:
        return region_of(self.tensor)

    def pool(self, region: int) -> Pool:
        pages, page_size, size = self.tensor.shape
        plane = Plane(NO_LAYER, "record", region, 0, page_size * size, size, size, size, self._shard.axis(1))
        return Pool(self._name, "aux", pages, page_size, True, "bytes", (plane,))


def aligned(shape: tuple[int, ...], dtype: Any, device: str, *, make: Callable[..., Any] = torch.zeros) -> Any:
    """A tensor, zeroed if ``make`` does that, whose first byte lies on :data:`ALIGNMENT_BYTES`."""
    length = int(np.prod(shape)) * dtype.itemsize
    buffer = aside(partial(make, length + ALIGNMENT_BYTES, dtype=torch.uint8, device=device))
    skip = -buffer.data_ptr() % ALIGNMENT_BYTES
    return buffer[skip : skip + length].view(dtype).view(shape)


def copy_units(tensors: Iterable[Any], pairs: Sequence[tuple[int, int]]) -> None:
    """Copy along the first axis; no unit is both read and written."""
    if pairs:
        sources, targets = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        for tensor in tensors:
            tensor[targets] = tensor[sources]


def region_of(buffer: Any) -> Region:
    length = buffer.numel() * buffer.element_size()
    if buffer.device.type == "cpu":
        return Region(buffer.data_ptr(), length)
    return Region(buffer.data_ptr(), length, "VRAM", buffer.device.index or 0)

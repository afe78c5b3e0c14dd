"""The engine's memory: the paged K/V pool, the host rows of aux, their layout, and who holds which unit.

Rules: memory is allocated once, page-aligned, and never moves (peers hold its addresses). A request's units are
given out all or none. A page is zeroed when it is given out: a request gathers whole pages, and what an earlier
request left behind a prompt's last token must not reach it, not even as NaN times zero.

This file must not know of models, requests or peers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvbaton.engine.aux_row import ROW_BYTES
from kvbaton.engine.model import DTYPES, Geometry
from kvbaton.errors import CapacityError, ConfigError, InternalError
from kvbaton.layout import CacheLayout, InteriorOrder, Region, aux_pool, kv_pool

#: Memory that is registered with a network card should start on a page of the machine.
ALIGNMENT_BYTES = 4096


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
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self._units - len(self._free)

    @property
    def units(self) -> int:
        return self._units

    def take(self, count: int) -> tuple[int, ...] | None:
        """``count`` ids, or None where there are not that many free now. CapacityError where there never can be."""
        if count > self._units:
            raise CapacityError(f"{count} {self._noun}s never fit a pool of {self._units}")
        if count > len(self._free):
            return None
        taken = tuple(self._free.pop() for _ in range(count))
        for unit in taken:
            self._taken[unit] = 1
        return taken

    def give_back(self, units: Sequence[int]) -> None:
        """Return ids. InternalError, with nothing changed, where one of them is not out."""
        distinct = set(units)
        wrong = [unit for unit in distinct if not (0 <= unit < self._units and self._taken[unit])]
        if wrong or len(distinct) != len(units):
            raise InternalError(f"{self._noun}s {sorted(wrong) or list(units)} are given back but are not out")
        for unit in units:
            self._taken[unit] = 0
            self._free.append(unit)

    def __repr__(self) -> str:
        return f"Allocator({self._noun}: {self.used} used, {self.free} free)"


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolConfig:
    """Sizes: ``pages`` of ``page_size`` tokens each, ``aux_slots`` requests in hand-off at once."""

    pages: int = 1024
    page_size: int = 16
    aux_slots: int = 64
    order: InteriorOrder = "HND"


class KVMemory:
    """Tensor of a paged K/V pool, shaped ``[layers, 2, pages, kv_heads, page_size, head_dim]`` for HND and
    ``[layers, 2, pages, page_size, kv_heads, head_dim]`` for NHD."""

    def __init__(self, geometry: Geometry, config: PoolConfig, device: str = "cpu") -> None:
        if config.page_size < 1 or config.order not in ("HND", "NHD"):
            raise ConfigError(f"page_size={config.page_size} must be positive and order={config.order!r} HND or NHD")
        interior = (geometry.kv_heads, config.page_size)
        if config.order == "NHD":
            interior = (config.page_size, geometry.kv_heads)
        self.page_size = config.page_size
        self.order = config.order
        shape = (geometry.layers, 2, config.pages, *interior, geometry.head_dim)
        self.tensor: Any = _aligned(shape, DTYPES[geometry.dtype], device)

    @property
    def region(self) -> Region:
        length = self.tensor.numel() * self.tensor.element_size()
        if self.tensor.device.type == "cpu":
            return Region(self.tensor.data_ptr(), length)
        return Region(self.tensor.data_ptr(), length, "VRAM", self.tensor.device.index or 0)

    def clear(self, pages: Sequence[int]) -> None:
        """Zero ``pages`` in every layer."""
        if pages:
            with torch.inference_mode():
                self.tensor.index_fill_(2, torch.tensor(pages, device=self.tensor.device), 0)


def _aligned(shape: tuple[int, ...], dtype: Any, device: str) -> Any:
    """A zeroed tensor whose first byte lies on :data:`ALIGNMENT_BYTES`."""
    length = int(np.prod(shape)) * dtype.itemsize
    buffer = torch.zeros(length + ALIGNMENT_BYTES, dtype=torch.uint8, device=device)
    skip = -buffer.data_ptr() % ALIGNMENT_BYTES
    return buffer[skip : skip + length].view(dtype).view(shape)


class Pools:
    """Everything a scheduler allocates from, and the layout that describes it to peers.

    The memory must outlive the :class:`kvbaton.manager.KVManager` that registered it: close that one first.
    """

    def __init__(self, geometry: Geometry, config: PoolConfig, *, model: str, device: str = "cpu") -> None:
        self.kv = KVMemory(geometry, config, device)
        self.pages = Allocator(config.pages, "page")
        self.slots = Allocator(config.aux_slots, "slot")
        self._rows: Any = _aligned((config.aux_slots, ROW_BYTES), torch.uint8, "cpu")
        self.layout = self._describe(geometry, config, model)

    @property
    def page_size(self) -> int:
        return self.kv.page_size

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.kv.page_size)

    def take_pages(self, tokens: int) -> tuple[int, ...] | None:
        """Zeroed pages for ``tokens`` tokens, or None while the pool is too full."""
        pages = self.pages.take(self.pages_for(tokens))
        if pages is not None:
            self.kv.clear(pages)
        return pages

    def take_slot(self) -> int | None:
        """A zeroed aux row, or None while all are out."""
        slot = self.slots.take(1)
        if slot is None:
            return None
        self.row(slot[0])[:] = bytes(ROW_BYTES)
        return slot[0]

    def row(self, slot: int) -> memoryview:
        """The bytes of aux row ``slot``, writable."""
        return memoryview(self._rows[slot].numpy())

    def _describe(self, geometry: Geometry, config: PoolConfig, model: str) -> CacheLayout:
        layout = CacheLayout(
            model=model,
            regions=(self.kv.region, Region(self._rows.data_ptr(), self._rows.numel())),
            pools=(
                kv_pool(
                    range(geometry.layers),
                    pages=config.pages,
                    page_size=config.page_size,
                    heads=geometry.kv_heads,
                    head_bytes=geometry.head_bytes,
                    dtype=geometry.dtype,
                    order=config.order,
                    region=0,
                ),
                aux_pool(slots=config.aux_slots, slot_bytes=ROW_BYTES, region=1),
            ),
        )
        layout.validate()
        return layout

    def __repr__(self) -> str:
        return f"Pools({self.pages!r}, {self.slots!r}, page_size={self.page_size}, {self.kv.order})"

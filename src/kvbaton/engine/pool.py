"""The engine's memory: paged pools, slots of states, the host rows of aux, their layout, and who holds which unit.

Rules: memory is allocated once, page-aligned, and never moves (peers hold its addresses). A request's units are
given out all or none, as one :class:`Holding`. Units are not cleared: nobody reads a token or a state that it has not
written, or been sent. All ranks of a group have the same number of units, so that one holding names the same tokens
on each of them.

Pools that keep every token (``kv``, ``mla``, ``index``) share page numbers. A sliding window (``swa``) has pages of
its own, and a request holds a ring of them: absolute page p lies in the ring's page p modulo its length.

This file must not know of models, requests or peers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvbaton.engine.aux_row import ROW_BYTES
from kvbaton.engine.geometry import DTYPES, Geometry, PagedGeometry, PagedTensor, StateTensor
from kvbaton.engine.shard import Shard
from kvbaton.errors import CapacityError, ConfigError, InternalError
from kvbaton.layout import CacheLayout, InteriorOrder, Plane, Pool, Region, Staging, aux_pool, pool_bytes, window_range
from kvbaton.manager import Span

#: Memory that is registered with a network card should start on a page of the machine.
ALIGNMENT_BYTES = 4096
#: A slot of staging memory, where none is asked for: copying so much takes several times the fixed cost of a staged
#: write (0.3 ms, see ``costs``), so larger slots gain nothing; and the pages of most models fit.
STAGING_SLOT_BYTES = 4 << 20
#: Staging memory, likewise: a few rooms at once, small beside any real pool. Rooms that find no slot go directly.
STAGING_BYTES = 64 << 20


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

    def too_full(self, count: int) -> bool:
        """Whether ``count`` ids cannot be had now. CapacityError where they never can be."""
        if count > self._units:
            raise CapacityError(f"{count} {self._noun}s never fit a pool of {self._units}")
        return count > len(self._free)

    def take(self, count: int) -> tuple[int, ...] | None:
        """``count`` ids, or None where there are not that many free now. CapacityError where there never can be."""
        if self.too_full(count):
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
    """Sizes: ``pages`` of ``page_size`` tokens each, ``aux_slots`` requests in hand-off at once, as many with states.

    ``chunk_tokens``: most tokens of one request that are computed at once; a window's ring must hold them beside it.
    ``staging_bytes``: memory through which small pieces travel together; 0: none, None: :data:`STAGING_BYTES` or a slot
    where that is more. ``staging_slot_bytes``: of a slot; 0: whatever a peer can ask for, a page or a request's state,
    and at least :data:`STAGING_SLOT_BYTES`.
    """

    pages: int = 1024
    page_size: int = 16
    aux_slots: int = 64
    order: InteriorOrder = "HND"
    chunk_tokens: int = 512
    staging_bytes: int | None = 0
    staging_slot_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Holding:
    """The units of one request: page i holds tokens from ``i * page_size`` on; see the module for ``ring``."""

    pages: tuple[int, ...] = ()
    ring: tuple[int, ...] = ()
    state: int = 0

    @property
    def count(self) -> int:
        """Pages of both kinds."""
        return len(self.pages) + len(self.ring)


@dataclass(frozen=True, kw_only=True, slots=True)
class Copies:
    """Units whose contents are to be copied, on every rank, as (from, to)."""

    pages: tuple[tuple[int, int], ...] = ()
    ring: tuple[tuple[int, int], ...] = ()
    states: tuple[tuple[int, int], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.pages or self.ring or self.states)


class PagedMemory:
    """One paged pool of this rank: ``tensors[layer, name]`` is shaped ``[pages, heads here, page_size, width]`` for HND
    and ``[pages, page_size, heads here, width]`` for NHD."""

    def __init__(
        self, geometry: PagedGeometry, pages: int, config: PoolConfig, shard: Shard, dtype: str, device: str
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
        self._buffer: Any = _aligned((sum(sizes),), DTYPES[dtype], device)
        for tensor, part in zip(geometry.tensors, self._buffer.split(sizes), strict=True):
            heads = shard.axis(tensor.heads).width
            interior = (heads, self.page_size) if self.order == "HND" else (self.page_size, heads)
            self.tensors[tensor.layer, tensor.name] = part.view(pages, *interior, tensor.width)

    def _page_elements(self, tensor: PagedTensor) -> int:
        return self._shard.axis(tensor.heads).width * self.page_size * tensor.width

    @property
    def region(self) -> Region:
        return _region(self._buffer)

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

    def __init__(self, states: Sequence[StateTensor], slots: int, shard: Shard, device: str) -> None:
        self.tensors: dict[tuple[int, str], Any] = {}
        self.slots = slots
        self._states = states
        self._shard = shard
        self._buffer: Any = _aligned((slots * sum(state.bytes for state in states),), torch.uint8, device)
        parts = self._buffer.split([slots * state.bytes for state in states])
        for state, part in zip(states, parts, strict=True):
            self.tensors[state.layer, state.name] = part.view(DTYPES[state.dtype]).view(slots, *state.shape)

    @property
    def region(self) -> Region:
        return _region(self._buffer)

    def pool(self, region: int) -> Pool:
        axis = self._shard.axis(1)
        planes, offset = [], 0
        for state in self._states:
            size = state.bytes
            planes.append(Plane(state.layer, state.name, region, offset, size, size, size, size, axis))
            offset += self.slots * size
        dtype = "+".join(sorted({state.dtype for state in self._states}))
        return Pool("state", "state", self.slots, 1, False, dtype, tuple(planes))


class StagingMemory:
    """Slots of staging memory on the device of the pages. ``pools``: all of this rank's, for the largest block.

    Raises ConfigError where the memory holds no slot.
    """

    def __init__(self, config: PoolConfig, pools: Sequence[Pool], device: str) -> None:
        largest = max((-(-pool_bytes(pool) // pool.units) for pool in pools), default=0)
        rounded = -(-largest // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        self.slot_bytes = config.staging_slot_bytes or max(STAGING_SLOT_BYTES, rounded)
        memory = max(STAGING_BYTES, self.slot_bytes) if config.staging_bytes is None else config.staging_bytes
        self.slots = memory // self.slot_bytes
        if not self.slots:
            raise ConfigError(
                f"{memory} bytes of staging memory hold no slot of {self.slot_bytes} bytes; set --staging-mib to at "
                f"least {-(-self.slot_bytes >> 20)}, or to 0 for none"
            )
        # not zeroed: what is never used then costs no memory on a host
        self._buffer: Any = _aligned((self.slots * self.slot_bytes,), torch.uint8, device, make=torch.empty)

    @property
    def region(self) -> Region:
        return _region(self._buffer)


def _aligned(shape: tuple[int, ...], dtype: Any, device: str, *, make: Callable[..., Any] = torch.zeros) -> Any:
    """A tensor, zeroed if ``make`` does that, whose first byte lies on :data:`ALIGNMENT_BYTES`."""
    length = int(np.prod(shape)) * dtype.itemsize
    buffer = make(length + ALIGNMENT_BYTES, dtype=torch.uint8, device=device)
    skip = -buffer.data_ptr() % ALIGNMENT_BYTES
    return buffer[skip : skip + length].view(dtype).view(shape)


def _copy(tensors: Iterable[Any], pairs: Sequence[tuple[int, int]]) -> None:
    """Copy along the first axis; no unit is both read and written."""
    if pairs:
        sources, targets = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        for tensor in tensors:
            tensor[targets] = tensor[sources]


def _region(buffer: Any) -> Region:
    length = buffer.numel() * buffer.element_size()
    if buffer.device.type == "cpu":
        return Region(buffer.data_ptr(), length)
    return Region(buffer.data_ptr(), length, "VRAM", buffer.device.index or 0)


class Pools:
    """Everything a scheduler allocates from, and the layout that describes this rank's part of it to peers.

    The memory must outlive the :class:`kvbaton.manager.KVManager` that registered it: close that one first.
    """

    def __init__(
        self,
        geometry: Geometry,
        config: PoolConfig,
        *,
        model: str,
        device: str = "cpu",
        shard: Shard | None = None,
    ) -> None:
        shard = shard if shard is not None else Shard()
        self.geometry = geometry
        self.page_size = config.page_size
        self.device = device
        self._config = config
        here = shard.layers(geometry.layers)
        self.paged: dict[str, PagedMemory] = {}
        for pool in geometry.paged:
            part = PagedGeometry(
                name=pool.name,
                kind=pool.kind,
                window=pool.window,
                tensors=tuple(tensor for tensor in pool.tensors if tensor.layer in here),
            )
            pages = self._window_pages() if pool.window else config.pages
            if part.tensors:
                self.paged[pool.name] = PagedMemory(part, pages, config, shard, geometry.dtype, device)
        states = [state for state in geometry.states if state.layer in here]
        self.states = StateMemory(states, config.aux_slots, shard, device) if states else None
        self._rows: Any = _aligned((config.aux_slots, ROW_BYTES), torch.uint8, "cpu")
        keeps_all = any(not pool.window for pool in geometry.paged)
        self.pages = Allocator(config.pages, "page") if keeps_all else None
        self.rings = Allocator(self._window_pages(), "window page") if geometry.window else None
        self.state_slots = Allocator(config.aux_slots, "state slot") if geometry.states else None
        self.slots = Allocator(config.aux_slots, "slot")
        self._staging: StagingMemory | None = None
        self.layout = self._describe(model, shard)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    @property
    def tokens(self) -> int:
        """Tokens of one request that can ever fit."""
        return self._config.pages * self.page_size

    @property
    def pages_free(self) -> int:
        return sum(allocator.free for allocator in self._paged_allocators())

    @property
    def pages_used(self) -> int:
        return sum(allocator.used for allocator in self._paged_allocators())

    def _paged_allocators(self) -> list[Allocator]:
        return [allocator for allocator in (self.pages, self.rings) if allocator is not None]

    def ring_pages(self, tokens: int) -> int:
        """Pages of the ring of a request of ``tokens`` tokens."""
        return min(self.pages_for(tokens), self._ring_pages(self._config.chunk_tokens))

    def _ring_pages(self, chunk_tokens: int) -> int:
        """Pages that hold a window and a chunk after it, wherever in a page they begin."""
        return self.pages_for(self.geometry.window - 1 + max(chunk_tokens, self.page_size)) + 1

    def _window_pages(self) -> int:
        """Pages of the window pool: a ring for every request, and never more than the whole pool."""
        return min(self._config.pages, self._config.aux_slots * self._ring_pages(self._config.chunk_tokens))

    def take(self, tokens: int, *, shared: tuple[int, ...] = ()) -> Holding | None:
        """Units for a request of ``tokens`` tokens, or None while any pool is too full.

        ``shared`` are pages that somebody holds already; they become the first of the holding.
        """
        count = self.pages_for(tokens)
        takes = (
            (self.pages, count - len(shared)),
            (self.rings, self.ring_pages(tokens)),
            (self.state_slots, 1),
        )
        if any(allocator is not None and allocator.too_full(wanted) for allocator, wanted in takes):
            return None
        pages, ring, state = (allocator.take(wanted) or () if allocator else () for allocator, wanted in takes)
        return Holding((*shared, *pages), ring, state[0] if state else 0)

    def give_back(self, holding: Holding, *, keep: frozenset[int] = frozenset()) -> None:
        """Return what :meth:`take` gave, but for the pages to ``keep``."""
        if self.pages is not None:
            self.pages.give_back([page for page in holding.pages if page not in keep])
        if self.rings is not None:
            self.rings.give_back(holding.ring)
        if self.state_slots is not None:
            self.state_slots.give_back([holding.state])

    def copy(self, copies: Copies) -> None:
        """Copy units within this rank's memory. Nothing may write to them meanwhile."""
        for memory in self.paged.values():
            _copy(memory.tensors.values(), copies.ring if memory.geometry.window else copies.pages)
        if self.states is not None:
            _copy(self.states.tensors.values(), copies.states)

    def spans(self, holding: Holding, start: int, stop: int) -> list[Span]:
        """Tokens ``[start, stop)`` in every paged pool of the model. What a ring has lost meanwhile is in it, too."""
        first, last = start // self.page_size, self.pages_for(stop)
        found = []
        for pool in self.geometry.paged:
            if start >= stop:
                break
            ring = holding.ring
            units = tuple(ring[page % len(ring)] for page in range(first, last)) if pool.window else ()
            found.append(Span(pool.name, start, stop, units or holding.pages[first:last]))
        return found

    def wanted(self, holding: Holding, held: int, stop: int) -> list[Span]:
        """What a target asks for, of a prompt of ``stop`` tokens of which it has ``held``: all else, of a window pool
        the pages that the window touches, and the states."""
        found = []
        for pool in self.geometry.paged:
            if not pool.window and held == stop:
                found.append(Span(pool.name, stop, stop, ()))
                continue
            begin = window_range(stop, pool.window, target_page=self.page_size).start if pool.window else held
            found += [span for span in self.spans(holding, begin, stop) if span.pool == pool.name]
        return [*found, *self.state_spans(holding)]

    def state_spans(self, holding: Holding) -> list[Span]:
        return [Span("state", 0, 0, (holding.state,))] if self.geometry.states else []

    def here(self, spans: Sequence[Span]) -> list[Span]:
        """Those of ``spans`` whose pools this rank has."""
        own = {pool.name for pool in self.layout.pools}
        return [span for span in spans if span.pool in own]

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

    def _describe(self, model: str, shard: Shard) -> CacheLayout:
        memories: list[PagedMemory | StateMemory] = list(self.paged.values())
        if self.states is not None:
            memories.append(self.states)
        regions = [memory.region for memory in memories]
        pools = [memory.pool(number) for number, memory in enumerate(memories)]
        if shard.first:  # one stage is enough for what belongs to no layer
            regions.append(_region(self._rows))
            pools.append(
                aux_pool(
                    slots=self._config.aux_slots,
                    slot_bytes=ROW_BYTES,
                    region=len(memories),
                    tp_size=shard.tp_size,
                    tp_rank=shard.tp_rank,
                )
            )
        staging = None
        if self._config.staging_bytes != 0:
            self._staging = StagingMemory(self._config, pools, self.device)
            staging = Staging(len(regions), self._staging.slot_bytes, self._staging.slots)
            regions.append(self._staging.region)
        layout = CacheLayout(model=model, regions=tuple(regions), pools=tuple(pools), staging=staging)
        layout.validate()
        return layout

    def __repr__(self) -> str:
        return f"Pools({self.pages!r}, {self.rings!r}, {self.state_slots!r}, {self.slots!r}, pages of {self.page_size})"

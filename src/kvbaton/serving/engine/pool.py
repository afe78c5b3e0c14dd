"""All pools of an engine's rank, the layout that describes them, and who holds which unit.

Rules: a request's units are allocated all or none, as one :class:`BlockTable`. Units are not cleared: nobody reads a
token or a state that it has not written, or been sent. All ranks of a group have the same number of units, so that one
block table names the same tokens on each of them.

Records of a prompt's own logprobs have pages of their own too, held only by requests that ask for them.

Pools that keep every token (``kv``, ``mla``, ``index``) share page numbers. A sliding window (``swa``) has pages of
its own, and a request holds a ring of them: absolute page p lies in the ring's page p modulo its length.

This file must not know of models, requests or peers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvbaton.layout import CacheLayout, aux_pool, window_range
from kvbaton.manager import Span
from kvbaton.runtime.staging_memory import with_staging
from kvbaton.serving.engine.allocator import Allocator
from kvbaton.serving.engine.aux_row import ROW_BYTES
from kvbaton.serving.engine.geometry import Geometry, PagedGeometry
from kvbaton.serving.engine.memory import (
    PagedMemory,
    PoolConfig,
    RecordMemory,
    StateMemory,
    aligned,
    copy_units,
    region_of,
)
from kvbaton.serving.engine.prompt_logprobs import RECORD, RECORD_BYTES, Records
from kvbaton.serving.engine.shard import RankShard

#: The pools of aux rows and of records; only a group's leader has what is written there.
AUX, RECORDS = "aux", "prompt_logprobs"
LEADER_POOLS = (AUX, RECORDS)
#: Most tokens whose records are held at once: 11 MB.
MAX_RECORDS = 1 << 16


@dataclass(frozen=True, slots=True)
class BlockTable:
    """The units of one request: page i holds tokens from ``i * page_size`` on; see the module for ``ring`` and
    ``records``."""

    pages: tuple[int, ...] = ()
    ring: tuple[int, ...] = ()
    state: int = 0
    records: tuple[int, ...] = ()

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
        shard: RankShard | None = None,
    ) -> None:
        shard = shard if shard is not None else RankShard()
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
        self._rows: Any = aligned((config.aux_slots, ROW_BYTES), torch.uint8, "cpu")
        keeps_all = any(not pool.window for pool in geometry.paged)
        self.pages = Allocator(config.pages, "page") if keeps_all else None
        self.rings = Allocator(self._window_pages(), "window page") if geometry.window else None
        self.state_slots = Allocator(config.aux_slots, "state slot") if geometry.states else None
        self.slots = Allocator(config.aux_slots, "slot")
        record_pages = min(config.pages, self.pages_for(MAX_RECORDS))
        self._records = RecordMemory(RECORDS, record_pages, config.page_size, RECORD_BYTES, shard, device)
        self.record_pages = Allocator(record_pages, "record page")
        self._staging: object = None
        self.layout = self._describe(model, shard)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    @property
    def tokens(self) -> int:
        """Tokens of one request that can ever fit."""
        return self._config.pages * self.page_size

    @property
    def record_tokens(self) -> int:
        """Tokens of one prompt whose records can ever fit."""
        return self.record_pages.units * self.page_size

    @property
    def pages_free(self) -> int:
        return sum(allocator.available for allocator in self._paged_allocators())

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

    def allocate(self, tokens: int, *, shared: tuple[int, ...] = (), recorded: int = 0) -> BlockTable | None:
        """Units for a request of ``tokens`` tokens, or None while any pool is too full.

        ``shared`` are pages that somebody holds already; they become the first of the block_table. ``recorded``: tokens
        of the prompt that need a record.
        """
        count = self.pages_for(tokens)
        takes = (
            (self.pages, count - len(shared)),
            (self.rings, self.ring_pages(tokens)),
            (self.state_slots, 1),
            (self.record_pages, self.pages_for(recorded)),
        )
        if any(allocator is not None and allocator.too_full(wanted) for allocator, wanted in takes):
            return None
        taken = (allocator.allocate(wanted) or () if allocator else () for allocator, wanted in takes)
        pages, ring, state, records = taken
        return BlockTable((*shared, *pages), ring, state[0] if state else 0, records)

    def free(self, block_table: BlockTable, *, keep: frozenset[int] = frozenset()) -> None:
        """Return what :meth:`take` gave, but for the pages to ``keep``."""
        if self.pages is not None:
            self.pages.free([page for page in block_table.pages if page not in keep])
        if self.rings is not None:
            self.rings.free(block_table.ring)
        if self.state_slots is not None:
            self.state_slots.free([block_table.state])
        self.record_pages.free(block_table.records)

    def copy(self, copies: Copies) -> None:
        """Copy units within this rank's memory. Nothing may write to them meanwhile."""
        for memory in self.paged.values():
            copy_units(memory.tensors.values(), copies.ring if memory.geometry.window else copies.pages)
        if self.states is not None:
            copy_units(self.states.tensors.values(), copies.states)

    def spans(self, block_table: BlockTable, start: int, stop: int) -> list[Span]:
        """Tokens ``[start, stop)`` in every paged pool of the model. What a ring has lost meanwhile is in it, too."""
        first, last = start // self.page_size, self.pages_for(stop)
        found = []
        for pool in self.geometry.paged:
            if start >= stop:
                break
            ring = block_table.ring
            units = tuple(ring[page % len(ring)] for page in range(first, last)) if pool.window else ()
            found.append(Span(pool.name, start, stop, units or block_table.pages[first:last]))
        if block_table.records and start < stop:
            found.append(Span(RECORDS, start, stop, block_table.records[first:last]))
        return found

    def wanted(self, block_table: BlockTable, held: int, stop: int) -> list[Span]:
        """What a target asks for, of a prompt of ``stop`` tokens of which it has ``held``: all else, of a window pool
        the pages that the window touches, all records where there are any, and the states."""
        found = []
        for pool in self.geometry.paged:
            if not pool.window and held == stop:
                found.append(Span(pool.name, stop, stop, ()))
                continue
            begin = window_range(stop, pool.window, target_page=self.page_size).start if pool.window else held
            found += [span for span in self.spans(block_table, begin, stop) if span.pool == pool.name]
        if block_table.records:
            found.append(Span(RECORDS, 0, stop, block_table.records[: self.pages_for(stop)]))
        return [*found, *self.state_spans(block_table)]

    def state_spans(self, block_table: BlockTable) -> list[Span]:
        return [Span("state", 0, 0, (block_table.state,))] if self.geometry.states else []

    def here(self, spans: Sequence[Span]) -> list[Span]:
        """Those of ``spans`` whose pools this rank has."""
        own = {pool.name for pool in self.layout.pools}
        return [span for span in spans if span.pool in own]

    def take_slot(self) -> int | None:
        """A zeroed aux row, or None while all are out."""
        slot = self.slots.allocate(1)
        if slot is None:
            return None
        self.row(slot[0])[:] = bytes(ROW_BYTES)
        return slot[0]

    def row(self, slot: int) -> memoryview:
        """The bytes of aux row ``slot``, writable."""
        return memoryview(self._rows[slot].numpy())

    def write_records(self, block_table: BlockTable, start: int, records: Records) -> None:
        """Put the records of the tokens from ``start`` on where they belong."""
        if len(records):
            rows = torch.from_numpy(records.view(np.uint8).reshape(len(records), RECORD_BYTES).copy())
            self._record_rows()[self._places(block_table, start, len(records))] = rows.to(self.device)

    def read_records(self, block_table: BlockTable, count: int) -> Records:
        """Those of the first ``count`` tokens."""
        records: Records = self._record_rows()[self._places(block_table, 0, count)].cpu().numpy().ravel().view(RECORD)
        return records

    def _record_rows(self) -> Any:
        return self._records.tensor.view(-1, RECORD_BYTES)

    def _places(self, block_table: BlockTable, start: int, count: int) -> list[int]:
        size = self.page_size
        return [block_table.records[token // size] * size + token % size for token in range(start, start + count)]

    def read_unit(self, pool: str, unit: int) -> bytes:
        """One of :data:`LEADER_POOLS`."""
        return bytes(self._leader_tensor(pool)[unit].cpu().numpy())

    def write_unit(self, pool: str, unit: int, data: bytes) -> None:
        unit_tensor = self._leader_tensor(pool)[unit]
        unit_tensor.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8).view(unit_tensor.shape))

    def _leader_tensor(self, pool: str) -> Any:
        return self._rows if pool == AUX else self._records.tensor

    def _describe(self, model: str, shard: RankShard) -> CacheLayout:
        memories: list[PagedMemory | StateMemory | RecordMemory] = list(self.paged.values())
        if self.states is not None:
            memories.append(self.states)
        if shard.first:
            memories.append(self._records)
        regions = [memory.region for memory in memories]
        pools = [memory.pool(number) for number, memory in enumerate(memories)]
        if shard.first:  # one stage is enough for what belongs to no layer
            regions.append(region_of(self._rows))
            pools.append(
                aux_pool(
                    slots=self._config.aux_slots,
                    slot_bytes=ROW_BYTES,
                    region=len(memories),
                    tp_size=shard.tp_size,
                    tp_rank=shard.tp_rank,
                )
            )
        layout = CacheLayout(model=model, regions=tuple(regions), pools=tuple(pools))
        config = self._config
        if config.staging_bytes != 0:
            layout, self._staging = with_staging(layout, config.staging_bytes, slot_bytes=config.staging_slot_bytes)
        layout.validate()
        return layout

    def __repr__(self) -> str:
        return f"Pools({self.pages!r}, {self.rings!r}, {self.state_slots!r}, {self.slots!r}, pages of {self.page_size})"

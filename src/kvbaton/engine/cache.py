"""A transformers ``Cache`` over the paged pool: new keys and values go into pages, whole requests come out.

``View`` says, for one forward pass over a batch, where each new token is written and which pages each request reads;
it is computed once and used by every layer. A request only ever reads its own pages: short page tables are padded
with the request's first page, and what lies behind its last token is hidden by the mask.

This file must not know of requests, sampling or schedulers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from kvbaton.engine.pool import KVMemory


@dataclass(frozen=True, slots=True)
class Extent:
    """One request in a batch: its pages, how many of its tokens are cached, and how many this pass adds."""

    pages: Sequence[int]
    cached: int
    added: int


@dataclass(frozen=True, slots=True)
class View:
    """The batch of one forward pass, as index tensors. All requests add the same number of tokens.

    ``pages``/``rows`` [batch * added] address the new tokens, ``table`` [batch, pages] the pages to read, padded;
    ``length`` is the longest request's number of tokens, this pass included.
    """

    pages: Any
    rows: Any
    table: Any
    positions: Any
    cached: int
    length: int
    mask: Any

    @staticmethod
    def build(extents: Sequence[Extent], page_size: int, device: Any) -> View:
        added = extents[0].added
        ends = [extent.cached + added for extent in extents]
        length = max(ends)
        width = -(-length // page_size)
        table = []
        for extent, end in zip(extents, ends, strict=True):
            used = list(extent.pages[: -(-end // page_size)])
            table.append(used + [used[0]] * (width - len(used)))
        starts = torch.tensor([extent.cached for extent in extents], device=device)
        positions = starts[:, None] + torch.arange(added, device=device)[None, :]
        tables = torch.tensor(table, device=device)
        pages = tables.gather(1, positions // page_size).flatten()
        mask = None
        if len(extents) > 1:  # the mask of a single request is the model's own business: plain causal
            mask = (torch.arange(length, device=device)[None, None, :] <= positions[:, :, None])[:, None]
        return View(
            pages=pages,
            rows=(positions % page_size).flatten(),
            table=tables,
            positions=positions,
            cached=extents[0].cached,
            length=length,
            mask=mask,
        )


class PagedLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped here
    """One layer of :class:`PagedCache`."""

    is_sliding = False

    def __init__(self, keys: Any, values: Any, order: str) -> None:
        super().__init__()
        self._pools = (keys, values)
        self._order = order
        self.view: View | None = None
        self.is_initialized = True

    def lazy_initialization(self, key_states: Any, value_states: Any) -> None:
        """Nothing to do: the memory exists before the first token."""

    def update(self, key_states: Any, value_states: Any, *_args: Any, **_kwargs: Any) -> tuple[Any, Any]:
        """Write [batch, heads, added, head_dim]; return [batch, heads, length, head_dim] of each."""
        view = self.view
        assert view is not None  # noqa: S101 - PagedCache.bind comes first
        return self._step(self._pools[0], key_states, view), self._step(self._pools[1], value_states, view)

    def _step(self, pool: Any, states: Any, view: View) -> Any:
        batch, heads, added, head_dim = states.shape
        tokens = states.transpose(1, 2).reshape(batch * added, heads, head_dim)
        if self._order == "NHD":
            pool[view.pages, view.rows] = tokens
            whole = pool.index_select(0, view.table.flatten()).view(batch, -1, heads, head_dim).transpose(1, 2)
            return whole[:, :, : view.length]
        pool[view.pages, :, view.rows] = tokens
        pages, _, page_size, _ = pool.shape
        table = view.table[:, None, :] * heads + torch.arange(heads, device=pool.device)[None, :, None]
        whole = pool.view(pages * heads, page_size, head_dim).index_select(0, table.flatten())
        return whole.view(batch, heads, -1, head_dim)[:, :, : view.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return 0 if self.view is None else self.view.cached

    def get_max_length(self) -> int:
        return -1


class PagedCache(Cache):  # type: ignore[misc]  # transformers is untyped here
    """All layers of the pool. ``bind`` a view, then run the model once."""

    def __init__(self, memory: KVMemory) -> None:
        tensor = memory.tensor
        super().__init__(layers=[PagedLayer(layer[0], layer[1], memory.order) for layer in tensor])

    def bind(self, view: View) -> None:
        for layer in self.layers:
            layer.view = view

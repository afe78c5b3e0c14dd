"""A transformers ``Cache`` over the pools: what is new goes into pages and slots, whole requests come out.

``View`` says, for one forward pass over a batch, where each new token is written and which tokens each request reads;
it is computed once and used by every layer. A batch of unequal lengths is aligned at its end, as transformers' own
left padding does it, so that every model builds its own masks (causal, window, indexer) from an ordinary padding mask.
A request only ever reads tokens of its own; columns before its first one repeat that one and are hidden by the mask.

This file must not know of requests, sampling or schedulers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from kvbaton.serving.engine.geometry import Holds
from kvbaton.serving.engine.memory import PagedMemory, StateMemory
from kvbaton.serving.engine.pool import BlockTable, Pools


@dataclass(frozen=True, slots=True)
class Extent:
    """One request in a batch: its units, how many of its tokens are cached, and how many this pass adds."""

    block_table: BlockTable
    cached: int
    added: int


@dataclass(frozen=True, slots=True)
class Lines:
    """Where tokens lie in a pool: (page, row) of those to write [batch, added] and to read [batch, length]."""

    write: tuple[Any, Any]
    read: tuple[Any, Any]
    page_size: int
    _numbers: dict[tuple[int, str], tuple[Any, Any]] = field(default_factory=dict)

    def numbers(self, heads: int, order: str) -> tuple[Any, Any]:
        """The same as numbers of vectors in a pool of ``heads``: [batch, heads, added] and [batch, heads, length]."""
        found = self._numbers.get((heads, order))
        if found is None:
            found = self._numbers[heads, order] = (
                self._number(*self.write, heads, order),
                self._number(*self.read, heads, order),
            )
        return found

    def _number(self, pages: Any, rows: Any, heads: int, order: str) -> Any:
        head = torch.arange(heads, device=pages.device)[None, :, None]
        if order == "HND":
            return (pages[:, None] * heads + head) * self.page_size + rows[:, None]
        return (pages[:, None] * self.page_size + rows[:, None]) * heads + head


@dataclass(frozen=True, slots=True)
class View:
    """The batch of one forward pass. All requests add the same number of tokens.

    ``cached`` counts columns before the new ones: the tokens of the longest request. ``mask`` [batch, cached + added]
    hides padding, None where there is none. ``full`` and ``window`` are None where the model has no such layers.
    """

    positions: Any
    cached: int
    mask: Any
    full: Lines | None
    window: Lines | None
    states: Any

    @staticmethod
    def build(extents: Sequence[Extent], pools: Pools) -> View:
        device, added = pools.device, extents[0].added
        cached = max(extent.cached for extent in extents)
        starts = torch.tensor([extent.cached for extent in extents], device=device)
        positions = starts[:, None] + torch.arange(added, device=device)[None, :]
        columns = torch.arange(cached + added, device=device)[None, :] - (cached - starts)[:, None]
        window = pools.geometry.window
        kept = min(cached, window - 1) + added
        uneven = any(extent.cached != cached for extent in extents)
        return View(
            positions=positions,
            cached=cached,
            mask=(columns >= 0).long() if uneven else None,
            full=_lines([e.block_table.pages for e in extents], positions, columns, pools) if pools.pages else None,
            window=_lines([e.block_table.ring for e in extents], positions, columns[:, -kept:], pools)
            if window
            else None,
            states=torch.tensor([extent.block_table.state for extent in extents], device=device),
        )


def _lines(tables: list[tuple[int, ...]], positions: Any, columns: Any, pools: Pools) -> Lines:
    """Lines of tokens whose absolute page p is page ``p % len(table)`` of a request's table."""
    width = max(map(len, tables))
    padded = torch.tensor([[*table, *[table[0]] * (width - len(table))] for table in tables], device=pools.device)
    lengths = torch.tensor([[len(table)] for table in tables], device=pools.device)

    def locate(tokens: Any) -> tuple[Any, Any]:
        return padded.gather(1, tokens // pools.page_size % lengths), tokens % pools.page_size

    return Lines(locate(positions), locate(columns.clamp(min=0)), pools.page_size)


class PagedLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped here
    """Keys and values, and index keys where the model has them, of one layer; nothing where another rank has it."""

    is_sliding = False

    def _place(self, pools: Pools, layer: int, window: int) -> None:
        self.is_initialized = True
        self.is_sliding = bool(window)
        self._window = window
        self._tensors: dict[str, tuple[PagedMemory, Any]] = {}
        self.view: View | None = None
        for memory in pools.paged.values():
            for (number, name), tensor in memory.tensors.items():
                if number == layer:
                    self._tensors[name] = (memory, tensor)

    def lazy_initialization(self, *_args: Any, **_kwargs: Any) -> None:
        """Nothing to do: the memory exists before the first token."""

    def update(self, key_states: Any, value_states: Any, *_args: Any, **_kwargs: Any) -> tuple[Any, Any]:
        """Write [batch, heads, added, width]; return [batch, heads, length, width] of each."""
        return self._step("k", key_states), self._step("v", value_states)

    def update_indexer(self, indexer_key_states: Any) -> Any:
        """Write [batch, added, width]; return [batch, length, width]."""
        return self._step("index", indexer_key_states[:, None])[:, 0]

    def _step(self, name: str, states: Any) -> Any:
        memory, tensor = self._tensors[name]
        view = self.view
        lines = None if view is None else view.window if memory.geometry.window else view.full
        assert lines is not None  # noqa: S101 - PagedCache.bind comes first
        batch, heads, _, width = states.shape
        write, read = lines.numbers(heads, memory.order)
        vectors = tensor.view(-1, width)
        vectors.index_copy_(0, write.flatten(), states.reshape(-1, width))
        return vectors.index_select(0, read.flatten()).view(batch, heads, -1, width)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that :meth:`update` returns, and the number of the first."""
        cached = self.get_seq_length()
        if not self._window:
            return cached + query_length, 0
        kept = min(cached, self._window - 1)
        return kept + query_length, cached - kept

    def get_seq_length(self) -> int:
        return 0 if self.view is None else self.view.cached

    def get_max_length(self) -> int:
        return self._window or -1


class AttentionLayer(PagedLayer):
    """A layer with attention alone."""

    def __init__(self, pools: Pools, layer: int, window: int) -> None:
        super().__init__()
        self._place(pools, layer, window)


class StateLayer(LinearAttentionLayer):  # type: ignore[misc]  # transformers is untyped here
    """Recurrent states of one layer: read from the slots of a batch before a pass, written back after it."""

    def __init__(self, memory: StateMemory | None, layer: int) -> None:
        super().__init__()
        self._remember(memory, layer)

    def _remember(self, memory: StateMemory | None, layer: int) -> None:
        self._states: list[tuple[Any, dict[int, Any], int]] = []
        numbers = set()
        for (of, name), tensor in memory.tensors.items() if memory is not None else ():
            if of == layer:
                kind, _, number = name.partition(".")
                numbers.add(int(number))
                states, ready = (
                    (self.conv_states, self.is_conv_states_initialized)
                    if kind == "conv"
                    else (self.recurrent_states, self.is_recurrent_states_initialized)
                )
                ready[int(number)] = True
                if kind == "conv":
                    self.conv_kernel_size[int(number)] = tensor.shape[-1]
                self._states.append((tensor, states, int(number)))
        self.number_of_states = len(numbers)

    def load(self, view: View) -> None:
        for tensor, states, number in self._states:
            states[number] = tensor.index_select(0, view.states)
            self.has_previous_state[number] = view.cached > 0
            self.dtype, self.device = tensor.dtype, tensor.device

    def store(self, view: View) -> None:
        """Write back what is not written back yet."""
        for tensor, states, number in self._states:
            if states[number] is not None:
                tensor.index_copy_(0, view.states, states[number])
                states[number] = None


class HybridLayer(StateLayer, PagedLayer, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc]
    """A layer with both. transformers recognises it by its last base."""

    def __init__(self, pools: Pools, layer: int, window: int) -> None:
        LinearAttentionAndFullAttentionLayer.__init__(self)
        self._place(pools, layer, window)
        self._remember(pools.states, layer)


def _layer(pools: Pools, layer: int, holds: Holds) -> Any:
    window = pools.geometry.window if holds.attention == "window" else 0
    if holds.attention and holds.state:
        return HybridLayer(pools, layer, window)
    if holds.attention:
        return AttentionLayer(pools, layer, window)
    return StateLayer(pools.states, layer) if holds.state else DummyLayer()


class PagedCache(Cache):  # type: ignore[misc]  # transformers is untyped here
    """All layers of the model. ``bind`` a view, run the model once, ``keep`` what it left."""

    def __init__(self, pools: Pools) -> None:
        super().__init__(layers=[_layer(pools, layer, holds) for layer, holds in enumerate(pools.geometry.holds)])

    def bind(self, view: View) -> None:
        for layer in self.layers:
            if isinstance(layer, PagedLayer):
                layer.view = view
            if isinstance(layer, StateLayer):
                layer.load(view)

    def keep(self, view: View, number: int | None = None) -> None:
        """Of one layer, or of all."""
        for layer in self.layers if number is None else [self.layers[number]]:
            if isinstance(layer, StateLayer):
                layer.store(view)

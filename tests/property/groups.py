"""Whole groups of ranks with every kind of pool, and a reference reshard in numpy that shares nothing with a plan.

A :class:`Model` says what one token and one request leave behind, as arrays over the whole model. A :class:`Group` says
how one side cuts it: TP, PP, page sizes, interior orders. The reference places the arrays into a group's memory through
numpy views of the shapes that the constructors document, with ranks' shares cut by ``numpy.split`` and
``numpy.repeat``: no stride, offset, axis or overlap of the code under test is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvbaton.layout import (
    CacheLayout,
    Pool,
    Region,
    StateTensor,
    aux_pool,
    index_pool,
    kv_pool,
    mla_pool,
    pool_bytes,
    scale_pool,
    state_pool,
    swa_pool,
    window_range,
)

Bytes = NDArray[np.uint8]
#: What every byte of a target is before anything is written.
UNTOUCHED = 0xEE
GAP = 64


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is cached, over all ranks. ``layers``: the kind of each layer; sizes in bytes, per token and head."""

    layers: tuple[str, ...] = ("kv", "kv")
    heads: int = 2
    head_bytes: int = 4
    scale_bytes: int = 0  #: of K and V, in a pool of their own; 0: not quantised
    scale_tokens: int = 1
    swa_heads: int = 2
    window: int = 8
    latent_bytes: int = 6
    rope_bytes: int = 2
    index_bytes: int = 0  #: index keys beside the latents; 0: no indexer
    index_scale_bytes: int = 0
    index_tokens: int = 1
    tensors: tuple[StateTensor, ...] = ()
    aux_bytes: int = 24

    def of(self, kind: str, stage: range) -> list[int]:
        return [layer for layer in stage if self.layers[layer] == kind]


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How one side holds a model."""

    tp: int = 1
    pp: int = 1
    page_size: int = 4
    swa_page_size: int = 4
    order: str = "HND"
    fusion: str = "none"
    latent_fusion: str = "item"
    slots: int = 3
    pages: int = 0

    def stages(self, layers: int) -> list[range]:
        return [range(layers * stage // self.pp, layers * (stage + 1) // self.pp) for stage in range(self.pp)]


@dataclass(frozen=True)
class View:
    """One tensor of one layer on one rank, as ``[units, rows, items here, bytes]`` of the rank's memory."""

    pool: str
    layer: int
    name: str
    items: NDArray[np.int64]
    array: Bytes


@dataclass(eq=False)
class RankMemory:
    """A rank: its layout, its bytes, and views of them."""

    layout: CacheLayout
    views: list[View]


@dataclass(eq=False)
class Group:
    """Ranks of one side, stage by stage, in one buffer whose first byte has address ``base``."""

    model: Model
    cut: Cut
    memory: Bytes
    base: int
    ranks: list[RankMemory] = field(default_factory=list)

    @property
    def layouts(self) -> list[CacheLayout]:
        return [rank.layout for rank in self.ranks]


def held(items: int, tp: int, rank: int) -> NDArray[np.int64]:
    """The items of a rank, from the plain meaning of tensor parallelism."""
    everything = np.arange(items)
    return np.split(everything, tp)[rank] if items >= tp else np.repeat(everything, tp // items)[rank : rank + 1]


def make_group(model: Model, cut: Cut, *, target: bool, tokens: int, name: str = "model", real: bool = False) -> Group:
    """A group with pages for ``tokens`` tokens and some more. ``real``: addresses are those of the buffer."""
    stages = cut.stages(len(model.layers))
    described: list[tuple[list[Pool], int, range]] = []
    for number, stage in enumerate(stages):
        for rank in range(cut.tp):
            with_aux = target or number == len(stages) - 1
            described.append((_pools(model, cut, stage, rank, tokens, with_aux), rank, stage))
    sizes = [[pool_bytes(pool) for pool in pools] for pools, _, _ in described]
    memory = np.full(sum(_padded(size) for rank_sizes in sizes for size in rank_sizes) + 4096, UNTOUCHED, np.uint8)
    skip = -memory.ctypes.data % 4096 if real else 0
    base = memory.ctypes.data if real else (1 << 40) * (2 if target else 1)
    group = Group(model=model, cut=cut, memory=memory, base=base)
    at = skip
    for (pools, rank, _), rank_sizes in zip(described, sizes, strict=True):
        regions = []
        views: list[View] = []
        for pool, size in zip(pools, rank_sizes, strict=True):
            regions.append(Region(base + at, size))
            views += _views(model, cut, pool, rank, memory[at : at + size])
            at += _padded(size)
        layout = CacheLayout(name, tuple(regions), tuple(pools))
        layout.validate()
        group.ranks.append(RankMemory(layout, views))
    return group


def _padded(size: int) -> int:
    return -(-size // GAP) * GAP + GAP


def pages_for(tokens: int, page_size: int) -> int:
    return tokens // page_size + 3


def _pools(model: Model, cut: Cut, stage: range, rank: int, tokens: int, with_aux: bool) -> list[Pool]:
    """The pools of one rank; pool i lies in region i."""
    tp = {"tp_size": cut.tp, "tp_rank": rank}
    pages = cut.pages or pages_for(tokens, cut.page_size)
    pools: list[Pool] = []
    if layers := model.of("kv", stage):
        shape = {"heads": model.heads, "head_bytes": model.head_bytes, "order": cut.order, "fusion": cut.fusion}
        kv = kv_pool(layers, pages=pages, page_size=cut.page_size, dtype="u1", region=len(pools), **tp, **shape)  # type: ignore[arg-type]
        pools.append(kv)
        if model.scale_bytes:
            scales = {"scale_bytes": model.scale_bytes, "row_tokens": model.scale_tokens}
            pools.append(scale_pool(kv, region=len(pools), **scales))
    if layers := model.of("swa", stage):
        shape = {"heads": model.swa_heads, "head_bytes": model.head_bytes, "order": cut.order, "fusion": cut.fusion}
        swa_pages = cut.pages or pages_for(tokens, cut.swa_page_size)
        pools.append(
            swa_pool(
                layers,
                window=model.window,
                pages=swa_pages,
                page_size=cut.swa_page_size,
                dtype="u1",
                region=len(pools),
                **tp,
                **shape,  # type: ignore[arg-type]
            )
        )
    if layers := model.of("mla", stage):
        sizes = {"latent_bytes": model.latent_bytes, "rope_bytes": model.rope_bytes, "fusion": cut.latent_fusion}
        pools.append(
            mla_pool(layers, pages=pages, page_size=cut.page_size, dtype="u1", region=len(pools), **tp, **sizes)  # type: ignore[arg-type]
        )
        if model.index_bytes:
            keys = {"key_bytes": model.index_bytes, "scale_bytes": model.index_scale_bytes}
            keys["row_tokens"] = model.index_tokens
            pools.append(
                index_pool(layers, pages=pages, page_size=cut.page_size, dtype="u1", region=len(pools), **tp, **keys)
            )
    if layers := model.of("state", stage):
        pools.append(state_pool(layers, model.tensors, slots=cut.slots, region=len(pools), **tp))
    if with_aux:
        pools.append(aux_pool(slots=cut.slots, slot_bytes=model.aux_bytes, region=len(pools), **tp))
    return pools


# ---- views: the documented shapes, nothing else --------------------------------------------------------------------


def _views(model: Model, cut: Cut, pool: Pool, rank: int, memory: Bytes) -> Iterator[View]:
    layers = sorted({plane.layer for plane in pool.planes})
    if pool.name == "kv":
        yield from _kv_views(pool, layers, held(model.heads, cut.tp, rank), model.head_bytes, cut, memory)
    elif pool.name == "swa":
        yield from _kv_views(pool, layers, held(model.swa_heads, cut.tp, rank), model.head_bytes, cut, memory)
    elif pool.name == "kv_scale":
        heads = held(model.heads, cut.tp, rank)
        rows = pool.rows // model.scale_tokens
        whole = memory.reshape(len(layers), 2, pool.units, rows, len(heads), model.scale_bytes)
        for i, layer in enumerate(layers):
            for j, name in enumerate(("k", "v")):
                yield View(pool.name, layer, name, heads, whole[i, j])
    elif pool.name == "mla":
        yield from _latent_views(model, cut, pool, layers, memory)
    elif pool.name == "index":
        rows = pool.rows // model.index_tokens
        whole = memory.reshape(len(layers), pool.units, rows * (model.index_bytes + model.index_scale_bytes))
        for i, layer in enumerate(layers):
            for name, size, start in (
                ("key", model.index_bytes, 0),
                ("scale", model.index_scale_bytes, rows * model.index_bytes),
            ):
                if size:
                    part = whole[i, :, start : start + rows * size]
                    yield View(pool.name, layer, name, np.zeros(1, np.int64), part.reshape(pool.units, rows, 1, size))
    elif pool.name == "state":
        yield from _state_views(model, cut, pool, layers, rank, memory)
    else:
        yield View(pool.name, -1, "row", np.zeros(1, np.int64), memory.reshape(pool.units, 1, 1, model.aux_bytes))


def _kv_views(
    pool: Pool, layers: Sequence[int], heads: NDArray[np.int64], head_bytes: int, cut: Cut, memory: Bytes
) -> Iterator[View]:
    inside = (len(heads), pool.rows) if cut.order == "HND" else (pool.rows, len(heads))
    shape = {
        "none": (len(layers), 2, pool.units, *inside, head_bytes),
        "page": (len(layers), pool.units, 2, *inside, head_bytes),
        "item": (len(layers), pool.units, *inside, 2, head_bytes),
    }[cut.fusion]
    whole = np.moveaxis(memory.reshape(shape), {"none": 1, "page": 2, "item": 4}[cut.fusion], 1)
    for i, layer in enumerate(layers):
        for j, name in enumerate(("k", "v")):
            array = whole[i, j]
            yield View(pool.name, layer, name, heads, array.swapaxes(1, 2) if cut.order == "HND" else array)


def _latent_views(model: Model, cut: Cut, pool: Pool, layers: Sequence[int], memory: Bytes) -> Iterator[View]:
    latent, rope = model.latent_bytes, model.rope_bytes
    whole = memory.reshape(len(layers), pool.units * pool.rows * (latent + rope))
    for i, layer in enumerate(layers):
        if cut.latent_fusion == "item":
            both = whole[i].reshape(pool.units, pool.rows, 1, latent + rope)
            arrays = (both[..., :latent], both[..., latent:])
        else:
            first, second = np.split(whole[i], [pool.units * pool.rows * latent])
            arrays = (
                first.reshape(pool.units, pool.rows, 1, latent),
                second.reshape(pool.units, pool.rows, 1, rope),
            )
        for name, array in zip(("latent", "rope"), arrays, strict=True):
            yield View(pool.name, layer, name, np.zeros(1, np.int64), array)


def _state_views(model: Model, cut: Cut, pool: Pool, layers: Sequence[int], rank: int, memory: Bytes) -> Iterator[View]:
    at = 0
    for layer in layers:
        for tensor in model.tensors:
            at = -(-at // 64) * 64
            if tensor.axis is None:
                size = int(np.prod(tensor.shape)) * tensor.element_bytes
                array = memory[at : at + pool.units * size].reshape(pool.units, 1, 1, size)
                yield View(pool.name, layer, tensor.name, np.zeros(1, np.int64), array)
                at += pool.units * size
                continue
            shares = [held(shard.items, cut.tp, rank) for shard in tensor.shards]
            widths = [
                len(share) * (shard.size // shard.items) for share, shard in zip(shares, tensor.shards, strict=True)
            ]
            local = (*tensor.shape[: tensor.axis], sum(widths), *tensor.shape[tensor.axis + 1 :], tensor.element_bytes)
            size = int(np.prod(local))
            whole = memory[at : at + pool.units * size].reshape(pool.units, *local)
            at += pool.units * size
            begin = 0
            for share, width, shard in zip(shares, widths, tensor.shards, strict=True):
                part = np.moveaxis(whole, 1 + tensor.axis, 0)[begin : begin + width]
                part = np.moveaxis(part, 0, 1 + tensor.axis)
                rows = int(np.prod(tensor.shape[: tensor.axis], dtype=np.int64))
                array = part.reshape(pool.units, rows, len(share), -1)
                assert np.shares_memory(array, memory)
                name = f"{tensor.name}.{shard.name}" if shard.name else tensor.name
                yield View(pool.name, layer, name, share, array)
                begin += width


# ---- what is cached, and where it is put ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One request: its tokens, what the target holds already, and the units of each pool on both sides."""

    tokens: int
    prefix: int
    seed: int


class Reference:
    """The cache of one prompt as arrays over the whole model: ``values[pool, layer, name][row, item, byte]``."""

    def __init__(self, source: Group, target: Group, prompt: Prompt) -> None:
        self.prompt = prompt
        rng = np.random.default_rng(prompt.seed)
        self.values: dict[tuple[str, int, str], Bytes] = {}
        self.source_units: dict[str, NDArray[np.int64]] = {}
        self.target_units: dict[str, NDArray[np.int64]] = {}
        self.ranges: dict[str, range] = {}
        self.row_tokens = {"kv_scale": source.model.scale_tokens, "index": source.model.index_tokens}
        pools = {pool.name: pool for layout in source.layouts for pool in layout.pools}
        theirs = {pool.name: pool for layout in target.layouts for pool in layout.pools}
        for name, pool in pools.items():
            self._choose(name, pool, theirs[name], source.model, rng)
        for rank in source.ranks:
            for view in rank.views:
                key = (view.pool, view.layer, view.name)
                if key not in self.values:
                    rows = -(-prompt.tokens // self.row_tokens.get(view.pool, 1))
                    rows = rows if view.pool in self.ranges else view.array.shape[1]
                    items = self._items(source, key)
                    self.values[key] = rng.integers(0, 256, (rows, items, view.array.shape[3]), dtype=np.uint8)

    def _choose(self, name: str, mine: Pool, other: Pool, model: Model, rng: np.random.Generator) -> None:
        if not mine.paged:
            self.source_units[name], self.target_units[name] = (
                rng.integers(mine.units, size=1),
                rng.integers(other.units, size=1),
            )
            return
        tokens, prefix = self.prompt.tokens, self.prompt.prefix
        self.ranges[name] = window_range(
            tokens,
            model.window if name == "swa" else 0,
            prefix=prefix,
            target_page=other.rows,
            source_page=mine.rows if self.prompt.seed % 2 else None,
        )
        if name == "kv_scale":
            self.source_units[name], self.target_units[name] = self.source_units["kv"], self.target_units["kv"]
            return
        span = self.ranges[name]
        self.source_units[name] = rng.permutation(mine.units)[: -(-tokens // mine.rows)]
        count = -(-span.stop // other.rows) - span.start // other.rows if span else 0
        self.target_units[name] = rng.permutation(other.units)[:count]

    @staticmethod
    def _items(source: Group, key: tuple[str, int, str]) -> int:
        held_items = [
            view.items for rank in source.ranks for view in rank.views if (view.pool, view.layer, view.name) == key
        ]
        return int(np.concatenate(held_items).max()) + 1

    def fill(self, source: Group) -> None:
        """Put the values where the source's ranks hold them; every other byte is noise."""
        source.memory[:] = np.random.default_rng(self.prompt.seed + 1).integers(
            0, 256, len(source.memory), dtype=np.uint8
        )
        for rank in source.ranks:
            for view in rank.views:
                values = self.values[view.pool, view.layer, view.name][:, view.items]
                units, rows = self._places(view, range(self.prompt.tokens), self.source_units[view.pool], 0)
                view.array[units, rows] = values

    def _places(
        self, view: View, tokens: range, units: NDArray[np.int64], first: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Unit and row of every row of the tokens; ``first``: the absolute page that ``units`` begin with."""
        rows = view.array.shape[1]
        if view.pool not in self.ranges:
            return np.repeat(units, rows), np.arange(rows)
        group = self.row_tokens.get(view.pool, 1)
        numbers = np.arange(tokens.start // group, -(-tokens.stop // group)) if tokens else np.zeros(0, np.int64)
        return units[numbers // rows - first], numbers % rows

    def differences(self, target: Group, blocks: dict[str, int]) -> list[str]:
        """What is not as it should be in the target's memory: wrong values, and bytes that nobody granted.

        ``blocks``: the granularity in tokens with which each pool was written; rows up to a whole block may be noise.
        """
        found = []
        for rank in target.ranks:
            for view in rank.views:
                tokens = self.ranges.get(view.pool, range(0))
                page = view.array.shape[1] * self.row_tokens.get(view.pool, 1)
                first = tokens.start // page
                units, rows = self._places(view, tokens, self.target_units[view.pool], first)
                values = self.values[view.pool, view.layer, view.name][:, view.items]
                group = self.row_tokens.get(view.pool, 1)
                wanted = values[tokens.start // group :] if view.pool in self.ranges else values
                if not np.array_equal(view.array[units, rows], wanted[: len(rows)]):
                    found.append(f"{view.pool} {view.layer} {view.name}: wrong bytes")
                block = blocks.get(view.pool, 1)
                whole = range(tokens.start, -(-tokens.stop // block) * block if tokens else tokens.start)
                units, rows = self._places(view, whole, self.target_units[view.pool], first)
                view.array[units, rows] = UNTOUCHED
        stray = int((target.memory != UNTOUCHED).sum())
        if stray:
            found.append(f"{stray} bytes outside the grants were written")
        return found

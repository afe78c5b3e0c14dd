"""SGLang's buffers as a layout, and its lists of pages and slots as spans.

SGLang describes a rank's memory in ``KVArgs``: address, length and item length of every buffer, where an item is a page
or a slot. What the numbers mean follows from the kind of pool:

- **K and V**: one buffer for each layer, all K and then all V; a page is ``[tokens, heads, head size]``.
- **MLA latents**: one buffer for each layer, on every rank the same.
- **sliding window** (state component ``swa``): as K and V, with pages of its own.
- **index keys** (``dsa``): a page is taken whole; on every rank the same.
- **recurrent state** (``mamba``): slots; the tensor-parallel dimension is known, and the blocks along it where SGLang
  tells them. Where it does not, a slot is one run and tensor-parallel sizes must be equal.
- **aux**: any number of buffers, one row of each for a request.

Pages of a draft model are those of the target model; how many heads it has is not told, so it needs equal
tensor-parallel sizes. A component that is not named here ends the start by its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvbaton.errors import ConfigError, LayoutError
from kvbaton.layout import NO_LAYER, Axis, CacheLayout, MemoryKind, Plane, Pool, PoolKind, Region
from kvbaton.protocol.messages import Grant

KV, DRAFT, AUX = "kv", "draft", "aux"
#: State components that are handed over: SGLang's name, and whether they are paged.
COMPONENTS = {"swa": True, "dsa": True, "mamba": False}


@dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """What ``KVArgs`` does not say of a rank.

    Args:
        heads: KV heads of the model, over all ranks; 0 for latents.
        latent: the cache is one of MLA latents.
        memory, device: where K, V and states lie; aux rows are in host memory.
        model: what :attr:`kvbaton.layout.CacheLayout.model` says.
        prefill: a prefill rank; the last pipeline stage alone hands over the aux row.
    """

    heads: int
    latent: bool = False
    tp_size: int = 1
    tp_rank: int = 0
    pp_size: int = 1
    pp_rank: int = 0
    memory: MemoryKind = "DRAM"
    device: int = 0
    model: str = ""
    prefill: bool = True

    @property
    def opaque(self) -> Axis:
        """What nobody can take apart: equal tensor-parallel sizes."""
        return Axis(self.tp_size, self.tp_size, self.tp_rank)

    @property
    def alike(self) -> Axis:
        """What every rank holds alike."""
        return Axis(1, self.tp_size, self.tp_rank)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cache:
    """A rank's memory, and how SGLang's lists turn into spans. ``states``: (pool, paged) as SGLang lists them."""

    layout: CacheLayout
    page_size: int
    paged: tuple[str, ...]
    states: tuple[tuple[str, bool], ...]
    aux: bool

    def spans(self, pages: Any, start: int) -> list[Grant]:
        """Of whole pages that hold the tokens from ``start`` on."""
        stop = start + len(pages) * self.page_size
        return [Grant(pool, start, stop, pages) for pool in self.paged]

    def rest(self, stop: int, aux: int | None, states: Sequence[Any] | None) -> list[Grant]:
        """What goes with the last pages, which end at token ``stop``: the aux row, and each state as SGLang lists its
        pages or its slot. Pages are the last ones of the prompt, however many.

        Raises LayoutError where SGLang lists something else.
        """
        listed = list(states or ())
        if len(listed) != len(self.states):
            raise LayoutError(f"SGLang lists {len(listed)} state components, its memory has {len(self.states)}")
        found = []
        if self.aux:
            if aux is None or aux < 0:
                raise LayoutError(f"there is no aux row {aux}")
            found.append(Grant(AUX, 0, 0, (int(aux),)))
        for (pool, paged), given in zip(self.states, listed, strict=True):
            units = np.asarray(given if given is not None else (), dtype=np.int32).reshape(-1)
            if paged:
                found.append(Grant(pool, stop - len(units) * self.page_size, stop, units))
            elif len(units) == 1:
                found.append(Grant(pool, 0, 0, (int(units[0]),)))
            else:
                raise LayoutError(f"pool {pool!r}: one slot for each request, SGLang lists {len(units)}")
        return found


@dataclass(slots=True)
class _Regions:
    memory: MemoryKind
    device: int
    found: dict[Region, int] = field(default_factory=dict)

    def of(self, address: int, length: int, *, host: bool = False) -> int:
        region = Region(int(address), int(length)) if host else Region(address, length, self.memory, self.device)
        return self.found.setdefault(region, len(self.found))


@dataclass(frozen=True, slots=True)
class _Buffer:
    """One of SGLang's buffers: region, pages or slots, bytes of an item."""

    region: int
    units: int
    item: int


def cache_of(args: Any, rank: Rank) -> Cache:
    """The memory of ``args``, SGLang's ``KVArgs``. Raises ConfigError for what cannot be handed over, LayoutError."""
    if getattr(args, "mla_compression_ratios", None):
        raise ConfigError("a cache of compressed latents (DeepSeek V4) cannot be handed over yet")
    regions = _Regions(rank.memory, rank.device)
    pools = _kv_pools(args, rank, regions)
    paged = tuple(pool.name for pool in pools)
    states: list[tuple[str, bool]] = []
    for index, kind in enumerate(str(getattr(kind, "value", kind)) for kind in args.state_types):
        if kind not in COMPONENTS or any(kind == known for known, _ in states):
            raise ConfigError(f"state component {kind!r} cannot be handed over yet")
        pools.append(_state_pool(args, index, kind, rank, regions))
        states.append((kind, COMPONENTS[kind]))
    aux = not rank.prefill or rank.pp_rank == rank.pp_size - 1
    if aux:
        pools.append(_aux_pool(args, rank, regions))
    layout = CacheLayout(rank.model, tuple(regions.found), tuple(pools))
    return Cache(layout=layout, page_size=args.page_size, paged=paged, states=tuple(states), aux=aux)


def _buffers(
    addresses: Sequence[int], lengths: Sequence[int], items: Sequence[int], regions: _Regions, *, host: bool = False
) -> list[_Buffer]:
    found = []
    for address, length, item in zip(addresses, lengths, items, strict=True):
        if item < 1 or length < item:
            raise LayoutError(f"a buffer of {length} bytes with items of {item} makes no sense")
        found.append(_Buffer(regions.of(int(address), int(length), host=host), int(length) // int(item), int(item)))
    return found


def _kv_pools(args: Any, rank: Rank, regions: _Regions) -> list[Pool]:
    buffers = _buffers(args.kv_data_ptrs, args.kv_data_lens, args.kv_item_lens, regions)
    ids = [int(layer) for layer in args.kv_layer_ids or ()]
    main = len(buffers) - int(args.num_draft_entries)
    first = int(getattr(args, "prefill_start_layer", 0)) if rank.prefill and rank.pp_size > 1 else 0
    if rank.pp_size > 1 and not rank.prefill and not ids:
        raise ConfigError("SGLang does not tell which layers a decode stage has: use --pp-size 1 on decode")
    pools = []
    if main:
        kind: PoolKind = "mla" if rank.latent else "kv"
        tensors = _tensors(buffers[:main], ids[:main], first, halves=not rank.latent)
        pools.append(_paged(KV, kind, tensors, args, rank, None if rank.latent else rank.heads))
    if buffers[main:]:
        count = len(buffers) - main
        tensors = [(i, "draft", buffer) for i, buffer in zip(range(count), buffers[main:], strict=True)]
        pools.append(_opaque(DRAFT, "kv", tensors, args, rank.opaque))
    return pools


def _tensors(
    buffers: Sequence[_Buffer], ids: Sequence[int], first: int, *, halves: bool
) -> list[tuple[int, str, _Buffer]]:
    """(layer, tensor, buffer): latents of every layer, or K of every layer and then V."""
    if not halves:
        return [(ids[i] if ids else first + i, "latent", buffer) for i, buffer in enumerate(buffers)]
    layers, odd = divmod(len(buffers), 2)
    if odd:
        raise ConfigError(f"{len(buffers)} buffers are no K and V of each layer: this cache cannot be handed over yet")
    return [
        (ids[i] if ids else first + i % layers, "k" if i < layers else "v", buffer) for i, buffer in enumerate(buffers)
    ]


def _check_divides(name: str, layer: int, buffer: _Buffer, page_size: int, heads: int) -> None:
    if buffer.item % (page_size * heads):
        raise LayoutError(
            f"pool {name!r} layer {layer}: a page of {buffer.item} bytes is no {page_size} tokens of {heads} heads"
        )


def _paged(
    name: str, kind: PoolKind, tensors: Sequence[tuple[int, str, _Buffer]], args: Any, rank: Rank, heads: int | None
) -> Pool:
    """Pages of ``[tokens, heads here, head size]``; without heads of one item for each token."""
    axis = rank.alike if heads is None else Axis(heads, rank.tp_size, rank.tp_rank)
    axis.validate(f"pool {name!r}")
    planes = []
    for layer, tensor, buffer in tensors:
        _check_divides(name, layer, buffer, args.page_size, axis.width)
        token = buffer.item // args.page_size
        size = token // axis.width
        planes.append(Plane(layer, tensor, buffer.region, 0, buffer.item, token, size, size, axis))
    units = min(buffer.units for _, _, buffer in tensors)
    return Pool(name, kind, units, args.page_size, True, str(args.kv_cache_dtype_str), tuple(planes))


def _opaque(name: str, kind: PoolKind, tensors: Sequence[tuple[int, str, _Buffer]], args: Any, axis: Axis) -> Pool:
    """Pages that are taken whole."""
    planes = tuple(
        Plane(layer, tensor, buffer.region, 0, buffer.item, buffer.item, buffer.item, buffer.item, axis, 1)
        for layer, tensor, buffer in tensors
    )
    units = min(buffer.units for _, _, buffer in tensors)
    return Pool(name, kind, units, args.page_size, True, str(args.kv_cache_dtype_str), planes)


def _state_pool(args: Any, index: int, kind: str, rank: Rank, regions: _Regions) -> Pool:
    buffers = _buffers(args.state_data_ptrs[index], args.state_data_lens[index], args.state_item_lens[index], regions)
    ids = [int(layer) for layer in args.state_layer_ids[index] or ()]
    if rank.pp_size > 1 and not ids:
        raise ConfigError(f"SGLang does not tell which layers {kind!r} has in a pipeline stage: use --pp-size 1")
    if kind == "mamba":
        return _mamba_pool(args, index, buffers, ids, rank)
    if kind == "dsa":
        tensors = [(ids[i] if ids else i, "index", buffer) for i, buffer in enumerate(buffers)]
        return _opaque(kind, "index", tensors, args, rank.alike)
    tensors = _tensors(buffers, ids, 0, halves=True)
    if getattr(args, "swa_kv_cache_layout", None) != "nhd":
        return _opaque(kind, "swa", tensors, args, rank.opaque)
    return _paged(kind, "swa", tensors, args, rank, rank.heads)


def _mamba_pool(args: Any, index: int, buffers: Sequence[_Buffer], ids: Sequence[int], rank: Rank) -> Pool:
    """Slots ``[rows, dimension, rest]``: the dimension is sharded, in blocks where SGLang tells them."""
    sizes = args.state_dim_per_tensor[index] or [None] * len(buffers)
    outer = args.state_slice_outer_counts[index] or [1] * len(buffers)
    groups = args.state_conv_shard_groups[index] or [None] * len(buffers)
    known = any(blocks for blocks in groups)  # then what has no blocks is sharded by itself
    planes: list[Plane] = []
    seen: dict[int, int] = {}
    for i, buffer in enumerate(buffers):
        layer = ids[i] if ids else i
        name = f"state{seen.setdefault(layer, 0)}"
        seen[layer] += 1
        size, rows, blocks = sizes[i], int(outer[i]), groups[i]
        if size == 0:
            shards = [("", 1, rank.alike)]
            size, rows = 1, 1
        elif blocks and sum(blocks) == size * rank.tp_size:
            shards = [
                (f".{j}", block // rank.tp_size, Axis(block, rank.tp_size, rank.tp_rank))
                for j, block in enumerate(blocks)
            ]
        elif size and known:
            shards = [("", size, Axis(size * rank.tp_size, rank.tp_size, rank.tp_rank))]
        else:
            shards = [("", 1, rank.opaque)]
            size, rows = 1, 1
        if buffer.item % (rows * size):
            raise LayoutError(f"state of layer {layer}: {buffer.item} bytes are no {rows} rows of {size}")
        row = buffer.item // rows
        each, at = row // size, 0
        for suffix, here, axis in shards:
            axis.validate(f"pool 'mamba' layer {layer}")
            planes.append(Plane(layer, name + suffix, buffer.region, at, buffer.item, row, each, each, axis, rows))
            at += here * each
    units = min(buffer.units for buffer in buffers)
    return Pool("mamba", "state", units, 1, False, "bytes", tuple(planes))


def _aux_pool(args: Any, rank: Rank, regions: _Regions) -> Pool:
    buffers = _buffers(args.aux_data_ptrs, args.aux_data_lens, args.aux_item_lens, regions, host=True)
    planes = tuple(
        Plane(NO_LAYER, f"buffer{i}", buffer.region, 0, buffer.item, buffer.item, buffer.item, buffer.item, rank.alike)
        for i, buffer in enumerate(buffers)
    )
    return Pool(AUX, "aux", min(buffer.units for buffer in buffers), 1, False, "bytes", planes)

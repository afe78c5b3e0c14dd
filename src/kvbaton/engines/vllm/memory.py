"""vLLM's cache tensors as a layout, from their strides; never guessed from their shapes.

vLLM views the cache of every layer as ``[blocks, heads, tokens, content]`` over one allocation, whatever the order in
memory; strides tell the order. What they do not tell is named:

- **CPU_ATTN** lets no token be cut out of a (block, head): K comes first, packed for the instruction set, then V. The
  pool's ``packing`` says which set, so that two processors that pack differently refuse each other, and page sizes must
  be equal. Heads can be cut, so tensor-parallel sizes may differ.
- Elsewhere K and V of a token lie side by side in ``content``, in an order that the attention backend chooses: it is
  part of the model's text.
- Recurrent state is bytes in one row per block. Those of Mamba2 are told apart (x, B and C of the convolution, the
  heads of the state), so that tensor-parallel sizes may differ; others are one run, and sizes must be equal.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backends
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from kvbaton.engines.model import model_text
from kvbaton.engines.vllm.admission import Admission, Need
from kvbaton.engines.vllm.groups import CacheGroup, CacheGroups
from kvbaton.engines.vllm.orders import Blocks
from kvbaton.errors import ConfigError
from kvbaton.layout import Axis, CacheLayout, Plane, Pool, Region, Strided, pool_of_strides

_LAYER = re.compile(r"(?:^|\.)(\d+)\.(.*)")


def cache_groups(kv_cache_config: Any) -> CacheGroups:
    """The groups of layers that are handed over. Raises ConfigError for a kind of cache that is unknown here."""
    numbers = {pool: count() for pool in ("kv", "mla", "swa", "state")}
    found = []
    for index in kv_cache_config.transfer_group_ids:
        spec = _spec(kv_cache_config.kv_cache_groups[index], "")
        if isinstance(spec, MambaSpec):
            pool, kind, window, spare = "state", "state", 0, spec.num_speculative_blocks
        elif isinstance(spec, SlidingWindowSpec):
            pool, kind, window, spare = "swa", "window", spec.sliding_window, 0
        elif isinstance(spec, FullAttentionSpec):
            pool, kind, window, spare = "mla" if isinstance(spec, MLAAttentionSpec) else "kv", "full", 0, 0
        else:
            raise ConfigError(f"a cache of kind {type(spec).__name__} cannot be handed over yet")
        found.append(
            CacheGroup(
                pool=f"{pool}{next(numbers[pool]) or ''}",
                index=index,
                kind=kind,  # type: ignore[arg-type]
                block_size=spec.block_size,
                window=window,
                spare=spare,
            )
        )
    if not any(group.kind != "state" for group in found):
        raise ConfigError("a model without any attention cannot be handed over yet")
    return CacheGroups(tuple(found))


def admission(kv_cache_config: Any, vllm_config: Any, *, both: bool) -> Admission:
    """Which requests may take blocks; ``both``: for both roles. What a request needs at most is vLLM's own figure."""
    needs = []
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        most = -(-spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes)
        needs.append(Need(spec.block_size, most, fixed=isinstance(_spec(group, ""), MambaSpec)))
    return Admission(
        needs,
        blocks=kv_cache_config.num_blocks - 1,  # but for the null block
        longest=vllm_config.model_config.max_model_len,
        both=both,
    )


def _spec(group: Any, layer: str) -> Any:
    spec = group.kv_cache_spec
    if isinstance(spec, UniformTypeKVCacheSpecs):
        return spec.kv_cache_specs[layer] if layer else next(iter(spec.kv_cache_specs.values()))
    return spec


def model_of(vllm_config: Any, weights: str) -> str:
    """What ``CacheLayout.model`` says: the model's config, the cache's dtype, the attention backends."""
    backends = sorted({backend.get_name() for backend in get_current_attn_backends(vllm_config)})
    return model_text(
        "vllm",
        vllm_config.model_config,
        weights=weights,
        cache_dtype=vllm_config.cache_config.cache_dtype,
        attention=",".join(backends),
    )


@dataclass(frozen=True, kw_only=True)
class CacheMemory:
    """A rank's cache: its layout, the tokens of a block and of a unit by pool, the tensors by pool."""

    layout: CacheLayout
    pages: tuple[tuple[str, int, int], ...]
    tensors: Mapping[str, tuple[Any, ...]]

    def clear_behind(self, blocks: Blocks) -> None:
        """Zero what follows the last token in its block: prefill does not write it, and what a former owner left there
        may be no number. vLLM zeroes new blocks, but none that a connector fills."""
        sizes = {pool: (block, unit) for pool, block, unit in self.pages}
        block, unit = sizes.get(blocks.pool, (0, 0))
        behind = blocks.stop % block if block else 0
        if not behind or self.layout.pool(blocks.pool).packing:
            return
        for tensor in self.tensors[blocks.pool]:
            states = tensor.shape[2]
            for j in range(behind // unit, block // unit):
                row = max(0, behind - j * unit) * states // unit
                tensor[blocks.ids[-1] * (block // unit) + j, :, row:, :] = 0


def cache_memory(
    kv_caches: Mapping[str, Any], kv_cache_config: Any, vllm_config: Any, *, tp_rank: int, weights: str
) -> CacheMemory:
    """The layout of the tensors that vLLM registers. Raises ConfigError or LayoutError where they do not fit it."""
    regions: dict[tuple[int, int], int] = {}
    tp_size = vllm_config.parallel_config.tensor_parallel_size
    pools, pages, tensors = [], [], {}
    for group in cache_groups(kv_cache_config).groups:
        members = [
            (name, _spec(kv_cache_config.kv_cache_groups[group.index], name), kv_caches[name])
            for name in kv_cache_config.kv_cache_groups[group.index].layer_names
            if name in kv_caches
        ]
        if not members:
            raise ConfigError(f"pool {group.pool!r}: vLLM registered no tensor of its layers")
        for _, _, tensor in members:
            storage = tensor.untyped_storage()
            regions.setdefault((storage.data_ptr(), storage.nbytes()), len(regions))
        pool = (
            _state_pool(group, members, regions, vllm_config, tp_size, tp_rank)
            if group.kind == "state"
            else _paged_pool(group, members, regions, vllm_config, tp_size, tp_rank)
        )
        pools.append(pool)
        tensors[group.pool] = tuple(tensor for _, _, tensor in members)
        if group.kind != "state":
            if group.block_size % pool.page_size:
                raise ConfigError(
                    f"pool {group.pool!r}: blocks of {group.block_size} tokens, pages of {pool.page_size}"
                )
            pages.append((group.pool, group.block_size, pool.page_size))
    device = next(iter(kv_caches.values())).device
    listed = tuple(
        Region(address, length, "DRAM" if device.type == "cpu" else "VRAM", device.index or 0)
        for address, length in regions
    )
    layout = CacheLayout(model_of(vllm_config, weights), listed, tuple(pools))
    return CacheMemory(layout=layout, pages=tuple(pages), tensors=tensors)


def layer_number(name: str) -> int:
    """The absolute id of vLLM's layer ``name``. Raises ConfigError for one that has none."""
    return _numbered(name)[0]


def _numbered(name: str) -> tuple[int, str]:
    found = _LAYER.search(name)
    if found is None:
        raise ConfigError(f"layer {name!r} has no number, so that it cannot be paired with the other side's")
    return int(found[1]), found[2]


def _strided(name: str, tensor: Any, regions: Mapping[tuple[int, int], int]) -> Strided:
    number, rest = _numbered(name)
    storage = tensor.untyped_storage()
    return Strided(
        layer=number,
        name=rest,
        region=regions[storage.data_ptr(), storage.nbytes()],
        offset=tensor.data_ptr() - storage.data_ptr(),
        shape=tuple(tensor.shape),
        strides=tuple(tensor.stride()),
        element_bytes=tensor.element_size(),
    )


def _paged_pool(
    group: CacheGroup,
    members: list[tuple[str, Any, Any]],
    regions: Mapping[tuple[int, int], int],
    vllm_config: Any,
    tp_size: int,
    tp_rank: int,
) -> Pool:
    spec = members[0][1]
    rows = [_strided(name, tensor, regions) for name, _, tensor in members]
    latent = isinstance(spec, MLAAttentionSpec) or rows[0].shape[1] == 1 == _total_heads(spec, vllm_config, tp_size)
    packing = ""
    if members[0][2].device.type == "cpu" and not latent:
        packing = f"CPU_ATTN:{_cpu_isa(spec, vllm_config)}"
    if latent:
        rows = [_without_heads(row) for row in rows]
    return pool_of_strides(
        group.pool,
        "mla" if latent else "swa" if group.kind == "window" else "kv",
        rows,
        dims="UNC" if latent else "UHNC",
        dtype=str(spec.dtype),
        items=1 if latent else _total_heads(spec, vllm_config, tp_size),
        tp_size=tp_size,
        tp_rank=tp_rank,
        window=group.window,
        packing=packing,
    )


def _without_heads(row: Strided) -> Strided:
    return replace(row, shape=(row.shape[0], *row.shape[2:]), strides=(row.strides[0], *row.strides[2:]))


def _total_heads(spec: Any, vllm_config: Any, tp_size: int) -> int:
    """Heads over all ranks; ranks beyond them hold copies."""
    total = int(vllm_config.model_config.get_total_num_kv_heads())
    return total if spec.num_heads == max(1, total // tp_size) else spec.num_heads * tp_size


def _cpu_isa(spec: Any, vllm_config: Any) -> str:
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    return str(_get_attn_isa(spec.dtype, spec.block_size, spec.head_size, str(vllm_config.cache_config.cache_dtype)))


def _state_pool(
    group: CacheGroup,
    members: list[tuple[str, Any, Any]],
    regions: Mapping[tuple[int, int], int],
    vllm_config: Any,
    tp_size: int,
    tp_rank: int,
) -> Pool:
    planes: list[Plane] = []
    for name, spec, tensor in members:
        row = _strided(name, tensor, regions)
        if tensor.element_size() * tensor[0].numel() < spec.state_content_size_bytes:
            raise ConfigError(
                f"layer {name!r}: a state of {spec.state_content_size_bytes} bytes does not fit its block"
            )
        planes += _state_planes(row, spec, vllm_config, tp_size, tp_rank)
    spec = members[0][1]
    dtype = ",".join(str(dtype) for dtype in spec.dtypes)
    return Pool(group.pool, "state", members[0][2].shape[0], 1, False, dtype, tuple(planes))


def _state_planes(row: Strided, spec: Any, vllm_config: Any, tp_size: int, tp_rank: int) -> Iterator[Plane]:
    unit = row.strides[0] * row.element_bytes
    whole = spec.state_content_size_bytes
    groups = _mamba_groups(spec, vllm_config, tp_size)
    if groups is None:
        ranks = 1 if spec.tp_replicated else tp_size
        axis = Axis(ranks, tp_size, tp_rank)
        yield Plane(row.layer, row.name, row.region, row.offset, unit, whole, whole, whole, axis)
        return
    (conv, ssm), (conv_bytes, ssm_bytes) = spec.shapes, (dtype.itemsize for dtype in spec.dtypes)
    heads, head_dim, state_size = ssm
    local_groups = max(1, groups // tp_size)
    channels = heads * head_dim + 2 * local_groups * state_size
    channels_first = conv[0] == channels
    width = conv[1] if channels_first else conv[0]
    at = row.offset
    for name, size, items, items_here in (
        ("x", heads * head_dim, heads * tp_size, heads),
        ("b", local_groups * state_size, groups, local_groups),
        ("c", local_groups * state_size, groups, local_groups),
    ):
        each = size // items_here * conv_bytes
        axis = Axis(items, tp_size, tp_rank)
        if channels_first:  # [channels, width]: an item's channels with all their positions
            each *= width
            yield Plane(row.layer, f"{row.name}.conv.{name}", row.region, at, unit, each, each, each, axis, 1)
            at += items_here * each
        else:  # [width, channels]: an item is cut out of every row
            step = channels * conv_bytes
            yield Plane(row.layer, f"{row.name}.conv.{name}", row.region, at, unit, step, each, each, axis, width)
            at += items_here * each
    at = row.offset + conv[0] * conv[1] * conv_bytes
    each = head_dim * state_size * ssm_bytes
    yield Plane(
        row.layer, f"{row.name}.ssm", row.region, at, unit, each, each, each, Axis(heads * tp_size, tp_size, tp_rank), 1
    )


def _mamba_groups(spec: Any, vllm_config: Any, tp_size: int) -> int | None:
    """Groups of a Mamba2 model over all ranks; None where its state is not told apart."""
    shapes = spec.shapes
    if spec.tp_replicated or len(shapes) != 2 or len(shapes[0]) != 2 or len(shapes[1]) != 3:
        return None
    if getattr(spec.mamba_type, "name", "") != "MAMBA2":
        return None
    heads, head_dim, state_size = shapes[1]
    for channels in shapes[0]:
        rest = channels - heads * head_dim
        if rest > 0 and rest % (2 * state_size) == 0:
            local = rest // (2 * state_size)
            config = vllm_config.model_config.hf_text_config
            names = ("mamba_n_groups", "n_groups", "mamba_ngroups")
            total = next((int(getattr(config, name)) for name in names if getattr(config, name, None)), local * tp_size)
            return total if local == max(1, total // tp_size) else None
    return None


def fence_for(device: Any) -> Any:
    """Ready once everything that was launched on ``device`` so far is in memory."""
    if device.type != "cuda":
        from kvbaton import ALWAYS_READY

        return ALWAYS_READY
    event = torch.cuda.Event()
    event.record()
    return event.query

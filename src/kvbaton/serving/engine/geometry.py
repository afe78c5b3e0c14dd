"""What a model remembers of a prompt, probed: which tensors of which layers, in pages or in slots.

Rules: one table says what each of transformers' cache layer classes holds; everything else (heads, widths, windows,
state shapes) is read off a cache that the model itself has filled. No model family is named anywhere. A class that is
not in the table is refused by name, before any memory exists.

This file must not know of pools, shards or peers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import DynamicCache
from transformers.cache_utils import (
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from kvbaton.errors import ConfigError
from kvbaton.layout import PoolKind
from kvbaton.serving.engine.versions import cache_argument

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
#: Tokens that the probe computes: more than the kernel of any convolution, so that its state has its full shape.
PROBE_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Holds:
    """What one layer keeps: keys and values of all tokens ("full") or of a window, index keys, recurrent states."""

    attention: Literal["", "full", "window"] = ""
    index: bool = False
    state: bool = False

    @property
    def anything(self) -> bool:
        return bool(self.attention or self.state)


#: The one place that knows transformers' cache layer classes.
CACHE_LAYERS: dict[type, Holds] = {
    DynamicLayer: Holds("full"),
    DynamicSlidingWindowLayer: Holds("window"),
    DynamicIndexedLayer: Holds("full", index=True),
    LinearAttentionLayer: Holds(state=True),
    LinearAttentionAndFullAttentionLayer: Holds("full", state=True),
    LinearAttentionAndSlidingWindowAttentionLayer: Holds("window", state=True),
    DummyLayer: Holds(),
}


@dataclass(frozen=True, slots=True)
class PagedTensor:
    """One tensor of one layer: ``heads`` vectors of ``width`` elements for each token, over the whole model."""

    layer: int
    name: str
    heads: int
    width: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PagedGeometry:
    """The tensors of one paged pool. ``window`` tokens are kept, 0 means all."""

    name: str
    kind: PoolKind
    tensors: tuple[PagedTensor, ...]
    window: int = 0

    @property
    def token_elements(self) -> int:
        """Elements of one token in all layers."""
        return sum(tensor.heads * tensor.width for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class CachedTensor:
    """A tensor of fixed ``shape`` that one layer keeps for each request. ``dtype`` is a key of :data:`DTYPES`."""

    layer: int
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * int(DTYPES[self.dtype].itemsize)


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """What the caches of a model are made of. ``holds`` has one entry per layer, ``dtype`` is that of the pages."""

    holds: tuple[Holds, ...]
    paged: tuple[PagedGeometry, ...]
    states: tuple[CachedTensor, ...] = ()
    max_positions: int
    vocab_size: int
    dtype: str

    @property
    def layers(self) -> int:
        return len(self.holds)

    @property
    def window(self) -> int:
        """Tokens that sliding-window layers see; 0 where there are none."""
        return max((pool.window for pool in self.paged), default=0)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all pools that keep every token."""
        return sum(p.token_elements for p in self.paged if not p.window) * int(DTYPES[self.dtype].itemsize)

    @property
    def state_bytes(self) -> int:
        """Bytes of one request's states."""
        return sum(state.bytes for state in self.states)

    @property
    def heads(self) -> int:
        """Most heads of any tensor: what tensor parallelism divides."""
        return max((tensor.heads for pool in self.paged for tensor in pool.tensors), default=1)

    def __repr__(self) -> str:
        pools = [f"{p.name}: {p.token_elements} a token" + (f" of {p.window}" * bool(p.window)) for p in self.paged]
        states = [f"state: {self.state_bytes} bytes"] if self.states else []
        return f"Geometry({self.layers} layers, {', '.join([*pools, *states])}, {self.dtype})"


def probe_geometry(network: Any, dtype: str) -> Geometry:
    """Geometry of the cache that ``network`` really fills: a few tokens are computed to see it. Raises ConfigError."""
    config = network.config.get_text_config(decoder=True)
    kind = getattr(config, "model_type", type(config).__name__)
    cache = _empty_cache(network.config, config, kind)
    max_positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(max_positions, int) or max_positions < 1:
        raise ConfigError(f"{kind} does not say max_position_embeddings, so requests cannot be checked against it")
    with torch.inference_mode():
        probe = torch.zeros((1, min(PROBE_TOKENS, max_positions)), dtype=torch.long, device=network.device)
        network(input_ids=probe, use_cache=True, **{cache_argument(network): cache})
    holds = tuple(CACHE_LAYERS[type(layer)] for layer in cache.layers)
    pools = [_full_pool(cache, holds, kind), _window_pool(cache, holds, kind), _index_pool(cache, holds, kind)]
    states = tuple(_states(cache, holds, kind))
    if not any(pools) and not states:
        raise ConfigError(f"{kind} keeps nothing between tokens; there is nothing to hand over")
    return Geometry(
        holds=holds,
        paged=tuple(pool for pool in pools if pool is not None),
        states=states,
        max_positions=max_positions,
        vocab_size=int(network.get_input_embeddings().weight.shape[0]),
        dtype=dtype,
    )


def _empty_cache(whole: Any, config: Any, kind: str) -> Any:
    if getattr(whole, "is_encoder_decoder", False):
        raise ConfigError(f"{kind} is an encoder-decoder; the embedded engine serves decoder-only models")
    if "reuse" in (getattr(config, "kv_sharing_modes", None) or ()):
        raise ConfigError(f"{kind} shares keys and values between layers; the embedded engine cannot serve that yet")
    cache = DynamicCache(config=config)
    foreign = sorted({type(layer).__name__ for layer in cache.layers if type(layer) not in CACHE_LAYERS})
    if foreign or not cache.layers:
        known = ", ".join(sorted(layer.__name__ for layer in CACHE_LAYERS))
        raise ConfigError(
            f"{kind} needs cache layers of kind {', '.join(foreign) or '(none)'}; the embedded engine serves {known}: "
            "choose another model, or use the vLLM or SGLang adapter"
        )
    return cache


def _paged(layers: Iterable[tuple[int, str, Any]], kind: str) -> tuple[PagedTensor, ...]:
    """Tensors [1, heads, tokens, width] as the pool needs them."""
    found = []
    for layer, name, tensor in layers:
        if tensor is None or tensor.dim() != 4 or tensor.shape[0] != 1:
            shape = None if tensor is None else tuple(tensor.shape)
            raise ConfigError(
                f"{kind} caches {name} of layer {layer} as a tensor of shape {shape}; the embedded engine needs "
                "[1, heads, tokens, width]"
            )
        found.append(PagedTensor(layer, name, int(tensor.shape[1]), int(tensor.shape[3])))
    return tuple(found)


def _keys_and_values(cache: Any, holds: tuple[Holds, ...], attention: str) -> list[tuple[int, str, Any]]:
    return [
        (index, name, tensor)
        for index, (layer, held) in enumerate(zip(cache.layers, holds, strict=True))
        if held.attention == attention
        for name, tensor in (("k", layer.keys), ("v", layer.values))
    ]


def _full_pool(cache: Any, holds: tuple[Holds, ...], kind: str) -> PagedGeometry | None:
    """Keys and values of all tokens. One latent and a part of another width are what MLA caches instead of heads."""
    tensors = _paged(_keys_and_values(cache, holds, "full"), kind)
    if not tensors:
        return None
    latent = {tensor.heads for tensor in tensors} == {1} and len({tensor.width for tensor in tensors}) > 1
    name: PoolKind = "mla" if latent else "kv"
    return PagedGeometry(name=name, kind=name, tensors=tensors)


def _window_pool(cache: Any, holds: tuple[Holds, ...], kind: str) -> PagedGeometry | None:
    tensors = _paged(_keys_and_values(cache, holds, "window"), kind)
    if not tensors:
        return None
    windows = sorted({cache.layers[tensor.layer].sliding_window for tensor in tensors})
    if len(windows) > 1:
        raise ConfigError(f"{kind} has windows of {windows} tokens; the embedded engine serves one width per model")
    return PagedGeometry(name="swa", kind="swa", tensors=tensors, window=windows[0])


def _index_pool(cache: Any, holds: tuple[Holds, ...], kind: str) -> PagedGeometry | None:
    found = [
        (index, "index", None if layer.indexer_keys is None else layer.indexer_keys[:, None])
        for index, (layer, held) in enumerate(zip(cache.layers, holds, strict=True))
        if held.index
    ]
    return PagedGeometry(name="index", kind="index", tensors=_paged(found, kind)) if found else None


def _states(cache: Any, holds: tuple[Holds, ...], kind: str) -> Iterable[CachedTensor]:
    for index, (layer, held) in enumerate(zip(cache.layers, holds, strict=True)):
        if not held.state:
            continue
        for name, tensors in (("conv", layer.conv_states), ("recurrent", layer.recurrent_states)):
            for number, tensor in tensors.items():
                if tensor is None:
                    continue
                if tensor.dtype not in DTYPE_NAMES or tensor.shape[0] != 1:
                    raise ConfigError(f"{kind} keeps a {name} state of {tuple(tensor.shape)}, {tensor.dtype}")
                yield CachedTensor(index, f"{name}.{number}", tuple(tensor.shape[1:]), DTYPE_NAMES[tensor.dtype])

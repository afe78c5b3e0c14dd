"""The pools that a model's ``config.json`` implies, without its weights: for plans on paper.

Keys decide, never the name of a family: latents where there is a ``kv_lora_rank``, index keys beside them where there
is an ``index_head_dim``, windows and states where the layer types say so. What an engine really allocates it says
itself, in its layout.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbaton.errors import ConfigError
from kvbaton.layout import (
    Fusion,
    InteriorOrder,
    Pool,
    StateTensor,
    aux_pool,
    gated_delta_net,
    index_pool,
    kv_pool,
    mamba2,
    mla_pool,
    state_pool,
    swa_pool,
)

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}
AUX_BYTES = 1024
_FULL, _WINDOW, _STATE, _BOTH, _NOTHING = "full", "window", "state", "both", "nothing"
#: What models call the kinds of their layers.
_KINDS = {
    "full_attention": _FULL,
    "attention": _FULL,
    "sliding_attention": _WINDOW,
    "linear_attention": _STATE,
    "mamba": _STATE,
    "mamba2": _STATE,
    "hybrid": _BOTH,
    "mlp": _NOTHING,
    "moe": _NOTHING,
}
_PATTERN = {"M": _STATE, "*": _FULL, "-": _NOTHING, "E": _NOTHING}

Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCache:
    """What a model caches. ``kinds``: of each layer; sizes per head and token in elements."""

    name: str
    fingerprint: str
    dtype: str
    kinds: tuple[str, ...]
    heads: int
    head_dim: int
    window: int
    latent_dim: int
    rope_dim: int
    index_dim: int
    tensors: tuple[StateTensor, ...]

    def pools(
        self,
        stage: range,
        *,
        page_size: int,
        pages: int,
        slots: int,
        tp_size: int,
        tp_rank: int,
        order: InteriorOrder = "HND",
        fusion: Fusion = "none",
        with_aux: bool = True,
    ) -> list[Pool]:
        """The pools of a rank that holds the layers ``stage``; pool i lies in region i."""
        element = ELEMENT_BYTES[self.dtype]
        paged: dict[str, Any] = {"pages": pages, "page_size": page_size, "dtype": self.dtype}
        rank: dict[str, Any] = {"tp_size": tp_size, "tp_rank": tp_rank}
        heads: dict[str, Any] = {"heads": self.heads, "head_bytes": self.head_dim * element}
        heads |= {"order": order, "fusion": fusion}
        pools: list[Pool] = []
        full = [layer for layer in stage if self.kinds[layer] in (_FULL, _BOTH)]
        if full and self.latent_dim:
            latent: dict[str, Any] = {"latent_bytes": self.latent_dim * element, "rope_bytes": self.rope_dim * element}
            pools.append(mla_pool(full, region=len(pools), **latent, **paged, **rank))
            if self.index_dim:
                pools.append(index_pool(full, key_bytes=self.index_dim * element, region=len(pools), **paged, **rank))
        elif full:
            pools.append(kv_pool(full, region=len(pools), **heads, **paged, **rank))
        if windowed := [layer for layer in stage if self.kinds[layer] == _WINDOW]:
            pools.append(swa_pool(windowed, window=self.window, region=len(pools), **heads, **paged, **rank))
        if stateful := [layer for layer in stage if self.kinds[layer] in (_STATE, _BOTH)]:
            pools.append(state_pool(stateful, self.tensors, slots=slots, region=len(pools), **rank))
        if with_aux:
            pools.append(aux_pool(slots=slots, slot_bytes=AUX_BYTES, region=len(pools), **rank))
        return pools


def read_model(path: Path, *, dtype: str = "") -> ModelCache:
    """The cache of the model in a directory. Raises ConfigError naming what is not understood."""
    try:
        payload = (path / "config.json").read_bytes()
        config = json.loads(payload)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path / 'config.json'} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path / 'config.json'} is not an object of settings")
    digest = hashlib.blake2b(payload, digest_size=8).hexdigest()
    return describe(config, name=path.name, dtype=dtype, fingerprint=digest)


def describe(config: Config, *, name: str, dtype: str = "", fingerprint: str = "") -> ModelCache:
    """The cache that a ``config.json`` implies."""
    if isinstance(config.get("text_config"), dict):
        config = {**config, **config["text_config"]}
    kind = str(dtype or config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    if kind not in ELEMENT_BYTES:
        raise ConfigError(f"{name}: dtype {kind!r} is unknown, use --dtype with one of {', '.join(ELEMENT_BYTES)}")
    kinds = _kinds(config, name)
    latent = _number(config, name, "kv_lora_rank", default=0)
    heads = attention_heads = head_dim = 0
    if not latent and {_FULL, _WINDOW, _BOTH} & set(kinds):
        attention_heads = _number(config, name, "num_attention_heads", "n_head")
        heads = _number(config, name, "num_key_value_heads", "num_kv_heads", default=attention_heads)
        head_dim = _number(config, name, "head_dim", default=0) or (
            _number(config, name, "hidden_size", "n_embd") // attention_heads
        )
    return ModelCache(
        name=name,
        fingerprint=fingerprint or name,
        dtype=kind,
        kinds=kinds,
        heads=heads,
        head_dim=head_dim,
        window=_number(config, name, "sliding_window") if _WINDOW in kinds else 0,
        latent_dim=latent,
        rope_dim=_number(config, name, "qk_rope_head_dim") if latent else 0,
        index_dim=_number(config, name, "index_head_dim", default=0),
        tensors=_state(config, name, kind) if {_STATE, _BOTH} & set(kinds) else (),
    )


def _kinds(config: Config, name: str) -> tuple[str, ...]:
    layers = _number(config, name, "num_hidden_layers", "n_layer")
    named = config.get("layer_types") or config.get("layers_block_type")
    if isinstance(named, Sequence) and not isinstance(named, str):
        unknown = sorted({str(kind) for kind in named} - _KINDS.keys())
        if unknown:
            raise ConfigError(f"{name}: layers of type {', '.join(unknown)} are unknown; their cache cannot be planned")
        found = tuple(_KINDS[kind] for kind in named)
    elif isinstance(pattern := config.get("hybrid_override_pattern"), str):
        if unknown := sorted(set(pattern) - _PATTERN.keys()):
            raise ConfigError(f"{name}: hybrid_override_pattern has unknown layers {''.join(unknown)!r}")
        found = tuple(_PATTERN[letter] for letter in pattern)
    elif interval := _number(config, name, "full_attention_interval", default=0):
        found = tuple(_FULL if (i + 1) % interval == 0 else _STATE for i in range(layers))
    elif isinstance(config.get("attn_layer_indices"), list):
        found = tuple(_FULL if i in config["attn_layer_indices"] else _STATE for i in range(layers))
    elif pattern := _number(config, name, "sliding_window_pattern", default=0):
        found = tuple(_FULL if (i + 1) % pattern == 0 else _WINDOW for i in range(layers))
    elif "mamba_n_heads" in config:
        found = (_BOTH,) * layers
    elif config.get("sliding_window") and config.get("use_sliding_window", True):
        found = (_WINDOW,) * layers
    else:
        found = (_FULL,) * layers
    if len(found) != layers:
        raise ConfigError(f"{name}: {len(found)} layer types for num_hidden_layers={layers}")
    return found


def _state(config: Config, name: str, dtype: str) -> tuple[StateTensor, ...]:
    element: dict[str, Any] = {"element_bytes": ELEMENT_BYTES[dtype], "dtype": dtype}
    if "linear_num_value_heads" in config:
        return gated_delta_net(
            key_heads=_number(config, name, "linear_num_key_heads"),
            value_heads=_number(config, name, "linear_num_value_heads"),
            key_dim=_number(config, name, "linear_key_head_dim"),
            value_dim=_number(config, name, "linear_value_head_dim"),
            conv_width=_number(config, name, "linear_conv_kernel_dim"),
            **element,
        )
    return mamba2(
        heads=_number(config, name, "mamba_n_heads", "mamba_num_heads"),
        head_dim=_number(config, name, "mamba_d_head", "mamba_head_dim"),
        groups=_number(config, name, "mamba_n_groups", "n_groups"),
        state_size=_number(config, name, "mamba_d_state", "ssm_state_size"),
        conv_width=_number(config, name, "mamba_d_conv", "conv_kernel"),
        **element,
    )


def _number(config: Config, name: str, *keys: str, default: int | None = None) -> int:
    """The first of ``keys`` that the config has. Raises ConfigError where it is no count, or absent without default."""
    for key in keys:
        value = config.get(key)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}: {key}={value!r} in config.json is not a positive number")
            return value
    if default is None:
        raise ConfigError(f"{name}: config.json has no {' or '.join(keys)}; its cache cannot be planned")
    return default

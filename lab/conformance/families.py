"""Tiny random checkpoints of each model family: real configuration classes, saved as any checkpoint is saved.

A checkpoint has random weights wide enough apart for greedy tokens to be compared, and the recall model's tokenizer.
Sizes are chosen so that every topology of the conformance table divides: 8 query heads, 4 layers or more, windows of
two pages. Only here, where checkpoints are made, are families named.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvbaton.errors import ConfigError
from kvbaton.serving.models import builtin

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
#: Tokens that a sliding window sees.
WINDOW = 32
HIDDEN = 64
HEADS = 8
LAYERS = 4
INITIALIZER_RANGE = 0.3
SEED = 7

_MLA: Mapping[str, Any] = {
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": HEADS,
}
_MOE: Mapping[str, Any] = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
_DEEPSEEK: Mapping[str, Any] = {
    **_MLA,
    **_MOE,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_FULL, _WINDOW, _LINEAR = "full_attention", "sliding_attention", "linear_attention"

#: Family: configuration class of transformers, and what it sets beside the common sizes.
FAMILIES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "qwen3": ("Qwen3Config", {"num_key_value_heads": 4, "head_dim": 16}),
    "llama": ("LlamaConfig", {"num_key_value_heads": 2, "head_dim": 16}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_MOE, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8}),
    "deepseek_v2": ("DeepseekV2Config", {**_DEEPSEEK, "topk_method": "greedy", "n_group": 1}),
    "deepseek_v3": ("DeepseekV3Config", _DEEPSEEK),
    "deepseek_v32": ("DeepseekV32Config", {**_DEEPSEEK, "index_n_heads": 32, "index_head_dim": 16, "index_topk": 24}),
    "gpt_oss": (
        "GptOssConfig",
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "layer_types": [_WINDOW, _FULL] * 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": WINDOW,
            "layer_types": [_WINDOW, _WINDOW, _FULL, _WINDOW],
        },
    ),
    "mistral": ("MistralConfig", {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": WINDOW}),
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            **_MOE,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_experts": 4,
            "shared_expert_intermediate_size": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "layer_types": [_LINEAR, _FULL] * 2,
        },
    ),
    "bamba": (
        "BambaConfig",
        {
            "num_key_value_heads": 2,
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_n_groups": 1,
            "mamba_d_state": 16,
            "mamba_expand": 2,
            "attn_layer_indices": [1, 3],
        },
    ),
    "falcon_h1": (
        "FalconH1Config",
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_ssm": 128,
            "mamba_n_groups": 1,
            "mamba_d_state": 16,
        },
    ),
}


#: Families that keep nothing but a window: there is no page of theirs that two requests could share.
WINDOW_ONLY = {"mistral"}


def make_config(
    family: str, *, vocab_size: int, max_positions: int = 2048, eos: int = 3, kv_heads: int | None = None
) -> Any:
    """The configuration of one family, with another number of key/value heads if given. Raises ConfigError."""
    import transformers

    if family not in FAMILIES:
        raise ConfigError(f"family {family!r} is unknown; there are {', '.join(FAMILIES)}")
    name, own = FAMILIES[family]
    make: Callable[..., Any] = getattr(transformers, name)
    common = {
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": max_positions,
        "initializer_range": INITIALIZER_RANGE,
        "bos_token_id": None,
        "eos_token_id": eos,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    heads = {} if kv_heads is None else {"num_key_value_heads": kv_heads}
    return make(**{**common, **own, **heads})


def write_weights(config: Any, directory: Path) -> Path:
    """Save a random model of this configuration."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(SEED)
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    network.save_pretrained(directory)
    return directory


def write_model(family: str, directory: Path, *, kv_heads: int | None = None) -> Path:
    """Make the checkpoint of one family in ``directory``, which is created. Raises ConfigError."""
    import json

    source = builtin("recall")
    vocabulary = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    directory.mkdir(parents=True, exist_ok=True)
    for file in TOKENIZER_FILES:
        if (source / file).is_file():
            shutil.copy(source / file, directory / file)
    config = make_config(family, vocab_size=len(vocabulary), eos=vocabulary["<eos>"], kv_heads=kv_heads)
    return write_weights(config, directory)

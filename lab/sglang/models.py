"""Tiny random checkpoints in sizes that SGLang runs on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lab.engines.models import FULL_ATTENTION, MAX_POSITIONS, SLIDING_ATTENTION, VOCABULARY, WINDOW, write_weights_of

_DEEPSEEK: Mapping[str, Any] = {
    "head_dim": None,
    "num_key_value_heads": 8,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 4,
    "moe_layer_freq": 1,
    # On a CPU SGLang rotates latents by YaRN alone.
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 2.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": MAX_POSITIONS // 2,
    },
}

#: Family: configuration class of transformers, what it sets beside the common sizes.
FAMILIES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "qwen3": ("Qwen3Config", {}),
    "deepseek_v3": ("DeepseekV3Config", _DEEPSEEK),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "query_pre_attn_scalar": 32,
            "sliding_window": WINDOW,
            "num_hidden_layers": 6,
            "layer_types": [SLIDING_ATTENTION] * 5 + [FULL_ATTENTION],
        },
    ),
    "lfm2": (
        "Lfm2Config",
        {
            "layer_types": ["conv", FULL_ATTENTION, "conv", FULL_ATTENTION],
            "conv_L_cache": 3,
            "block_auto_adjust_ff_dim": False,
        },
    ),
}


def write_model(family: str, directory: Path) -> Path:
    """Make the checkpoint of one family in ``directory``, unless it is there."""
    if not (directory / "tokenizer.json").exists():
        name, own = FAMILIES[family]
        write_weights_of(name, own, directory)
        _write_tokenizer(directory)
    return directory


def _write_tokenizer(directory: Path) -> None:
    """One word for each token: what is compared are their numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(directory)

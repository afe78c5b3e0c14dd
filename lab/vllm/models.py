"""Tiny random checkpoints in sizes that vLLM's CPU build takes: heads of 32 or 64, windows of one block."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lab.engines.models import FULL_ATTENTION, MAX_POSITIONS, SLIDING_ATTENTION, VOCABULARY, WINDOW, write_weights_of

#: Family: configuration class of transformers, what it sets beside the common sizes, and the dtype it runs in.
FAMILIES: dict[str, tuple[str, Mapping[str, Any], str]] = {
    "qwen3": ("Qwen3Config", {}, "float32"),
    "gpt_oss": (
        "GptOssConfig",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "layer_types": [SLIDING_ATTENTION, FULL_ATTENTION] * 2,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 2.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "original_max_position_embeddings": MAX_POSITIONS // 2,
                "truncate": False,
            },
        },
        "float32",
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "query_pre_attn_scalar": 32,
            "sliding_window": WINDOW,
            "num_hidden_layers": 6,
            "layer_types": [SLIDING_ATTENTION] * 5 + [FULL_ATTENTION],
        },
        "float32",
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "head_dim": None,
            "num_key_value_heads": 8,
            "kv_lora_rank": 512,
            "q_lora_rank": 64,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128,
            "v_head_dim": 128,
            "moe_intermediate_size": 64,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 4,
        },
        "bfloat16",
    ),
    "granite_hybrid": (
        "GraniteMoeHybridConfig",
        {
            "head_dim": None,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "layer_types": ["mamba", "attention", "mamba", "mamba"],
            "mamba_n_heads": 8,
            "mamba_d_head": 32,
            "mamba_n_groups": 1,
            "mamba_d_state": 64,
            "mamba_expand": 2,
            "mamba_chunk_size": 64,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 192,
            "position_embedding_type": "nope",
        },
        "float32",
    ),
}


def write_model(family: str, directory: Path) -> Path:
    """Make the checkpoint and the tokenizer of one family in ``directory``, unless they are there."""
    if not (directory / "config.json").exists():
        name, own, _ = FAMILIES[family]
        write_weights_of(name, own, directory)
    if not (directory / "tokenizer.json").exists():
        _write_tokenizer(directory)
    return directory


def _write_tokenizer(directory: Path) -> None:
    """A word for each token, so that text and tokens are the same thing."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=f"w{VOCABULARY - 1}", model_max_length=MAX_POSITIONS
    ).save_pretrained(directory)

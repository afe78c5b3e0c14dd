"""Tiny random checkpoints in sizes that vLLM's CPU build takes: heads of 32 or 64, windows of one block."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lab.conformance.families import write_weights

VOCABULARY = 512
#: Tokens that a sliding window sees; vLLM's block on a CPU is as large.
WINDOW = 128
MAX_POSITIONS = 4096

_FULL, _WINDOW = "full_attention", "sliding_attention"
_COMMON: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": MAX_POSITIONS,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": VOCABULARY - 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}

#: Family: configuration class of transformers, what it sets beside the common sizes, and the dtype it runs in.
FAMILIES: dict[str, tuple[str, Mapping[str, Any], str]] = {
    "qwen3": ("Qwen3Config", {}, "float32"),
    "gpt_oss": (
        "GptOssConfig",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "layer_types": [_WINDOW, _FULL] * 2,
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
            "layer_types": [_WINDOW] * 5 + [_FULL],
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
    import transformers

    if not (directory / "config.json").exists():
        name, own, _ = FAMILIES[family]
        settings = {key: value for key, value in {**_COMMON, **own}.items() if value is not None or key.endswith("_id")}
        write_weights(getattr(transformers, name)(**settings), directory)
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

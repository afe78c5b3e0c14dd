"""Tiny random checkpoints in sizes that vLLM's CPU build takes: heads of 32 or 64, windows of one block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lab.engines.models import (
    DEEPSEEK_V3,
    FULL_ATTENTION,
    GEMMA3,
    MAX_POSITIONS,
    QWEN3,
    SLIDING_ATTENTION,
    WINDOW,
    Family,
)

FAMILIES: Mapping[str, Family] = {
    "qwen3": QWEN3,
    "gpt_oss": Family(
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
    ),
    "gemma3": GEMMA3,
    # CPU_MLA takes latents of the published size, and no float32.
    "deepseek_v3": replace(
        DEEPSEEK_V3.setting(kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128),
        dtype="bfloat16",
    ),
    "granite_hybrid": Family(
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
    ),
}

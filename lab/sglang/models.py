"""Tiny random checkpoints in sizes that SGLang runs on a CPU."""

from __future__ import annotations

from collections.abc import Mapping

from lab.engines.models import DEEPSEEK_V3, FULL_ATTENTION, GEMMA3, MAX_POSITIONS, QWEN3, Family

FAMILIES: Mapping[str, Family] = {
    "qwen3": QWEN3,
    "deepseek_v3": DEEPSEEK_V3.setting(
        kv_lora_rank=64,
        qk_rope_head_dim=32,
        qk_nope_head_dim=32,
        v_head_dim=32,
        moe_layer_freq=1,
        # On a CPU SGLang rotates latents by YaRN alone.
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 2.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": MAX_POSITIONS // 2,
        },
    ),
    "gemma3": GEMMA3,
    "lfm2": Family(
        "Lfm2Config",
        {
            "layer_types": ["conv", FULL_ATTENTION, "conv", FULL_ATTENTION],
            "conv_L_cache": 3,
            "block_auto_adjust_ff_dim": False,
        },
    ),
}

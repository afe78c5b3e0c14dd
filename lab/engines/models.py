"""Tiny random checkpoints: sizes that the engines' CPU builds take (heads of 32 or 64), families as they set them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lab.conformance.families import write_weights

VOCABULARY = 512
MAX_POSITIONS = 4096
#: Tokens that a sliding window sees; vLLM's block on a CPU is as large.
WINDOW = 128

FULL_ATTENTION, SLIDING_ATTENTION = "full_attention", "sliding_attention"
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


def write_weights_of(configuration: str, own: Mapping[str, Any], directory: Path) -> None:
    """Make a checkpoint. ``configuration``: its class in transformers; ``own``: what it sets beside the common sizes,
    None for what it has not."""
    import transformers

    settings = {key: value for key, value in {**_COMMON, **own}.items() if value is not None or key.endswith("_id")}
    write_weights(getattr(transformers, configuration)(**settings), directory)

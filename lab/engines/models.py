"""Tiny random checkpoints: sizes that the engines' CPU builds take (heads of 32 or 64), families as they set them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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


@dataclass(frozen=True, slots=True)
class Family:
    """``configuration``: its class in transformers; ``own``: what it sets beside the common sizes, None for what it has
    not; ``dtype``: what it is run in."""

    configuration: str
    own: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"

    def setting(self, **more: Any) -> Family:
        """The same with further fields of the configuration."""
        return replace(self, own={**self.own, **more})


QWEN3 = Family("Qwen3Config")
GEMMA3 = Family(
    "Gemma3TextConfig",
    {
        "query_pre_attn_scalar": 32,
        "sliding_window": WINDOW,
        "num_hidden_layers": 6,
        "layer_types": [SLIDING_ATTENTION] * 5 + [FULL_ATTENTION],
    },
)
#: Latents, and no layer of experts.
DEEPSEEK_V3 = Family(
    "DeepseekV3Config",
    {
        "head_dim": None,
        "num_key_value_heads": 8,
        "q_lora_rank": 64,
        "moe_intermediate_size": 64,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 4,
    },
)


def write_model(family: Family, directory: Path) -> Path:
    """Make the checkpoint and the tokenizer of a family in ``directory``, unless they are there."""
    if not (directory / "tokenizer.json").exists():
        import transformers

        settings = {
            name: value
            for name, value in {**_COMMON, **family.own}.items()
            if value is not None or name.endswith("_id")
        }
        write_weights(getattr(transformers, family.configuration)(**settings), directory)
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

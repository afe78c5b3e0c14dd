"""What an engine's loaded model says of its caches."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

from kvbaton.engines.model import model_text


def text(config: dict[str, Any], **more: Any) -> str:
    model = SimpleNamespace(
        hf_text_config=SimpleNamespace(to_dict=lambda: config), dtype="torch.bfloat16", quantization=None
    )
    return model_text("engine", model, **{"weights": "", "cache_dtype": "auto", **more})


def test_where_a_config_came_from_does_not_count() -> None:
    sizes = {"hidden_size": 64}
    assert text({**sizes, "_name_or_path": "a", "transformers_version": "5"}) == text(sizes)


def test_sizes_weights_and_what_an_engine_adds_do() -> None:
    texts = {text({"hidden_size": 64}), text({"hidden_size": 32}), text({"hidden_size": 64}, weights="v2")}
    texts.add(text({"hidden_size": 64}, page_size=16))
    assert len(texts) == 4
    assert json.loads(text({"hidden_size": 64}, page_size=16))["page_size"] == 16

"""What ``CacheLayout.model`` says of a model that an engine has loaded: all that changes what its cache means."""

from __future__ import annotations

from typing import Any

from kvbaton.plan import identity

#: Fields of a model's config that say where it came from or how it is run, not what its cache means.
_NO_NUMBERS = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "use_cache")


def model_text(engine: str, model: Any, *, weights: str, cache_dtype: object, **own: object) -> str:
    """The text of ``model``, an engine's ModelConfig (vLLM's and SGLang's name the same things alike).

    Args:
        weights: what the operator calls them; no engine tells weights apart.
        own: what else this engine's caches depend on.
    """
    config = {name: value for name, value in model.hf_text_config.to_dict().items() if name not in _NO_NUMBERS}
    return identity.encode(
        {
            **config,
            **own,
            "weights": weights,
            "dtype": str(model.dtype),
            "quantization": str(model.quantization or ""),
            "cache_dtype": str(cache_dtype),
            "engine": engine,
        }
    )

"""Tasks that tell whether a model still answers correctly after its KV cache was handed over."""

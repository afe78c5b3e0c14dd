"""The embedded engine: model code from transformers, our paged pools, prefill and decode schedulers."""

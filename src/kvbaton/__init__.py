"""kvbaton: hands everything a prefill rank remembers of a prompt to a decode rank."""

__version__ = "0.1.0"

"""Differences between the versions of transformers that the engine runs on, the one place that knows them.

The lowest is 5.23: 5.19 to 5.22 have no ``DummyLayer``. From 5.24 on the cache is handed to a model as ``cache``,
before as ``past_key_values``; models that a repository brings along may have either.
"""

from __future__ import annotations

import inspect
from typing import Any


def cache_argument(network: Any) -> str:
    """The name under which ``network`` takes its cache."""
    return "cache" if "cache" in inspect.signature(network.forward).parameters else "past_key_values"

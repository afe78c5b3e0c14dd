"""The threads that torch computes with: how many there are, and whose.

torch's loops run on OpenMP threads that belong to the thread that first asked for them, and stay with it while it
lives. libgomp counts those of the whole process: where there are more than cores, its barriers sleep at once instead of
spinning for a moment, and every step of a model, which has a thousand of them, takes a fifth longer. So the engine's
thread is the only one that keeps some: whoever else computes does it on a thread that ends (:func:`aside`).

This file must not know models.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from kvbaton.errors import ConfigError

T = TypeVar("T")


def use_threads(threads: int) -> None:
    """Set torch's intra-operation threads for the whole process. Raises ConfigError."""
    if threads < 1:
        raise ConfigError(f"threads={threads} must be at least 1")
    torch.set_num_threads(threads)


def aside(call: Callable[[], T]) -> T:
    """What ``call`` returns or raises, run on a thread of its own: the OpenMP threads that it needs end with it."""
    with ThreadPoolExecutor(1, "kvbaton-aside") as thread:
        return thread.submit(call).result()

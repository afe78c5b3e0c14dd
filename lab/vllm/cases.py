"""What a case is: asks something of a scene and says in one line what came of it, or raises AssertionError."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from lab.vllm.scene import Scene

Case = Callable[[Scene], Awaitable[str]]


def check(got: Any, expected: Any, what: str) -> None:
    """Raises AssertionError unless they are equal."""
    if got != expected:
        raise AssertionError(f"{what}: {got} instead of {expected}")


def tokens_of(answer: dict[str, Any]) -> list[list[int]]:
    """The tokens of each answer."""
    return [choice["token_ids"] for choice in answer["choices"]]

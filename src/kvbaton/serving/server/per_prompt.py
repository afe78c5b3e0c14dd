"""Values that a request says once for all of its prompts, or as a list with one for each.

This file must not know prompts, or what a value means.
"""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Raw

from kvbaton.serving.server.raw import decoded, refuse


def values_of(raw: Raw, kind: Any, name: str, most_bytes: int) -> Any:
    """A ``kind``, a list of them, or None for null. Raises ConfigError."""
    return decoded(raw, kind | Annotated[list[kind], Meta(min_length=1)], name, most_bytes)


def value_for(values: Any, index: int, prompts: int, choices: int, name: str) -> Any:
    """That of prompt ``index``; a list may have one for each choice of each prompt as well. Raises ConfigError."""
    if not isinstance(values, list):
        return values
    if len(values) not in (prompts, prompts * choices):
        refuse(name, f"{len(values)} values are not one for each of {prompts} prompts")
    return values[index * (len(values) // prompts)]

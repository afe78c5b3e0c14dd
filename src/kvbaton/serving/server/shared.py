"""Reads that anybody may ask for: those who ask while one is under way share its answer, so that asking often costs
little.

This file must not know what is read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class SharedReads:
    """One read of each name at a time. Names are the program's own, never a client's."""

    def __init__(self) -> None:
        self._under_way: dict[str, asyncio.Task[Any]] = {}

    async def get(self, name: str, read: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """What ``read`` gives, or the one that is under way. Raises what it raises."""
        task: asyncio.Task[T] | None = self._under_way.get(name)
        if task is None:
            task = self._under_way[name] = asyncio.create_task(read())
            task.add_done_callback(lambda _: self._under_way.pop(name))
        return await asyncio.shield(task)

"""What has ended while a peer could still touch its memory: kept until nothing can, and then given back.

This file must not know what the memory is, or why it ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")


class _Room(Protocol):
    @property
    def released(self) -> bool:
        """Nothing can touch the memory of this room any more."""


class Draining(Generic[T]):
    """``free`` takes the memory of one back."""

    def __init__(self, free: Callable[[T], None]) -> None:
        self._free = free
        self._held: list[tuple[_Room, T]] = []

    def add(self, room: _Room, holder: T) -> None:
        """``holder`` has ended; its memory is given back once ``room`` is released, now if it is."""
        self._held.append((room, holder))
        self.reap()

    def reap(self) -> bool:
        """Give back what has been released. Whether there was any."""
        settled = [held for held in self._held if held[0].released]
        for held in settled:
            self._held.remove(held)
            self._free(held[1])
        return bool(settled)

    def __iter__(self) -> Iterator[T]:
        return iter([holder for _, holder in self._held])

    def __len__(self) -> int:
        return len(self._held)

"""A :class:`random.Random` whose choices are the bytes of one input; zero when they are used up."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")


class Choices(Random):
    """Only what the siege uses: ``randint``, ``choice``, ``randbytes``."""

    def __new__(cls, _data: bytes) -> Choices:
        return super().__new__(cls)

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        return max(0, len(self._data) - self._at)

    def randint(self, a: int, b: int) -> int:
        size = 1 if b - a < 256 else 4
        piece = self.randbytes(size)
        return a + int.from_bytes(piece, "little") % (b - a + 1)

    def choice(self, seq: Sequence[T]) -> T:  # type: ignore[override]
        return seq[self.randint(0, len(seq) - 1)]

    def randbytes(self, n: int) -> bytes:
        piece = self._data[self._at : self._at + n]
        self._at += n
        return piece.ljust(n, b"\0")

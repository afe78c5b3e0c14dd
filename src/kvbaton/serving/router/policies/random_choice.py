"""Any server."""

from __future__ import annotations

import random
from collections.abc import Sequence

from kvbaton.serving.router.worker import Worker


class RandomChoice:
    def __init__(self, rng: random.Random | None = None) -> None:
        self._rng = rng if rng is not None else random.Random()

    def choose(self, candidates: Sequence[Worker], _prompt: bytes, /) -> Worker:
        return self._rng.choice(candidates)

    def forget(self, worker: Worker, /) -> None:
        """Nothing is remembered."""

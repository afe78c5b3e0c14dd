"""The less loaded of two random servers: nearly as even as asking all of them, and several routers do not all run to
the same one (Mitzenmacher, The Power of Two Choices in Randomized Load Balancing, 2001)."""

from __future__ import annotations

import random
from collections.abc import Sequence

from kvbaton.serving.router.worker import Worker


class PowerOfTwo:
    def __init__(self, rng: random.Random | None = None) -> None:
        self._rng = rng if rng is not None else random.Random()

    def choose(self, candidates: Sequence[Worker], _prompt: bytes, /) -> Worker:
        two = sorted(self._rng.sample(range(len(candidates)), min(2, len(candidates))))
        return min((candidates[place] for place in two), key=lambda worker: worker.legs)

    def forget(self, worker: Worker, /) -> None:
        """Nothing is remembered."""

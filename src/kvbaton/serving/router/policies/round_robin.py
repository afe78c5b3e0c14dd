"""Every server in turn, also when servers come and go."""

from __future__ import annotations

from collections.abc import Sequence

from kvbaton.serving.router.worker import Worker


class RoundRobin:
    def choose(self, candidates: Sequence[Worker], _prompt: bytes, /) -> Worker:
        return candidates[0]

    def forget(self, worker: Worker, /) -> None:
        """Nothing is remembered."""

"""The server with the fewest requests of this router in flight."""

from __future__ import annotations

from collections.abc import Sequence

from kvbaton.serving.router.worker import Worker


class LeastLoad:
    def choose(self, candidates: Sequence[Worker], _prompt: bytes, /) -> Worker:
        return min(candidates, key=lambda worker: worker.legs)

    def forget(self, worker: Worker, /) -> None:
        """Nothing is remembered."""

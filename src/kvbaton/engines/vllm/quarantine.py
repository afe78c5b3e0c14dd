"""Blocks of a request that has failed while a peer may still write them.

vLLM knows one event, "received or failed", and frees the blocks with it. Where a prefill rank is silent, no proof that
its writes have ended may come for long. The request is answered for at once; its blocks get one more reference each
in vLLM's block pool, before vLLM drops its own, and lose it when every rank has its proof.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol


class BlockPool(Protocol):
    """What is used of vLLM's block pool."""

    blocks: Any

    def touch(self, blocks: Any) -> None:
        """One more reference to each block."""

    def free_blocks(self, ordered_blocks: Any) -> None:
        """One reference less."""


class Quarantine:
    """``granted``: block ids of every live room, by request; ``held``: those that are kept aside."""

    def __init__(self) -> None:
        self._pool: BlockPool | None = None
        self._granted: dict[str, tuple[int, ...]] = {}
        self._held: dict[str, list[Any]] = {}

    def bind(self, pool: BlockPool) -> None:
        self._pool = pool

    def grant(self, request: str, blocks: Iterable[int]) -> None:
        """A room was opened for these blocks."""
        self._granted[request] = tuple(blocks)

    def update(self, received: Iterable[str], failed: Iterable[str], leased: frozenset[str] | None) -> None:
        """What the workers say after a step, before vLLM frees anything for it.

        Args:
            leased: failed requests whose blocks some rank may still see written; None: no rank has anything new.
        """
        for request in failed:
            blocks = self._granted.get(request)
            if blocks is not None and leased is not None and request in leased and self._pool is not None:
                kept = [self._pool.blocks[block] for block in blocks]
                self._pool.touch(kept)
                self._held[request] = kept
        for request in received:
            self._granted.pop(request, None)
        if leased is not None and self._pool is not None:
            for request in [request for request in self._held if request not in leased]:
                self._pool.free_blocks(self._held.pop(request))

    def __len__(self) -> int:
        """Requests whose blocks are kept aside."""
        return len(self._held)

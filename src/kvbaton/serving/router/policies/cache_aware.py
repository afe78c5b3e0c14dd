"""The server that has seen the longest beginning of the prompt, unless it is loaded much more than the others.

Rules:

- A prompt is cut into blocks of :data:`BLOCK_BYTES`; a block's key follows from all text up to its end. What was sent
  to a server is remembered by these keys: ``most_blocks`` in all, the least recently used are forgotten.
- A match counts from ``cache_threshold`` of the prompt on; below it, and among equals, the least loaded server counts.
- A server whose load is above the least one by more than ``balance_abs_threshold`` requests, and by more than the
  factor ``balance_rel_threshold``, is left out. It alone: what the others have seen goes on counting.

What a server really has in its cache is not asked: this is what it was sent.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvbaton.serving.router.worker import Worker

#: Of the JSON text of a prompt: about 32 tokens of English.
BLOCK_BYTES = 128
#: Of a longer prompt only the beginning is looked at.
MOST_BLOCKS_OF_PROMPT = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheAwareSettings:
    """See the module; the thresholds are called as sglang-router calls them."""

    cache_threshold: float = 0.3
    balance_abs_threshold: int = 64
    balance_rel_threshold: float = 1.5
    most_blocks: int = 1 << 17


class CacheAware:
    def __init__(self, settings: CacheAwareSettings | None = None) -> None:
        self._settings = settings if settings is not None else CacheAwareSettings()
        self._seen: OrderedDict[bytes, set[Worker]] = OrderedDict()

    def choose(self, candidates: Sequence[Worker], prompt: bytes, /) -> Worker:
        keys = list(_keys(prompt))
        matched = self._matches(self._balanced(candidates), keys)
        worker = min(matched, key=lambda worker: (-matched[worker], worker.legs))
        self._remember(worker, keys)
        return worker

    def forget(self, worker: Worker, /) -> None:
        for workers in self._seen.values():
            workers.discard(worker)

    def _balanced(self, candidates: Sequence[Worker]) -> list[Worker]:
        settings = self._settings
        least = min(worker.legs for worker in candidates)
        most = max(least + settings.balance_abs_threshold, least * settings.balance_rel_threshold)
        return [worker for worker in candidates if worker.legs <= most]

    def _matches(self, candidates: Sequence[Worker], keys: Sequence[bytes]) -> dict[Worker, int]:
        """How many blocks of the prompt each has seen; 0 for too few to count."""
        matched = dict.fromkeys(candidates, 0)
        left = set(candidates)
        for number, key in enumerate(keys, start=1):
            left &= self._seen.get(key, set())
            if not left:
                break
            for worker in left:
                matched[worker] = number
        enough = self._settings.cache_threshold * len(keys)
        return {worker: blocks if blocks >= enough else 0 for worker, blocks in matched.items()}

    def _remember(self, worker: Worker, keys: Sequence[bytes]) -> None:
        for key in reversed(keys):  # the end of a prompt is forgotten before its beginning
            self._seen.setdefault(key, set()).add(worker)
            self._seen.move_to_end(key)
        while len(self._seen) > self._settings.most_blocks:
            self._seen.popitem(last=False)


def _keys(prompt: bytes) -> Iterator[bytes]:
    """One for each whole block."""
    running = hashlib.blake2b(digest_size=8)
    for number in range(min(len(prompt) // BLOCK_BYTES, MOST_BLOCKS_OF_PROMPT)):
        running.update(prompt[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES])
        yield running.digest()

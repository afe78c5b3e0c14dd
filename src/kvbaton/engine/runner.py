"""The model over the paged pool: prompts in chunks, one step of a batch.

Rules: one thread, and nothing is remembered between calls: what a request needs lies in its pages. Whatever torch or
transformers raise leaves here as InternalError, so that it ends the request it belongs to and nothing else.

This file must not know of requests, sampling or peers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvbaton.engine.cache import Extent, PagedCache, View
from kvbaton.engine.model import LoadedModel
from kvbaton.engine.pool import KVMemory
from kvbaton.errors import InternalError
from kvbaton.manager import READY


@dataclass(frozen=True, slots=True)
class Step:
    """One request's part of a decode batch: ``token`` has the absolute ``position``, the cache all before it."""

    token: int
    position: int
    pages: Sequence[int]


class ModelRunner:
    """Runs ``model`` over ``memory``. Logits are float tensors [rows, vocabulary] on the model's device."""

    def __init__(self, model: LoadedModel, memory: KVMemory) -> None:
        self._network = model.network
        self._page_size = memory.page_size
        self._device = memory.tensor.device
        self._cache = PagedCache(memory)

    def prefill_chunk(self, tokens: Sequence[int], start: int, pages: Sequence[int]) -> Any:
        """Compute ``tokens`` at positions ``start`` on, the cache of all before being in ``pages``.

        Returns the logits [1, vocabulary] that follow the last one.
        """
        return self._forward([list(tokens)], [Extent(pages, start, len(tokens))])

    def decode(self, batch: Sequence[Step]) -> Any:
        """Compute one token of each request. Returns logits [len(batch), vocabulary]."""
        return self._forward([[step.token] for step in batch], [Extent(s.pages, s.position, 1) for s in batch])

    def fence(self) -> Callable[[], bool]:
        """A callable that turns true when everything computed so far has reached the pool's memory."""
        if self._device.type != "cuda":
            return READY
        event = torch.cuda.Event()
        event.record()
        return event.query  # type: ignore[no-any-return]

    def _forward(self, tokens: list[list[int]], extents: list[Extent]) -> Any:
        try:
            with torch.inference_mode():
                view = View.build(extents, self._page_size, self._device)
                self._cache.bind(view)
                return self._network(
                    input_ids=torch.tensor(tokens, device=self._device),
                    attention_mask=view.mask,
                    position_ids=view.positions,
                    past_key_values=self._cache,
                    use_cache=True,
                    logits_to_keep=1,
                ).logits[:, -1]
        except Exception as error:  # torch has no common base
            raise InternalError(f"the model failed on {len(extents)} request(s): {error!r}") from error

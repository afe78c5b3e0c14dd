"""The model over the pools: prompts in chunks, one step of a batch.

Rules: one thread, and nothing is remembered between calls: what a request needs lies in its units. Whatever torch or
transformers raise leaves here as InternalError, so that it ends the request it belongs to and nothing else.

This file must not know of requests, sampling or peers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from kvbaton.errors import InternalError
from kvbaton.manager import ALWAYS_READY
from kvbaton.serving.engine.ahead import Ahead, layer_modules, watched
from kvbaton.serving.engine.cache import Extent, PagedCache, View
from kvbaton.serving.engine.collective import Collective
from kvbaton.serving.engine.geometry import DTYPES
from kvbaton.serving.engine.model import LoadedModel
from kvbaton.serving.engine.pool import BlockTable, Copies, Pools
from kvbaton.serving.engine.versions import cache_argument

logger = logging.getLogger(__name__)
Announce = Callable[[list[list[int]], list[Extent], Ahead | None, bool], None]


@dataclass(frozen=True, slots=True)
class Step:
    """One request's part of a decode batch: ``token`` has the absolute ``position``, the cache all before it."""

    token: int
    position: int
    block_table: BlockTable


class ModelRunner:
    """Runs ``model`` over ``pools``. Logits are float tensors [rows, vocabulary] on the model's device.

    In a group the leader's runner tells the others with ``announce`` what it is about to compute, and they call
    :meth:`forward` with it; so it is with ``announce_copy`` and :meth:`copy`. ``collective`` connects the stages.
    """

    def __init__(
        self,
        model: LoadedModel,
        pools: Pools,
        *,
        collective: Collective | None = None,
        announce: Announce = lambda _tokens, _extents, _ahead, _every: None,
        announce_copy: Callable[[Copies], None] = lambda _copies: None,
    ) -> None:
        self._network = model.network
        self._geometry = model.geometry
        self._shard = model.shard
        self._collective = collective
        self._announce = announce
        self._announce_copy = announce_copy
        self._pools = pools
        self._device = torch.device(pools.device)
        self._layers = layer_modules(model.network, model.geometry, model.shard)
        self._cache = PagedCache(pools)

    def prefill_chunk(
        self,
        tokens: Sequence[int],
        start: int,
        block_table: BlockTable,
        *,
        ahead: Ahead | None = None,
        every: bool = False,
    ) -> Any:
        """Compute ``tokens`` at positions ``start`` on, the cache of all before them being in ``block_table``; each
        layer goes ``ahead`` as soon as it is there.

        Returns the logits [1, vocabulary] that follow the last one, or with ``every`` [tokens, vocabulary] those that
        follow each.
        """
        return self._lead([list(tokens)], [Extent(block_table, start, len(tokens))], ahead, every=every)

    def prefill_chunks(
        self, tokens: Sequence[Sequence[int]], start: int, block_tables: Sequence[BlockTable], *, every: bool = False
    ) -> Any:
        """The same of several prompts at once, equally many tokens of each. Returns logits [prompts, vocabulary], or
        with ``every`` [prompts * tokens, vocabulary]."""
        extents = [Extent(table, start, len(row)) for table, row in zip(block_tables, tokens, strict=True)]
        return self._lead([list(row) for row in tokens], extents, every=every)

    def decode(self, batch: Sequence[Step]) -> Any:
        """Compute one token of each request. Returns logits [len(batch), vocabulary]."""
        return self._lead([[step.token] for step in batch], [Extent(s.block_table, s.position, 1) for s in batch])

    def copy(self, copies: Copies) -> None:
        """Copy units of the pools, on every rank of the group. Raises InternalError."""
        if not copies:
            return
        self._announce_copy(copies)
        try:
            self._pools.copy(copies)
        except Exception as error:  # torch has no common base
            logger.exception("copying %s failed", copies)
            raise InternalError("copying units of the pool failed; the log of this server says why") from error

    def fence(self) -> Callable[[], bool]:
        """A callable that turns true when everything computed so far has reached the pools' memory."""
        if self._device.type != "cuda":
            return ALWAYS_READY
        event = torch.cuda.Event()
        event.record()
        return event.query  # type: ignore[no-any-return]

    def _lead(
        self, tokens: list[list[int]], extents: list[Extent], ahead: Ahead | None = None, *, every: bool = False
    ) -> Any:
        self._announce(tokens, extents, ahead, every)
        return self.forward(tokens, extents, ahead, every=every)

    def forward(
        self, tokens: list[list[int]], extents: list[Extent], ahead: Ahead | None = None, *, every: bool = False
    ) -> Any:
        """This rank's part of one pass. The leader gets logits, those of each request's last token or of ``every`` one,
        others nothing to use. Raises InternalError."""
        try:
            with torch.inference_mode():
                view = View.build(extents, self._pools)
                self._cache.bind(view)
                with watched(self._layers if ahead is not None else {}, partial(self._layer_done, view, ahead)):
                    output = self._stage(tokens, view, every=every)
                self._cache.keep(view)
                return output
        except Exception as error:  # torch has no common base
            logger.exception("the model failed on %d request(s)", len(extents))
            raise InternalError(
                f"the model failed on {len(extents)} request(s); the log of this server says why"
            ) from error

    def _layer_done(self, view: View, ahead: Ahead | None, layer: int) -> None:
        if ahead is not None:
            self._cache.keep(view, layer)
            ahead.layer_done(layer, self.fence())

    def _stage(self, tokens: list[list[int]], view: View, *, every: bool) -> Any:
        shard, collective = self._shard, self._collective
        common = {
            "attention_mask": view.mask,
            "position_ids": view.positions,
            cache_argument(self._network): self._cache,
            "use_cache": True,
        }
        if shard.first:
            given = {"input_ids": torch.tensor(tokens, device=self._device)}
        else:
            shape = (len(tokens), len(tokens[0]), self._network.config.get_text_config(decoder=True).hidden_size)
            assert collective is not None  # noqa: S101 - a group has one
            given = {"inputs_embeds": collective.hidden_from_before(shape, DTYPES[self._geometry.dtype])}
        if shard.last:
            logits = self._network(**given, **common, logits_to_keep=0 if every else 1).logits.flatten(0, 1)
            if shard.pp_size > 1 and collective is not None:
                collective.logits_to_leader(logits)
            return logits
        assert collective is not None  # noqa: S101 - a group has one
        collective.hidden_to_next(self._network.model(**given, **common).last_hidden_state)
        if shard.rank == 0:
            rows = sum(map(len, tokens)) if every else len(tokens)
            return collective.logits_at_leader((rows, self._geometry.vocab_size), DTYPES[self._geometry.dtype])
        return None

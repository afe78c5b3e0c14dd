"""One request for a model with any kinds of cache: what both engines hand to the protocol, and what must arrive."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from groups import Cut, Group, Model, Prompt, Reference, make_group

from kvbaton.layout import CacheLayout, gated_delta_net
from kvbaton.protocol.messages import Grant

GDN = gated_delta_net(key_heads=2, value_heads=4, key_dim=2, value_dim=3, conv_width=4, element_bytes=2, dtype="x")
DENSE = Model(layers=("kv", "kv"), heads=4)
GQA = Model(layers=("kv", "kv", "kv"), heads=2)
#: Full attention with quantised K and V, a window, latents with index keys, and a gated delta net: in one model.
EVERYTHING = Model(
    layers=("kv", "swa", "mla", "state", "kv", "swa", "mla", "state"),
    heads=4,
    scale_bytes=4,
    swa_heads=4,
    window=10,
    index_bytes=4,
    index_scale_bytes=2,
    tensors=GDN,
)


class Request:
    """Two groups, the cache of one prompt in the source's memory, and the pages on both sides.

    ``chunks``: tokens at which the source's chunks end; the last one is the prompt's end.
    """

    def __init__(
        self,
        model: Model,
        source: Cut,
        target: Cut,
        *,
        tokens: int = 37,
        prefix: int = 0,
        chunks: Sequence[int] = (),
        seed: int = 7,
        real: bool = False,
    ) -> None:
        self.prompt = Prompt(tokens=tokens, prefix=prefix, seed=seed)
        self.chunks = (*chunks, tokens)
        self.source: Group = make_group(model, source, target=False, tokens=tokens, real=real)
        self.target: Group = make_group(model, target, target=True, tokens=tokens, real=real)
        self.reference = Reference(self.source, self.target, self.prompt)
        self.reference.fill(self.source)
        self._blocks = {
            mine.name: math.gcd(mine.rows, other.rows)
            for mine in (pool for layout in self.source.layouts for pool in layout.pools)
            for other in (pool for layout in self.target.layouts for pool in layout.pools)
            if mine.name == other.name
        }

    def grants(self, layout: CacheLayout) -> tuple[Grant, ...]:
        """What a target rank publishes: of a window only the window."""
        found = []
        for pool in layout.pools:
            tokens = self.reference.ranges.get(pool.name, range(0))
            units = tuple(int(unit) for unit in self.reference.target_units[pool.name])
            found.append(Grant(pool.name, tokens.start, tokens.stop, units))
        return tuple(found)

    def chunk(self, layout: CacheLayout, number: int) -> tuple[Grant, ...]:
        """What a source rank submits as chunk ``number``: of a window the pages it still holds, slots with the last."""
        start, stop = self.chunks[number - 1] if number else 0, self.chunks[number]
        found = []
        for pool in layout.pools:
            units = self.reference.source_units[pool.name]
            if not pool.paged:
                if stop == self.prompt.tokens:
                    found.append(Grant(pool.name, 0, 0, (int(units[0]),)))
                continue
            kept = self.reference.ranges[pool.name].start // pool.rows * pool.rows if pool.window else 0
            begin = max(start, kept)
            if begin < stop:
                pages = units[begin // pool.rows : -(-stop // pool.rows)]
                found.append(Grant(pool.name, begin, stop, tuple(int(page) for page in pages)))
        return tuple(found)

    def differences(self) -> list[str]:
        """What is not as it should be in the target's memory."""
        return self.reference.differences(self.target, self._blocks)

    def untouched(self) -> bool:
        """Whether nothing at all was written."""
        return bool(np.all(self.target.memory == 0xEE))

"""Layers that an engine hands over one by one, joined until they are worth a post of their own.

A post costs the same for one layer as for all, so a short prompt gains nothing by sending its layers ahead: it waits
here, costs its engine a comparison for each layer, and goes as the one chunk that it would have been. What is worth a
post is decided by what is known of the cost of moving it (:mod:`kvbaton.plan.costs`; the core says of each room what a
token costs) and by the pace at which layers have come so far. As long as no target has opened the room, nothing can be
moved, so nothing is worth a post.

What is held is let go by the next chunk at the latest: joined with it, where it is of the same tokens; before it, where
it is of others.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass

from msgspec import structs

from kvbaton.errors import LayoutError
from kvbaton.layout import CacheLayout
from kvbaton.plan.costs import Costs, LayersPolicy
from kvbaton.plan.coverage import Layers
from kvbaton.protocol.events import Chunk
from kvbaton.runtime.commands import Fence


class LayerRules:
    """Of one rank: which layers it has, and when they go ahead."""

    def __init__(self, layout: CacheLayout, policy: LayersPolicy, costs: Costs) -> None:
        self.numbers = sorted({plane.layer for pool in layout.pools for plane in pool.planes if plane.layer >= 0})
        self._policy = policy
        self._costs = costs

    def count(self, start: int, stop: int) -> int:
        """Layers of this rank in ``[start, stop)``."""
        return max(0, bisect_left(self.numbers, stop) - bisect_left(self.numbers, start))

    def check(self, layers: Layers) -> None:
        """Raise LayoutError where ``layers`` are none of this rank's."""
        if not self.count(*layers):
            here = f"layers {self.numbers[0]} to {self.numbers[-1]}" if self.numbers else "no layers"
            raise LayoutError(f"layers: [{layers[0]}, {layers[1]}) has no layer of this rank, which has {here}")

    def worth_a_post(self, chunk: Chunk, token_seconds: float, layer_seconds: float) -> bool:
        """Whether a chunk of some layers goes ahead; ``layer_seconds``: what computing one takes."""
        if self._policy != "auto":
            return self._policy == "always"
        start, stop = chunk.layers or (0, 0)
        tokens = max((span.token_stop - span.token_start for span in chunk.spans), default=0)
        moving = tokens * token_seconds * self.count(start, stop) / len(self.numbers)
        left = len(self.numbers) - bisect_left(self.numbers, stop) or 1  # after the last one comes the first token
        return self._costs.worth_a_post(moving, left * layer_seconds)


@dataclass(frozen=True, slots=True)
class _Held:
    chunk: Chunk
    fences: tuple[Fence, ...]

    def ready(self) -> Fence:
        first, *others = dict.fromkeys(self.fences)
        return (lambda: first() and all(fence() for fence in others)) if others else first


class Pieces:
    """Of one sender. True while something is held."""

    def __init__(self, rules: LayerRules) -> None:
        self._rules = rules
        self._held: _Held | None = None
        self._last: tuple[Chunk, float] | None = None  # the last that came, and when
        self._layer_seconds = math.inf  # nobody knows before the second layer

    def __bool__(self) -> bool:
        return self._held is not None

    def add(self, chunk: Chunk, ready: Fence, now: float, token_seconds: float) -> list[tuple[Chunk, Fence]]:
        """What goes now, in order."""
        if chunk.layers is None and self._held is None:
            return [(chunk, ready)]
        if chunk.layers is not None:
            self._rules.check(chunk.layers)
            self._note_pace(chunk, chunk.layers, now)
        before, self._held = self._held, None
        held, gone = _Held(chunk, (ready,)), []
        if before is not None:
            joined = _join(before.chunk, chunk)
            if joined is None:
                gone.append((before.chunk, before.ready()))
            else:
                held = _Held(joined, (*before.fences, ready))
        whole = held.chunk.layers is None or held.chunk.last
        if whole or self._rules.worth_a_post(held.chunk, token_seconds, self._layer_seconds):
            gone.append((held.chunk, held.ready()))
        else:
            self._held = held
        return gone

    def clear(self) -> None:
        """What is held is not wanted any more."""
        self._held = None

    def _note_pace(self, chunk: Chunk, layers: Layers, now: float) -> None:
        """Layers of one chunk come one after the other; between chunks the engine may do other things."""
        if self._last is not None and _has_tokens_of(self._last[0], chunk):
            self._layer_seconds = (now - self._last[1]) / self._rules.count(*layers)
        self._last = (chunk, now)


def _join(held: Chunk, chunk: Chunk) -> Chunk | None:
    """One chunk for both, where they are of the same tokens and their layers make one range; None where not."""
    if held.layers is None or not _has_tokens_of(chunk, held):
        return None
    if chunk.layers is None:
        return chunk
    if not _has_tokens_of(held, chunk) or held.layers[1] < chunk.layers[0] or chunk.layers[1] < held.layers[0]:
        return None
    layers = (min(held.layers[0], chunk.layers[0]), max(held.layers[1], chunk.layers[1]))
    return structs.replace(chunk, layers=layers)


def _has_tokens_of(chunk: Chunk, other: Chunk) -> bool:
    """Whether ``chunk`` has all pools and tokens of ``other``."""
    if chunk.spans is other.spans:
        return True
    ranges = {span.pool: (span.token_start, span.token_stop) for span in chunk.spans}
    for span in other.spans:
        start, stop = ranges.get(span.pool, (math.inf, -1))
        if span.token_start < start or span.token_stop > stop:
            return False
    return True

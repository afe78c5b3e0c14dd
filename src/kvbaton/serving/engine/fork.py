"""The units of one request: a holding for each of its choices, which share the whole pages of the prompt.

Rules: the units of all choices are taken at once or not at all, so that no request waits for another while it holds
half of what it needs. The prompt is computed in, or sent into, the first holding. What a choice will write to lies in
units of its own: a page that the prompt fills in part, a window's ring and a state are copied before the first step
(:meth:`Fork.copies`). A page that is shared is only read, and goes back with the last of the choices.

This file must not know of requests, models or peers.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvbaton.serving.engine.pool import Copies, Holding, Pools

#: Choices that need nothing of their own.
UNBOUNDED = 1 << 30


class Fork:
    """``holdings[i]`` is choice i's; the first ``common`` pages are the same in all of them."""

    def __init__(self, holdings: Sequence[Holding], common: int) -> None:
        self.holdings = tuple(holdings)
        self.common = common
        #: Choices that have not ended.
        self.open = len(self.holdings)

    @property
    def first(self) -> Holding:
        return self.holdings[0]

    def copies(self, pools: Pools, prompt: int) -> Copies:
        """What the other choices need of the first one's own units, once the ``prompt`` tokens lie in those."""
        first, last = self.first, pools.pages_for(prompt)
        others = self.holdings[1:]
        return Copies(
            pages=tuple(
                pair for other in others for pair in _pairs(first.pages, other.pages, slice(self.common, last))
            ),
            ring=tuple(pair for other in others for pair in _pairs(first.ring, other.ring, slice(None))),
            states=tuple((first.state, other.state) for other in others) if pools.geometry.states else (),
        )

    def end(self, pools: Pools, holding: Holding, *, keep: frozenset[int] = frozenset()) -> None:
        """Give back what only this choice still needs, but for the pages to ``keep``."""
        self.open -= 1
        shared = frozenset(holding.pages[: self.common]) if self.open else frozenset()
        pools.give_back(holding, keep=keep | shared)

    def give_back(self, pools: Pools, *, keep: frozenset[int] = frozenset()) -> None:
        """End every choice, where none has ended yet."""
        for holding in self.holdings:
            self.end(pools, holding, keep=keep)

    def __repr__(self) -> str:
        return f"Fork({self.open} of {len(self.holdings)} choices open, {self.common} common pages)"


def take_fork(pools: Pools, prompt: int, tokens: int, choices: int, *, shared: tuple[int, ...] = ()) -> Fork | None:
    """Units for ``choices`` answers of ``tokens`` tokens each, prompt and answer, or None while any pool is too full.

    ``shared`` are pages that somebody holds already; they become the first of each holding.
    """
    taken: list[Holding] = []
    common = len(shared)
    while len(taken) < choices:
        holding = pools.take(tokens, shared=taken[0].pages[:common] if taken else shared)
        if holding is None:
            if taken:
                Fork(taken, common).give_back(pools, keep=frozenset(shared))
            return None
        taken.append(holding)
        common = _common(pools, prompt, len(holding.pages)) if choices > 1 else common
    return Fork(taken, common)


def missing_pages(pools: Pools, prompt: int, tokens: int, choices: int, *, shared: int = 0) -> int:
    """Pages that are too few in the pool for such a fork."""
    if pools.pages is None:
        return 0
    count = pools.pages_for(tokens)
    needed = count - shared + (choices - 1) * (count - _common(pools, prompt, count))
    return max(0, needed - pools.pages.free)


def most_choices(pools: Pools, prompt: int, tokens: int) -> int:
    """How many choices the empty pools have room for, for a request of which one fits."""
    one = pools.pages_for(tokens)
    bounds = []
    if pools.pages is not None:
        own = one - _common(pools, prompt, one)
        bounds.append(1 + (pools.pages.units - one) // own if own else UNBOUNDED)
    if pools.rings is not None:
        bounds.append(pools.rings.units // pools.ring_pages(tokens))
    if pools.state_slots is not None:
        bounds.append(pools.state_slots.units)
    return min(bounds, default=UNBOUNDED)


def _common(pools: Pools, prompt: int, count: int) -> int:
    """Of a request's ``count`` pages, those that the prompt fills: nobody writes there any more."""
    return min(prompt // pools.page_size, count)


def _pairs(source: Sequence[int], target: Sequence[int], which: slice) -> list[tuple[int, int]]:
    return list(zip(source[which], target[which], strict=True))

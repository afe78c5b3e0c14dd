"""The units of one request: a block table for each of its choices, which share the whole pages of the prompt.

Rules: the units of all choices are taken at once or not at all, so that no request waits for another while it holds
half of what it needs. The prompt is computed in, or sent into, the first block table. What a choice will write to lies
in units of its own: a page that the prompt fills in part, a window's ring and a state are copied before the first step
(:meth:`SequenceGroup.copies`). A page that is shared is only read, and goes back with the last of the choices.

This file must not know of requests, models or peers.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvbaton.serving.engine.pool import BlockTable, Copies, Pools

#: Choices that need nothing of their own.
UNBOUNDED = 1 << 30


class SequenceGroup:
    """``block_tables[i]`` is choice i's; the first ``common`` pages are the same in all of them."""

    def __init__(self, block_tables: Sequence[BlockTable], common: int) -> None:
        self.block_tables = tuple(block_tables)
        self.common = common
        #: Choices that have not ended.
        self.open = len(self.block_tables)

    @property
    def first(self) -> BlockTable:
        return self.block_tables[0]

    def copies(self, pools: Pools, prompt: int) -> Copies:
        """What the other choices need of the first one's own units, once the ``prompt`` tokens lie in those."""
        first, last = self.first, pools.pages_for(prompt)
        others = self.block_tables[1:]
        return Copies(
            pages=tuple(
                pair for other in others for pair in _pairs(first.pages, other.pages, slice(self.common, last))
            ),
            ring=tuple(pair for other in others for pair in _pairs(first.ring, other.ring, slice(None))),
            states=tuple((first.state, other.state) for other in others) if pools.geometry.states else (),
        )

    def end(self, pools: Pools, block_table: BlockTable, *, keep: frozenset[int] = frozenset()) -> None:
        """Give back what only this choice still needs, but for the pages to ``keep``."""
        self.open -= 1
        shared = frozenset(block_table.pages[: self.common]) if self.open else frozenset()
        pools.free(block_table, keep=keep | shared)

    def free(self, pools: Pools, *, keep: frozenset[int] = frozenset()) -> None:
        """End every choice, where none has ended yet."""
        for block_table in self.block_tables:
            self.end(pools, block_table, keep=keep)

    def __repr__(self) -> str:
        return f"SequenceGroup({self.open} of {len(self.block_tables)} choices open, {self.common} common pages)"


def allocate_group(
    pools: Pools, prompt: int, tokens: int, choices: int, *, shared: tuple[int, ...] = (), recorded: int = 0
) -> SequenceGroup | None:
    """Units for ``choices`` answers of ``tokens`` tokens each, prompt and answer, or None while any pool is too full.

    ``shared`` are pages that somebody holds already; they become the first of each block_table. ``recorded``: tokens
    of the prompt that need a record, in the first one's.
    """
    taken: list[BlockTable] = []
    common = len(shared)
    while len(taken) < choices:
        if taken:
            block_table = pools.allocate(tokens, shared=taken[0].pages[:common])
        else:
            block_table = pools.allocate(tokens, shared=shared, recorded=recorded)
        if block_table is None:
            if taken:
                SequenceGroup(taken, common).free(pools, keep=frozenset(shared))
            return None
        taken.append(block_table)
        common = _common(pools, prompt, len(block_table.pages)) if choices > 1 else common
    return SequenceGroup(taken, common)


def missing_pages(pools: Pools, prompt: int, tokens: int, choices: int, *, shared: int = 0) -> int:
    """Pages that are too few in the pool for such a sequences."""
    if pools.pages is None:
        return 0
    count = pools.pages_for(tokens)
    needed = count - shared + (choices - 1) * (count - _common(pools, prompt, count))
    return max(0, needed - pools.pages.available)


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

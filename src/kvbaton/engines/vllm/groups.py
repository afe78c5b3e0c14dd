"""Which blocks hold which tokens, for every kind of cache that vLLM groups its layers by.

A request has one table of block ids for each group, in which position is position in the prompt. Tokens are absolute.

- ``full`` (also latents): every block moves.
- ``window``: the blocks of the tokens that the last token of the prompt still sees. Older ones are null blocks in the
  table (id 0), which nobody may read or write.
- ``state``: one slot, the last in the table but for those of speculative decoding.

**Backoff.** Decode computes the last token of the prompt again. From a full cache that is harmless. A state must not
have seen that token yet, and a window of W must still hold the token W before it, of which vLLM has dropped the block
where the prompt's length is just so. Both are cured by handing over one token less: with such a group, prefill stops
one token short and decode loads all but the last token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kvbaton.engines.vllm.orders import Blocks
from kvbaton.errors import LayoutError

#: Rows of vLLM's tables: block ids of one group.
Table = Sequence[int]
NULL_BLOCK = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheGroup:
    """One group of layers.

    Args:
        pool: the pool that holds it.
        index: of its table among those of a request.
        block_size: tokens of a block; meaningless for states.
        window: tokens that a layer attends to, itself included; 0: all.
        spare: slots at the end of the table that hold no state yet.
    """

    pool: str
    index: int
    kind: Literal["full", "window", "state"]
    block_size: int
    window: int = 0
    spare: int = 0


@dataclass(frozen=True)
class CacheGroups:
    """All groups that are handed over, alike on every rank."""

    groups: tuple[CacheGroup, ...]

    @property
    def backoff(self) -> int:
        """Tokens at the end of a prompt that decode computes itself; see the module."""
        return int(any(group.kind != "full" for group in self.groups))

    @property
    def granularity(self) -> int:
        """Chunks, but for the last, end at a multiple of so many tokens."""
        return math.lcm(*(group.block_size for group in self.groups if group.kind != "state"))

    def tokens(self, prompt_tokens: int) -> int:
        """Tokens of a prompt that are handed over."""
        return max(0, prompt_tokens - self.backoff)

    def chunk(self, start: int, stop: int, *, last: bool, tables: Sequence[Table]) -> tuple[Blocks, ...]:
        """What prefill has of tokens ``start`` to ``stop``; null blocks at the head of a window are left out."""
        found = []
        for group in self.groups:
            table = tables[group.index]
            if group.kind == "state":
                if last:
                    found.append(self._slot(group, table))
                continue
            begin = start
            while begin < stop and table[begin // group.block_size] == NULL_BLOCK:
                begin = (begin // group.block_size + 1) * group.block_size
            if begin < stop:
                found.append(_blocks(group, begin, stop, table))
        return tuple(found)

    def grant(self, prefix: int, tokens: int, tables: Sequence[Table]) -> tuple[Blocks, ...]:
        """What decode wants of a prompt of which ``tokens`` are handed over and ``prefix`` are here already.

        Raises LayoutError where it has no block for a token that it needs.
        """
        found = []
        for group in self.groups:
            table = tables[group.index]
            if group.kind == "state":
                found.append(self._slot(group, table))
                continue
            start = prefix
            if group.kind == "window":  # the token that decode computes next sees itself and window - 1 before it
                oldest = max(0, tokens - (group.window - 1))
                start = max(prefix, oldest // group.block_size * group.block_size)
            if start >= tokens:
                continue
            blocks = _blocks(group, start, tokens, table)
            if NULL_BLOCK in blocks.ids:
                raise LayoutError(
                    f"pool {group.pool!r}: vLLM has no block for tokens {start}..{tokens}, its table is {blocks.ids}"
                )
            found.append(blocks)
        return tuple(found)

    def _slot(self, group: CacheGroup, table: Table) -> Blocks:
        used = table[: len(table) - min(group.spare, len(table) - 1)]
        if not used or used[-1] == NULL_BLOCK:
            raise LayoutError(f"pool {group.pool!r}: vLLM has no slot for the state, its table is {tuple(table)}")
        return Blocks(group.pool, 0, 0, (used[-1],))


def _blocks(group: CacheGroup, start: int, stop: int, table: Table) -> Blocks:
    first, behind = start // group.block_size, -(-stop // group.block_size)
    if behind > len(table):
        raise LayoutError(f"pool {group.pool!r}: tokens {start}..{stop} need {behind} blocks, vLLM has {len(table)}")
    return Blocks(group.pool, start, stop, tuple(table[first:behind]))

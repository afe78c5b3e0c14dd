"""Which prompts may take blocks while the other side has none for them yet.

**Theory.** A prompt that is handed over needs blocks on both sides, and keeps those it has until the other side has its
own. Two engines that take blocks in orders of their own can therefore wait for each other for ever: prefill's pool full
of finished prompts for which decode has no blocks, decode's pool full of blocks for prompts that wait at prefill. One
order for all excludes it: decode's blocks first, then prefill's. But then no prompt could begin before decode's word.

So prefill begins without it, as long as the prompts that have blocks here and none there leave as many as the longest
prompt can need. A prompt for which decode *has* blocks then always finds its own, sooner or later: what it waits for is
computed, moved and freed without waiting for anyone. Where the pool holds less than two of the longest prompts, long
ones wait for decode.

Two flows, two cases more:

- *Sequential.* Decode hears of a prompt only when it is complete: prefill's blocks first, then decode's, which is one
  order too. Only beside requests of the concurrent flow such a prompt counts as one for which decode has no blocks.
- *An engine of both roles* is a prefill and a decode engine for the same peer, so that the order of the one is the
  reverse of the other's. There a decode request whose prompt is not complete at prefill counts as well, and so does
  every sequential prompt.

Decode never opens the room of a prompt of these two cases while it waits here, so one of them may begin whenever none
holds blocks: it is late, never left.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Need:
    """Blocks that a group of layers takes for a prompt: one for each ``block_size`` tokens, at most ``most``;
    ``fixed``: ``most`` whatever the length."""

    block_size: int
    most: int
    fixed: bool = False

    def blocks(self, tokens: int) -> int:
        return self.most if self.fixed else min(-(-tokens // self.block_size), self.most)


@dataclass(slots=True)
class _Prompt:
    """``early``: decode was asked at the same time and opens the room when it can; ``held``: it has its blocks here."""

    blocks: int
    early: bool
    held: bool = False


class Admission:
    """See the module. Requests go by their ids; one that was never added, or was met, is always admitted.

    Args:
        needs: of every group of layers; none: everything is admitted.
        blocks: of the pool that all groups share.
        longest: tokens of the longest prompt.
        both: the engine is prefill and decode.
    """

    def __init__(self, needs: Iterable[Need] = (), *, blocks: int = 0, longest: int = 0, both: bool = False) -> None:
        self._needs = tuple(needs)
        self._most = max(0, blocks - self.blocks(longest))
        self._both = both
        self._unmet: dict[str, _Prompt] = {}
        self._early: set[str] = set()
        self._held = 0

    def blocks(self, tokens: int) -> int:
        """At most so many does a prompt take."""
        return sum(need.blocks(tokens) for need in self._needs)

    def add(self, request: str, tokens: int, *, early: bool) -> None:
        """A request has come for which the other side has no blocks, as far as we know."""
        self._unmet[request] = _Prompt(self.blocks(tokens), early)
        if early:
            self._early.add(request)

    def admits(self, request: str) -> bool:
        """Whether a request may take its blocks now."""
        prompt = self._unmet.get(request)
        if prompt is None or prompt.held:
            return True
        if not prompt.early and not (self._both or self._early):
            return True
        return self._held + prompt.blocks <= self._most or (not prompt.early and not self._held)

    def hold(self, request: str) -> None:
        """A request has taken its blocks."""
        prompt = self._unmet.get(request)
        if prompt is not None and not prompt.held:
            prompt.held = True
            self._held += prompt.blocks

    def give_back(self, request: str) -> None:
        """Its blocks were taken from it; it begins anew."""
        prompt = self._unmet.get(request)
        if prompt is not None and prompt.held:
            prompt.held = False
            self._held -= prompt.blocks

    def meet(self, request: str) -> None:
        """The other side has its blocks, or will never want any."""
        self.give_back(request)
        self._unmet.pop(request, None)

    def end(self, request: str) -> None:
        """It holds nothing any more."""
        self.meet(request)
        self._early.discard(request)

    @property
    def held(self) -> int:
        """Blocks of requests for which the other side has none."""
        return self._held

    def __len__(self) -> int:
        return len(self._unmet.keys() | self._early)

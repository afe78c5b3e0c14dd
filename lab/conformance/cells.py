"""The table: which topologies there are, and how one cell is run and judged.

A cell is equal when every token of every prompt is that of the single process, and, where the decode side held a
prefix, fewer bytes have moved than without; where all was to be staged, something was, and so it is with layers. What
cannot be run is a cell that is not equal, with the reason.

This file must not know how servers are started.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from kvbaton.errors import KVBatonError
from lab.conformance.families import WINDOW_ONLY
from lab.conformance.servers import ForkedServer, PairAnswer, Servers
from lab.conformance.shape import Shape

#: Prompt lengths of a cell: one token, pages and a token more, chunks, several windows.
LENGTHS = (1, 16, 17, 49, 100, 150)
ANSWER_TOKENS = 16
#: Whole pages of either page size, so that all of it can be held.
PREFIX_TOKENS = 128
SHARED_TOKENS = 64
#: Tokens that prompts are made of: above the special ones, within the smallest vocabulary.
FIRST_TOKEN, LAST_TOKEN = 4, 98
MAX_REASON = 2000


@dataclass(frozen=True, slots=True)
class PairTopology:
    """Two shapes that hand over. ``held``: how much of a prompt decode has already, None where it keeps nothing.
    ``kv_heads``: heads that the model must have at most, so that ranks share them."""

    name: str
    source: Shape
    target: Shape
    held: str | None = None
    kv_heads: int | None = None


def _source(
    tensor: int = 1,
    *,
    pipeline: int = 1,
    page_size: int = 16,
    staged: bool = False,
    layered: bool = False,
    data: int = 1,
    chooses: bool = False,
) -> Shape:
    return Shape("prefill", tensor, pipeline, page_size, staged=staged, layered=layered, data=data, chooses=chooses)


def _target(tensor: int = 1, *, page_size: int = 16, radix: bool = False, staged: bool = False, data: int = 1) -> Shape:
    return Shape("decode", tensor, 1, page_size, radix, staged=staged, data=data)


TOPOLOGIES: tuple[PairTopology, ...] = (
    PairTopology("TP 1→1", _source(), _target()),
    PairTopology("TP 2→1", _source(2), _target()),
    PairTopology("TP 1→2", _source(), _target(2)),
    PairTopology("TP 2→1, staged", _source(2, staged=True), _target(staged=True)),
    PairTopology("TP 2→1, layer by layer", _source(2, layered=True), _target()),
    PairTopology("PP 2→1, layer by layer", _source(pipeline=2, layered=True), _target(page_size=64)),
    PairTopology("TP 4→1", _source(4), _target()),
    PairTopology("TP 2→4", _source(2), _target(4)),
    PairTopology("TP 4→2", _source(4), _target(2)),
    PairTopology("TP 4→2, more ranks than KV heads", _source(4), _target(2), kv_heads=2),
    PairTopology("PP 2→1", _source(pipeline=2), _target()),
    PairTopology("DP 2→1", _source(data=2), _target()),
    PairTopology("DP 1→2", _source(), _target(data=2)),
    PairTopology("DP 2→2, TP 2→1, prefill chooses", _source(2, data=2, chooses=True), _target(data=2)),
    PairTopology("page 16→64", _source(), _target(page_size=64)),
    PairTopology("page 64→16", _source(page_size=64), _target()),
    *(
        PairTopology(f"prefix hit {held}", _source(), _target(radix=True), held=held)
        for held in ("none", "partial", "full")
    ),
)


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One cell's outcome. ``bytes``: what the hand-offs moved, together; ``reason``: why it is not equal."""

    family: str
    topology: str
    equal: bool
    seconds: float
    requests: int = 0
    bytes: int = 0
    reason: str = ""


class CellJudge:
    """Runs the cells of one checkpoint. ``reference`` answers alone."""

    def __init__(self, family: str, servers: Servers, reference: ForkedServer) -> None:
        self._family = family
        self._servers = servers
        self._reference = reference
        self._expected: dict[tuple[int, ...], PairAnswer] = {}
        self._whole_bytes = 0

    async def run(self, topology: PairTopology, source: ForkedServer, target: ForkedServer) -> Cell:
        """One cell; whatever goes wrong is its reason."""
        started = time.monotonic()
        requests, moved = 0, 0
        try:
            prompts = _prompts(self._family, topology)
            requests = len(prompts)
            expected = [await self._expect(prompt) for prompt in prompts]
            answers = await asyncio.gather(
                *(self._servers.pair(source, target, prompt, ANSWER_TOKENS) for prompt in prompts)
            )
            moved = sum(answer.bytes for answer in answers)
            reason = _first_difference(prompts, answers, expected) or self._prefix_complaint(topology, moved)
            if not reason and topology.source.staged and not await self._servers.counted(source, "writes_staged"):
                reason = "nothing was staged"
            if not reason and topology.source.layered and not await self._servers.counted(source, "chunks_of_layers"):
                reason = "no layer went ahead"
        except (KVBatonError, KeyError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
        return Cell(
            family=self._family,
            topology=topology.name,
            equal=not reason,
            seconds=round(time.monotonic() - started, 3),
            requests=requests,
            bytes=moved,
            reason=reason[:MAX_REASON],
        )

    async def _expect(self, prompt: tuple[int, ...]) -> PairAnswer:
        if prompt not in self._expected:
            self._expected[prompt] = await self._servers.single(self._reference, prompt, ANSWER_TOKENS)
        return self._expected[prompt]

    def _prefix_complaint(self, topology: PairTopology, moved: int) -> str:
        """A prefix that is held and moved all the same is no prefix cache; the window and states always move."""
        if topology.held == "none":
            self._whole_bytes = moved
        saves = self._family not in WINDOW_ONLY
        if topology.held in ("partial", "full") and self._whole_bytes and moved + saves > self._whole_bytes:
            return f"with the prefix held {moved} bytes moved, without it {self._whole_bytes}"
        return ""


def _prompts(family: str, topology: PairTopology) -> list[tuple[int, ...]]:
    source = random.Random(family)
    if topology.held is None:
        return [_draw(source, length) for length in LENGTHS]
    seen, suffix = _draw(source, PREFIX_TOKENS), _draw(source, PREFIX_TOKENS - SHARED_TOKENS)
    return [(*seen[:SHARED_TOKENS], *suffix) if topology.held == "partial" else seen]


def _draw(source: random.Random, length: int) -> tuple[int, ...]:
    return tuple(source.randint(FIRST_TOKEN, LAST_TOKEN) for _ in range(length))


def _first_difference(
    prompts: Sequence[Sequence[int]], answers: Sequence[PairAnswer], expected: Sequence[PairAnswer]
) -> str:
    for prompt, answer, right in zip(prompts, answers, expected, strict=True):
        if answer.tokens != right.tokens:
            return f"a prompt of {len(prompt)} tokens gives {answer.tokens}, the single process {right.tokens}"
    return ""

"""Cases against SGLang's own NIXL backend: the same prompts in turns, equal answers, latency and throughput, idle."""

from __future__ import annotations

import time
from collections.abc import Sequence

from lab.engines.campaign import check
from lab.engines.comparison import Cell, Pair, Seconds, measure, paused
from lab.engines.idle import idle_parts
from lab.engines.requests import prompt
from lab.sglang.cases import IDLE_PART, LENGTHS
from lab.sglang.requests import Client
from lab.sglang.scene import Scene
from lab.sglang.server import SglangServer

CELLS = (Cell(1, 500, 4), Cell(4, 500), Cell(8, 500), Cell(1, 4000))
OURS, THEIRS = "ours", "nixl"
#: Of an answer whose whole time is measured.
ANSWER_TOKENS = 16


async def answers(scene: Scene) -> str:
    """The same tokens from both, one at a time."""
    for seed, length in enumerate(LENGTHS):
        tokens = prompt(length, 10_000 + seed)
        check(await scene.client.pair(tokens), await scene.rival.client.pair(tokens), f"{length} tokens")
    return f"{len(LENGTHS)} of {len(LENGTHS)} equal to SGLang's own NIXL backend"


async def latencies(scene: Scene) -> str:
    """Seconds to the first token and to the last of 16, both legs at once as SGLang's router sends them: 1, 4 and 8 at
    once of 500 tokens, and 1 of 4,000."""

    async def ours(tokens: Sequence[int]) -> Seconds:
        return await _timed(scene.client, tokens)

    async def theirs(tokens: Sequence[int]) -> Seconds:
        return await _timed(scene.rival.client, tokens)

    pairs = {OURS: Pair(_servers(scene), {OURS: ours}), THEIRS: Pair(_servers(scene.rival), {THEIRS: theirs})}
    measured = await measure(pairs, CELLS, seed=20_000)
    rows = [measured.row(cell, (OURS, THEIRS), ("TTFT", "answer"), against=THEIRS) for cell in CELLS]
    return " | ".join([*rows, measured.conditions])


async def idle(scene: Scene) -> str:
    """CPU time of the schedulers of each pair when nothing happens, in parts of a core."""
    used = {}
    for name, pair in ((OURS, scene), (THEIRS, scene.rival)):
        with paused(Pair(_servers(scene.rival if pair is scene else scene), {})):
            used[name] = await idle_parts([process for server in _servers(pair) for process in server.schedulers()])
    said = ", ".join(f"{name} " + " and ".join(f"{part:.1%}" for part in parts) for name, parts in used.items())
    if max(used[OURS]) > IDLE_PART:
        raise AssertionError(f"of a core: {said}")
    return f"of a core: {said}"


def _servers(scene: Scene) -> list[SglangServer]:
    return [scene.prefill, scene.decode]


async def _timed(client: Client, tokens: Sequence[int]) -> Seconds:
    started = time.monotonic()
    came = [time.monotonic() - started async for _ in client.streamed(tokens, count=ANSWER_TOKENS)]
    return {"TTFT": came[0], "answer": came[-1]}

"""Cases against vLLM's NixlConnector: the same prompts in turns, latency, idle, lengths at the edge of a window."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from lab.engines.campaign import check
from lab.engines.comparison import Cell, Pair, Seconds, measure, paused
from lab.engines.idle import idle_parts
from lab.engines.models import WINDOW
from lab.engines.requests import prompt
from lab.vllm.requests import Client, new_room
from lab.vllm.scene import Scene
from lab.vllm.service import IDLE_PART

CELLS = (Cell(1, 500, 4), Cell(8, 500), Cell(1, 4000), Cell(8, 4000))
OURS, BOTH, THEIRS = "ours", "ours, both legs at once", "NixlConnector"
#: Our TTFT over theirs, at 8 at once, at most.
TTFT_RATIO = 0.8

#: Lengths whose window begins with a block (it sees tokens from T - WINDOW on), and others beside them.
EDGES = tuple(blocks * WINDOW - 1 for blocks in range(2, 13))
OTHERS = (100, 254, 256, 300, 512, 700, 1000, 1022, 1280, 1500)


async def latencies(scene: Scene) -> str:
    """TTFT, and hand-off with the first token: 1 and 8 at once, 500 and 4,000 tokens; medians over all rounds.
    Ours in both flows, theirs prefill first, as it goes."""
    sources = await scene.client.sources()

    async def ours(tokens: Sequence[int]) -> Seconds:
        return await _sequential(scene.client, tokens)

    async def both(tokens: Sequence[int]) -> Seconds:
        return await _concurrent(scene.client, tokens, sources)

    async def theirs(tokens: Sequence[int]) -> Seconds:
        return await _sequential(scene.rival.client, tokens)

    pairs = {
        OURS: Pair(list(scene.connected.values()), {OURS: ours, BOTH: both}),
        THEIRS: Pair(list(scene.rival.connected.values()), {THEIRS: theirs}),
    }
    measured = await measure(pairs, CELLS, seed=20_000)
    told, slow = [], []
    for cell in CELLS:
        told.append(
            f"{measured.row(cell, (OURS, BOTH, THEIRS), ('TTFT',), against=THEIRS)}; "
            f"hand-off {measured.median(cell, OURS, 'hand-off') * 1e3:.0f} against "
            f"{measured.median(cell, THEIRS, 'hand-off') * 1e3:.0f} ms"
        )
        best = min(measured.median(cell, way, "TTFT") for way in (OURS, BOTH))
        if cell.at_once == 8 and best > TTFT_RATIO * measured.median(cell, THEIRS, "TTFT"):
            slow.append(told[-1])
    said = " | ".join(told) + f" | {measured.conditions}"
    if slow:
        raise AssertionError(f"more than {TTFT_RATIO} of theirs: {said}")
    return said


def _servers(scene: Scene) -> Pair:
    return Pair(list(scene.connected.values()), {})


async def idle(scene: Scene) -> str:
    """CPU time of the workers of each pair when nothing happens, in parts of a core."""
    used = {}
    for name, pair in (("ours", scene), ("theirs", scene.rival)):
        with paused(_servers(scene.rival if pair is scene else scene)):
            params = await pair.client.to_prefill(prompt(40, 1))
            await pair.client.complete(pair.decode.url, prompt(40, 1), count=1, params=params)
            used[name] = await idle_parts([server.worker() for server in pair.connected.values()])
    said = ", ".join(f"{name} " + " and ".join(f"{part:.1%}" for part in parts) for name, parts in used.items())
    if max(used["ours"]) > IDLE_PART:
        raise AssertionError(f"of a core: {said}")
    return f"of a core: {said}"


async def windows(scene: Scene) -> str:
    """Lengths at the edge of a sliding window: ours must all be equal to the plain instance; theirs are counted."""
    wrong: dict[str, list[int]] = {"ours": [], "theirs": []}
    for name, pair in (("ours", scene), ("theirs", scene.rival)):
        with paused(_servers(scene.rival if pair is scene else scene)):
            for seed, length in enumerate((*EDGES, *OTHERS)):
                tokens = prompt(length, 30_000 + seed)
                if await pair.client.sequential(tokens) != await scene.client.alone(tokens):
                    wrong[name].append(length)
    edges = {name: sum(length in EDGES for length in lengths) for name, lengths in wrong.items()}
    said = "; ".join(
        f"{name} differ in {edges[name]} of {len(EDGES)} edge lengths and {len(wrong[name]) - edges[name]} of "
        f"{len(OTHERS)} others {wrong[name] or ''}".rstrip()
        for name in wrong
    )
    check(wrong["ours"], [], said)
    return said


async def _sequential(client: Client, tokens: Sequence[int]) -> Seconds:
    started = time.monotonic()
    params = await client.to_prefill(tokens)
    answered = time.monotonic()
    await client.complete(client.decode, tokens, count=1, params=params)
    ended = time.monotonic()
    return {"TTFT": ended - started, "hand-off": ended - answered}


async def _concurrent(client: Client, tokens: Sequence[int], sources: Sequence[str]) -> Seconds:
    started, room = time.monotonic(), new_room()
    params = {"do_remote_prefill": True, "kvbaton_room": room, "kvbaton_sources": list(sources)}
    prefill = asyncio.create_task(client.to_prefill(tokens, room))
    await client.complete(client.decode, tokens, count=1, params=params)
    seconds = time.monotonic() - started
    await prefill
    return {"TTFT": seconds}

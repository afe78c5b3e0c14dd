"""Cases against vLLM's NixlConnector: the same servers, prompts and rounds; while one pair is measured, the other is
stopped, because its progress threads spin on the cores that both share."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import statistics
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass

from lab.engines.campaign import check
from lab.engines.models import WINDOW
from lab.engines.requests import prompt
from lab.vllm.requests import Client, new_room
from lab.vllm.scene import Scene
from lab.vllm.service import IDLE_PART, idle_parts

#: So many rounds; on a machine that is busy otherwise none begins after so long.
ROUNDS = 5
SECONDS = 300.0
#: Requests at once, tokens of each, and how often in a round.
CELLS = ((1, 500, 4), (8, 500, 1), (1, 4000, 2), (8, 4000, 1))
#: Our TTFT over theirs, at 8 at once, at most.
TTFT_RATIO = 0.8

#: Lengths whose window begins with a block (it sees tokens from T - WINDOW on), and others beside them.
EDGES = tuple(blocks * WINDOW - 1 for blocks in range(2, 13))
OTHERS = (100, 254, 256, 300, 512, 700, 1000, 1022, 1280, 1500)


@dataclass(frozen=True, slots=True)
class Seconds:
    """Of one request: until its first token, and from prefill's answer until then."""

    ttft: float
    handoff: float


async def latencies(scene: Scene) -> str:
    """TTFT, and hand-off with the first token: 1 and 8 at once, 500 and 4,000 tokens; medians over all rounds.
    Ours in both flows, theirs prefill first, as it goes."""
    pairs = {"ours": scene, "theirs": scene.rival}
    ttft: dict[tuple[int, int, str], list[float]] = defaultdict(list)
    handoff: dict[tuple[int, int, str], list[float]] = defaultdict(list)
    seed, loads = 20_000, [os.getloadavg()[0]]
    turn, started = 0, time.monotonic()
    with _stopped(scene), _stopped(scene.rival):
        while turn < ROUNDS and time.monotonic() < started + SECONDS:
            turn += 1
            for name in ("ours", "theirs") if turn % 2 else ("theirs", "ours"):
                async with _running(pairs[name]):
                    client = pairs[name].client
                    sources = await client.sources() if name == "ours" else []
                    for at_once, length, times in CELLS:
                        for _ in range(times):
                            prompts = [prompt(length, seed + i) for i in range(at_once)]
                            seed += at_once
                            for one in await asyncio.gather(*(_sequential(client, tokens) for tokens in prompts)):
                                ttft[at_once, length, name].append(one.ttft)
                                handoff[at_once, length, name].append(one.handoff)
                            if name == "ours":
                                prompts = [prompt(length, seed + i) for i in range(at_once)]
                                seed += at_once
                                calls = (_concurrent(client, tokens, sources) for tokens in prompts)
                                ttft[at_once, length, "both at once"] += await asyncio.gather(*calls)
                loads.append(os.getloadavg()[0])
    told, slow = [], []
    for at_once, length, _ in CELLS:
        theirs = statistics.median(ttft[at_once, length, "theirs"])
        ours = statistics.median(ttft[at_once, length, "ours"])
        both = statistics.median(ttft[at_once, length, "both at once"])
        gave = statistics.median(handoff[at_once, length, "ours"])
        took = statistics.median(handoff[at_once, length, "theirs"])
        told.append(
            f"{at_once} x {length}: TTFT {_ms(ours)} and {_ms(both)} with both legs at once against {_ms(theirs)} ms "
            f"({ours / theirs:.2f}, {both / theirs:.2f}), hand-off {_ms(gave)} against {_ms(took)} ms "
            f"({gave / took:.2f})"
        )
        if at_once == 8 and both > TTFT_RATIO * theirs:
            slow.append(told[-1])
    said = "; ".join(told) + f"; {turn} rounds, load {min(loads):.0f} to {max(loads):.0f} on {os.cpu_count()} cores"
    if slow:
        raise AssertionError(f"more than {TTFT_RATIO} of theirs: {said}")
    return said


async def idle(scene: Scene) -> str:
    """CPU time of the workers of each pair when nothing happens, in parts of a core."""
    used = {}
    for name, pair in (("ours", scene), ("theirs", scene.rival)):
        with _stopped(scene.rival if pair is scene else scene):
            await pair.serves()
            used[name] = await idle_parts([server.worker() for server in pair.connected.values()])
    said = ", ".join(f"{name} " + " and ".join(f"{part:.1%}" for part in parts) for name, parts in used.items())
    if max(used["ours"]) > IDLE_PART:
        raise AssertionError(f"of a core: {said}")
    return f"of a core: {said}"


async def windows(scene: Scene) -> str:
    """Lengths at the edge of a sliding window: ours must all be equal to the plain instance; theirs are counted."""
    wrong: dict[str, list[int]] = {"ours": [], "theirs": []}
    for name, pair in (("ours", scene), ("theirs", scene.rival)):
        with _stopped(scene.rival if pair is scene else scene):
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


@contextlib.asynccontextmanager
async def _running(pair: Scene) -> AsyncIterator[None]:
    """A stopped pair goes on for a while; what has to be set up anew after the pause is."""
    _go_on(pair)
    try:
        for seed in range(2):
            await pair.client.sequential(prompt(64, 40_000 + seed), count=1)
        yield
    finally:
        _stop(pair)


@contextlib.contextmanager
def _stopped(pair: Scene) -> Iterator[None]:
    _stop(pair)
    try:
        yield
    finally:
        _go_on(pair)


def _stop(pair: Scene) -> None:
    for server in pair.connected.values():
        server.send_signal(signal.SIGSTOP)


def _go_on(pair: Scene) -> None:
    for server in pair.connected.values():
        server.send_signal(signal.SIGCONT)


async def _sequential(client: Client, tokens: Sequence[int]) -> Seconds:
    started = time.monotonic()
    params = await client.to_prefill(tokens)
    answered = time.monotonic()
    await client.complete(client.decode, tokens, count=1, params=params)
    ended = time.monotonic()
    return Seconds(ended - started, ended - answered)


async def _concurrent(client: Client, tokens: Sequence[int], sources: Sequence[str]) -> float:
    started, room = time.monotonic(), new_room()
    params = {"do_remote_prefill": True, "kvbaton_room": room, "kvbaton_sources": list(sources)}
    prefill = asyncio.create_task(client.to_prefill(tokens, room))
    await client.complete(client.decode, tokens, count=1, params=params)
    seconds = time.monotonic() - started
    await prefill
    return seconds


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}"

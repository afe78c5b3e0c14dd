"""The cases: each asks something of a scene and says in one line what came of it, or raises AssertionError."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
from aiohttp import web

from examples.vllm_router import VllmRouter
from kvbaton.serving.fleet import free_ports
from lab.vllm.contract import KEPT, read
from lab.vllm.requests import Refused, new_room, prompt
from lab.vllm.scene import Scene

Case = Callable[[Scene], Awaitable[str]]

#: Around one, two and three blocks, where windows have their edges; and several chunks of 512 tokens.
LENGTHS = (1, 2, 127, 128, 129, 254, 255, 256, 257, 383, 384, 511, 512, 639, 1023, 1800)
LONG = 3500
DEAD = "tcp://127.0.0.1:9"


def check(got: Any, expected: Any, what: str) -> None:
    if got != expected:
        raise AssertionError(f"{what}: {got} instead of {expected}")


def tokens_of(answer: dict[str, Any]) -> list[list[int]]:
    return [choice["token_ids"] for choice in answer["choices"]]


async def lengths_sequential(scene: Scene) -> str:
    """Each length alone, prefill first."""
    for seed, length in enumerate(LENGTHS):
        tokens = prompt(length, seed)
        check(await scene.client.sequential(tokens), await scene.client.alone(tokens), f"{length} tokens")
    return f"{len(LENGTHS)} of {len(LENGTHS)} lengths equal; empty after {await scene.empty():.1f} s"


async def lengths_concurrent(scene: Scene) -> str:
    """Each length alone, both legs at once."""
    sources = await scene.client.sources()
    for seed, length in enumerate(LENGTHS):
        tokens = prompt(length, 1000 + seed)
        check(await scene.client.concurrent(tokens, sources), await scene.client.alone(tokens), f"{length} tokens")
    return f"{len(LENGTHS)} of {len(LENGTHS)} lengths equal; empty after {await scene.empty():.1f} s"


async def many_at_once(scene: Scene) -> str:
    """24 sequential and 24 concurrent ones together."""
    sources = await scene.client.sources()
    prompts = [prompt(60 + 41 * i, 2000 + i) for i in range(48)]
    calls = [
        scene.client.sequential(tokens) if i % 2 else scene.client.concurrent(tokens, sources)
        for i, tokens in enumerate(prompts)
    ]
    got = await asyncio.gather(*calls)
    for tokens, answer in zip(prompts, got, strict=True):
        check(answer, await scene.client.alone(tokens), f"{len(tokens)} tokens")
    return f"{len(got)} of {len(got)} equal; empty after {await scene.empty():.1f} s"


async def prefix_hits(scene: Scene) -> str:
    """Decode holds 512 of 700 tokens, then all of them."""
    head = prompt(512, 3000)
    sources = await scene.client.sources()
    for seed in range(3):
        tokens = head + prompt(188, 3001 + seed)
        for _ in range(2):  # the second time decode has everything
            check(await scene.client.sequential(tokens), await scene.client.alone(tokens), "sequential")
            check(await scene.client.concurrent(tokens, sources), await scene.client.alone(tokens), "concurrent")
    return f"12 of 12 equal; empty after {await scene.empty():.1f} s"


async def lengths_from_cache(scene: Scene) -> str:
    """For arithmetic in which one token computed alone differs from the same token among others (bfloat16): decode must
    answer as the plain instance does when it finds all but the last token in its own prefix cache."""
    sources = await scene.client.sources()
    counts = [blocks * 128 + 1 for blocks in (1, 2, 3, 4, 5, 8, 12)]
    differs = 0
    for seed, length in enumerate(counts):
        tokens, others = prompt(length, seed), prompt(length, 100 + seed)
        once = await scene.client.alone(tokens)
        again = await scene.client.alone(tokens)
        differs += once != again
        check(await scene.client.sequential(tokens), again, f"sequential, {length} tokens")
        await scene.client.alone(others)
        check(
            await scene.client.concurrent(others, sources),
            await scene.client.alone(others),
            f"concurrent, {length} tokens",
        )
    return (
        f"{2 * len(counts)} of {2 * len(counts)} equal to the plain instance with a cached prefix, which differs from "
        f"itself without one in {differs} of {len(counts)}; empty after {await scene.empty():.1f} s"
    )


async def several_answers(scene: Scene) -> str:
    """n = 2, both flows: the siblings share one hand-off."""
    tokens = prompt(300, 4000)
    more = {"n": 2, "temperature": 0.8, "seed": 5}
    got = await scene.client.sequential(tokens, **more)
    check(len(got), 2, "answers")
    return f"2 answers; empty after {await scene.empty():.1f} s"


async def same_params_twice(scene: Scene) -> str:
    """A client that sends prefill's answer twice: the second request computes."""
    tokens = prompt(300, 4100)
    params = await scene.client.to_prefill(tokens)
    expected = await scene.client.alone(tokens)
    for turn in ("first", "second"):
        answer = await scene.client.complete(scene.decode.url, tokens, params=dict(params))
        check([choice["token_ids"] for choice in answer["choices"]], expected, turn)
    return f"both equal; empty after {await scene.empty():.1f} s"


async def logprobs_of_the_prompt(scene: Scene) -> str:
    """Decode must not use any cache: prefill is let go."""
    tokens = prompt(300, 4200)
    params = await scene.client.to_prefill(tokens)
    answer = await scene.client.complete(scene.decode.url, tokens, params=params, prompt_logprobs=1, seconds=240)
    check([choice["token_ids"] for choice in answer["choices"]], await scene.client.alone(tokens), "tokens")
    return f"equal; empty after {await scene.empty(seconds=10):.1f} s"


async def rejected_on_decode(scene: Scene) -> str:
    """The decode call is refused as invalid: prefill is let go at once."""
    tokens = prompt(300, 4300)
    params = await scene.client.to_prefill(tokens)
    try:
        await scene.client.complete(scene.decode.url, tokens, params=params, count=100_000)
    except Refused as error:
        check(error.status, 400, "status")
    else:
        raise AssertionError("100,000 tokens were not refused")
    return f"HTTP 400; empty after {await scene.empty(seconds=10):.1f} s"


async def garbage_in_params(scene: Scene) -> str:
    """What a client may send instead of a room or an address: the request is computed, nobody dies."""
    tokens = prompt(300, 4400)
    expected = await scene.client.alone(tokens)
    wrong: Sequence[dict[str, Any]] = (
        {"do_remote_prefill": True},
        {"do_remote_prefill": True, "kvbaton_room": 12, "kvbaton_sources": [DEAD]},
        {"do_remote_prefill": True, "kvbaton_room": "-1", "kvbaton_sources": [DEAD]},
        {"do_remote_prefill": True, "kvbaton_room": str(1 << 53), "kvbaton_sources": [DEAD]},
        {"do_remote_prefill": True, "kvbaton_room": "5", "kvbaton_sources": "tcp://127.0.0.1:9"},
        {"do_remote_prefill": True, "kvbaton_room": "6", "kvbaton_sources": ["http://127.0.0.1:9"]},
        {"do_remote_prefill": True, "kvbaton_room": "7", "kvbaton_sources": []},
        {"do_remote_prefill": "yes", "kvbaton_room": "8", "kvbaton_sources": [DEAD]},
    )
    for params in wrong:
        answer = await scene.client.complete(scene.decode.url, tokens, params=params)
        check([choice["token_ids"] for choice in answer["choices"]], expected, str(params))
    await scene.client.complete(
        scene.prefill.url, tokens, count=1, params={"do_remote_decode": True, "kvbaton_room": 7}
    )
    return f"{len(wrong)} of {len(wrong)} computed; empty after {await scene.empty():.1f} s"


async def dead_address(scene: Scene) -> str:
    tokens = prompt(300, 5000)
    params = {"do_remote_prefill": True, "kvbaton_room": new_room(), "kvbaton_sources": [DEAD]}
    started = time.monotonic()
    answer = await scene.client.complete(scene.decode.url, tokens, params=params)
    check([choice["token_ids"] for choice in answer["choices"]], await scene.client.alone(tokens), "tokens")
    return f"equal after {time.monotonic() - started:.1f} s; empty after {await scene.empty():.1f} s"


async def other_prompt(scene: Scene) -> str:
    params = await scene.client.to_prefill(prompt(300, 5100))
    tokens = prompt(400, 5101)
    answer = await scene.client.complete(scene.decode.url, tokens, params=params)
    check([choice["token_ids"] for choice in answer["choices"]], await scene.client.alone(tokens), "tokens")
    return f"equal; empty after {await scene.empty(seconds=10):.1f} s"


async def decode_aborted_while_parked(scene: Scene) -> str:
    """The client of decode goes away before prefill has begun; prefill comes later and is told."""
    sources = await scene.client.sources()
    tokens, room = prompt(300, 5200), new_room()
    params = {"do_remote_prefill": True, "kvbaton_room": room, "kvbaton_sources": sources}
    with contextlib.suppress(TimeoutError):
        await scene.client.complete(scene.decode.url, tokens, params=params, seconds=1.5)
    await scene.client.to_prefill(tokens, room)
    seconds = await scene.empty(seconds=10)
    await scene.serves()
    return f"empty after {seconds:.1f} s"


async def prefill_aborted(scene: Scene) -> str:
    """The client of prefill goes away while chunks are computed: decode computes."""
    sources = await scene.client.sources()
    for seed, patience in enumerate((0.05, 0.2, 0.5)):
        tokens, room = prompt(LONG, 5300 + seed), new_room()
        params = {"do_remote_prefill": True, "kvbaton_room": room, "kvbaton_sources": sources}
        decode = asyncio.create_task(scene.client.complete(scene.decode.url, tokens, params=params))
        with contextlib.suppress(TimeoutError):
            body = {"do_remote_decode": True, "kvbaton_room": room}
            await scene.client.complete(scene.prefill.url, tokens, count=1, params=body, seconds=patience)
        got = [choice["token_ids"] for choice in (await decode)["choices"]]
        check(got, await scene.client.alone(tokens), f"aborted after {patience} s")
    return f"3 of 3 equal; empty after {await scene.empty():.1f} s"


async def nobody_decodes(scene: Scene) -> str:
    """Prefill frees the blocks when nobody has come for them, and refuses whoever comes then."""
    tokens = prompt(300, 5400)
    params = await scene.client.to_prefill(tokens)
    seconds = await scene.empty(scene.prefill, seconds=60)
    started = time.monotonic()
    answer = await scene.client.complete(scene.decode.url, tokens, params=params)
    check([choice["token_ids"] for choice in answer["choices"]], await scene.client.alone(tokens), "tokens")
    return f"free after {seconds:.1f} s; asked then: equal after {time.monotonic() - started:.1f} s"


async def prefill_silent(scene: Scene) -> str:
    """Prefill's worker is stopped for 25 s in the middle: decode answers at once, keeps the blocks aside meanwhile."""
    sources = await scene.client.sources()
    tokens = prompt(LONG, 5500)
    worker = scene.prefill.worker()
    started = time.monotonic()
    call = asyncio.create_task(scene.client.concurrent(tokens, sources))
    await asyncio.sleep(0.5)
    worker.send_signal(signal.SIGSTOP)
    aside = 0.0
    room = new_room()
    params = {"do_remote_prefill": True, "kvbaton_room": room, "kvbaton_sources": sources}
    other = prompt(700, 5501)
    answer = await scene.client.complete(scene.decode.url, other, params=params)
    answered = time.monotonic() - started
    aside = await scene.decode.usage(scene.session)
    await asyncio.sleep(max(0.0, 25.0 - (time.monotonic() - started)))
    worker.send_signal(signal.SIGCONT)
    check([choice["token_ids"] for choice in answer["choices"]], await scene.client.alone(other), "tokens")
    check(await call, await scene.client.alone(tokens), "tokens")
    seconds = await scene.empty(seconds=60)
    await scene.serves()
    return (
        f"equal after {answered:.1f} s while stopped, {aside:.1%} of the blocks kept aside; empty after {seconds:.1f} s"
    )


async def decode_killed(scene: Scene) -> str:
    sources = await scene.client.sources()
    calls = [asyncio.create_task(scene.client.concurrent(prompt(LONG, 5600 + i), sources)) for i in range(4)]
    await asyncio.sleep(0.7)
    scene.decode.kill()
    await asyncio.gather(*calls, return_exceptions=True)
    seconds = await scene.empty(scene.prefill, seconds=60)
    await scene.again(scene.decode)
    tokens = prompt(500, 5610)
    check(await scene.client.sequential(tokens), await scene.client.alone(tokens), "afterwards")
    return f"prefill empty after {seconds:.1f} s; a new decode is served"


async def prefill_killed(scene: Scene) -> str:
    """Four rooms of 3,500 tokens in the middle: decode computes all."""
    sources = await scene.client.sources()
    prompts = [prompt(LONG, 5700 + i) for i in range(4)]
    answered = await scene.client.to_prefill(prompt(600, 5710))
    calls = [asyncio.create_task(scene.client.concurrent(tokens, sources)) for tokens in prompts]
    await asyncio.sleep(0.7)
    scene.prefill.kill()
    started = time.monotonic()
    got = await asyncio.gather(*calls)
    seconds = time.monotonic() - started
    for tokens, answer in zip(prompts, got, strict=True):
        check(answer, await scene.client.alone(tokens), "tokens")
    late = await scene.client.complete(scene.decode.url, prompt(600, 5710), params=answered)
    check(
        [c["token_ids"] for c in late["choices"]], await scene.client.alone(prompt(600, 5710)), "answered, then killed"
    )
    await scene.empty(scene.decode)
    await scene.again(scene.prefill)
    await scene.serves()
    return f"4 of 4 equal after {seconds:.1f} s; answered, then killed: equal; a new prefill serves"


async def preempted(scene: Scene) -> str:
    """Prefill has few blocks and decodes for others, so that it preempts: every answer is equal, or fails by name."""
    sources = await scene.client.sources()
    others = [
        asyncio.create_task(scene.client.complete(scene.prefill.url, prompt(300, 5800 + i), count=500, ignore_eos=True))
        for i in range(12)
    ]
    await asyncio.sleep(1.0)
    prompts = [prompt(700 + 11 * i, 5820 + i) for i in range(12)]
    got = await asyncio.gather(
        *(
            scene.client.sequential(tokens) if i % 2 else scene.client.concurrent(tokens, sources)
            for i, tokens in enumerate(prompts)
        )
    )
    for tokens, answer in zip(prompts, got, strict=True):
        check(answer, await scene.client.alone(tokens), f"{len(tokens)} tokens")
    await asyncio.gather(*others)
    values = await scene.prefill.metrics(scene.session)
    count = sum(value for name, value in values.items() if name.startswith("vllm:num_preemptions_total"))
    if not count:
        raise AssertionError("nothing was preempted")
    return f"{len(got)} of {len(got)} equal, {count:.0f} preemptions; empty after {await scene.empty():.1f} s"


async def typed_failure(scene: Scene) -> str:
    """Policy fail: an error within its deadline, with our reason in log and metric."""
    told = []
    for name, params in (
        ("dead address", {"kvbaton_room": new_room(), "kvbaton_sources": [DEAD]}),
        ("no room", {"kvbaton_sources": [DEAD]}),
    ):
        started = time.monotonic()
        try:
            await scene.client.complete(
                scene.decode.url, prompt(300, 5900), params={"do_remote_prefill": True, **params}
            )
        except Refused as error:
            told.append(f"{name}: HTTP {error.status} after {time.monotonic() - started:.1f} s")
        else:
            raise AssertionError(f"{name}: an answer although the policy is fail")
    seconds = await scene.empty()
    rooms = await scene.rooms(scene.decode)
    if not any(name.startswith("received") and "success" not in name for name in rooms):
        raise AssertionError(f"no metric tells the reason: {rooms}")
    await scene.serves()
    return f"{'; '.join(told)}; {rooms}; empty after {seconds:.1f} s"


async def through_the_router(scene: Scene) -> str:
    """The example's router in front of both, streaming and not, both flows."""
    said = []
    for flow in ("sequential", "concurrent"):
        app = VllmRouter(scene.prefill.url, scene.decode.url, flow).app()
        runner = web.AppRunner(app)
        await runner.setup()
        (port,) = free_ports(1)
        await web.TCPSite(runner, "127.0.0.1", port).start()
        try:
            url = f"http://127.0.0.1:{port}"
            prompts = [prompt(50 + 97 * i, 6100 + i) for i in range(12)]
            got = await asyncio.gather(*(scene.client.complete(url, tokens) for tokens in prompts))
            for tokens, answer in zip(prompts, got, strict=True):
                check(tokens_of(answer), await scene.client.alone(tokens), f"{flow}, {len(tokens)} tokens")
        finally:
            await runner.cleanup()
        said.append(f"{flow}: {len(prompts)} of {len(prompts)} equal")
    return f"{'; '.join(said)}; empty after {await scene.empty():.1f} s"


async def endurance(scene: Scene) -> str:
    """400 requests, 24 at a time, one in 20 given up: nothing is left, memory and threads stay."""
    sources = await scene.client.sources()
    chance = random.Random(7)
    doors = asyncio.Semaphore(24)
    workers = [server.worker() for server in scene.connected.values()]
    given_up = 0

    async def one(i: int) -> bool:
        tokens = prompt(chance.randrange(20, 900), 7000 + i)
        patience = chance.uniform(0.01, 0.3) if i % 20 == 0 else 120.0
        async with doors:
            try:
                if i % 2:
                    await scene.client.concurrent(tokens, sources, seconds=patience, count=2)
                else:
                    await scene.client.sequential(tokens, seconds=patience, count=2)
            except TimeoutError:
                return True
        return False

    memory, threads = [], []
    for start in range(0, 400, 100):
        given_up += sum(await asyncio.gather(*(one(i) for i in range(start, start + 100))))
        await scene.empty()
        memory.append(sum(worker.memory_info().rss for worker in workers) / 1e6)
        threads.append([worker.num_threads() for worker in workers])
    check(threads[-1], threads[1], "threads")
    if memory[-1] > memory[1] * 1.03:
        raise AssertionError(f"memory grows: {memory} MB")
    live = {
        name: value
        for server in scene.connected.values()
        for name, value in (await server.metrics(scene.session)).items()
        if name.startswith(("vllm:kvbaton_live_rooms", "vllm:kvbaton_quarantined_rooms")) and value
    }
    check(live, {}, "rooms left")
    sizes = " ".join(f"{size:.0f}" for size in memory)
    return f"400 requests, {given_up} given up; no room left, threads {threads[-1]}, memory {sizes} MB"


async def contract(scene: Scene) -> str:
    """One hand-off and one failure, alone: vLLM calls the connector as it did when the record was kept."""
    tokens = prompt(700, 6000)
    params = await scene.client.to_prefill(tokens)
    await scene.client.complete(scene.decode.url, tokens, count=1, params=params)
    dead = {"do_remote_prefill": True, "kvbaton_room": "5", "kvbaton_sources": [DEAD]}
    await scene.client.complete(scene.decode.url, prompt(300, 6001), count=1, params=dead)
    await scene.empty()
    found = {name: read(server.log.parent / f"calls-{name}") for name, server in scene.connected.items()}
    written = scene.prefill.log.parent / KEPT.name
    written.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
    kept = msgspec.json.decode(KEPT.read_bytes()) if KEPT.is_file() else {}
    if kept != found:
        raise AssertionError(f"vLLM calls otherwise than {KEPT.name} says: compare it with {written}")
    return f"{sum(len(half['life']) for side in found.values() for half in side.values())} calls as kept"


async def idle(scene: Scene) -> str:
    """CPU time of the workers when nothing happens, in parts of a core."""
    workers = [server.worker() for server in (scene.prefill, scene.decode)]
    await asyncio.sleep(2.0)
    before = [sum(worker.cpu_times()[:2]) for worker in workers]
    await asyncio.sleep(10.0)
    used = [(sum(worker.cpu_times()[:2]) - was) / 10.0 for worker, was in zip(workers, before, strict=True)]
    if max(used) > 0.05:
        raise AssertionError(f"{used} of a core")
    return " and ".join(f"{part:.1%}" for part in used) + " of a core"


async def metrics(scene: Scene) -> str:
    rooms = await scene.rooms(scene.decode)
    values = await scene.decode.metrics(scene.session)
    size = sum(value for name, value in values.items() if name.startswith("vllm:kvbaton_received_bytes_sum"))
    check(bool(rooms.get("received success")) and size > 0, True, f"{rooms}, {size} bytes")
    return f"{rooms}; {size:,.0f} bytes"

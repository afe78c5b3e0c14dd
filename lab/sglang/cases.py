"""The cases: each asks something of a scene and says in one line what came of it, or raises AssertionError."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from kvbaton.engines.sglang.metrics import NAME as EVENTS
from kvbaton.serving.fleet import free_ports
from lab.engines.campaign import check
from lab.engines.idle import idle_parts
from lab.engines.listeners import compared
from lab.engines.requests import Refused, prompt
from lab.programs import stop
from lab.sglang.contract import DIRECTORY, KEPT, read
from lab.sglang.requests import new_room
from lab.sglang.scene import Scene

#: Around one page of 16 tokens and chunks of 512.
LENGTHS = (5, 15, 16, 17, 100, 127, 511, 512, 513, 800, 1024, 1300)
LONG = 3500
#: From a kill of prefill to the answers of decode.
KILLED_SECONDS = 3.0
#: How long prefill waits for decode, and decode for what prefill sends, in scenes where one never comes.
PATIENCE: Mapping[str, float] = {"bootstrap_timeout": 15.0, "waiting_timeout": 30.0}
#: Most of a core that a scheduler may use when nothing happens, SGLang's own loop included.
IDLE_PART = 0.03


async def lengths(scene: Scene) -> str:
    """Each length alone."""
    for seed, length in enumerate(LENGTHS):
        tokens = prompt(length, seed)
        check(await scene.client.pair(tokens), await scene.client.alone(tokens), f"{length} tokens")
    return f"{len(LENGTHS)} of {len(LENGTHS)} equal; empty after {await scene.empty():.1f} s"


async def many_at_once(scene: Scene) -> str:
    """36 at a concurrency of 4, then of 8."""
    said = []
    for width in (4, 8):
        prompts = [prompt(40 + 35 * i, 1000 * width + i) for i in range(36)]
        said.append(await _equal(scene, scene.client.pair, prompts, width))
    return f"{'; '.join(said)}; empty after {await scene.empty():.1f} s"


async def _equal(
    scene: Scene, ask: Callable[[list[int]], Awaitable[list[int]]], prompts: Sequence[list[int]], width: int
) -> str:
    """So many of the prompts at a time. Raises AssertionError unless all answers are those of the plain instance."""
    doors = asyncio.Semaphore(width)

    async def one(tokens: list[int]) -> list[int]:
        async with doors:
            return await ask(tokens)

    got = await asyncio.gather(*(one(tokens) for tokens in prompts))
    equal = sum([answer == await scene.client.alone(tokens) for tokens, answer in zip(prompts, got, strict=True)])
    said = f"{width} at a time: {equal} of {len(prompts)} equal"
    check(equal, len(prompts), said)
    return said


async def prefix_hits(scene: Scene) -> str:
    """Decode holds 512 of 700 tokens, then all whole pages."""
    head = prompt(512, 3000)
    for seed in range(4):
        tokens = head + prompt(188, 3001 + seed)
        expected = await scene.client.alone(tokens)
        for turn in ("first", "second"):
            check(await scene.client.pair(tokens), expected, f"{turn} time")
    tokens = prompt(512, 3100)
    expected = await scene.client.alone(tokens)
    for turn in ("first", "second"):
        check(await scene.client.pair(tokens), expected, f"whole pages, {turn} time")
    return f"10 of 10 equal; empty after {await scene.empty():.1f} s"


#: Asks the server at a URL for the answer to token ids.
Asks = Callable[[str, Sequence[int]], Awaitable[list[int]]]


async def through_a_router(scene: Scene, name: str, command: list[str], asks: Asks) -> str:
    """12 prompts one after the other, then at a concurrency of 4 and of 8. ``name``: of its log."""
    (port,) = free_ports(1)
    log = Path(scene.prefill.log).with_name(f"{name}.log").open("wb")
    router = await asyncio.create_subprocess_exec(
        *command, "--host", "127.0.0.1", "--port", str(port), stdout=log, stderr=log
    )
    try:
        url = f"http://127.0.0.1:{port}"
        until = time.monotonic() + 120
        while True:
            try:
                await asyncio.wait_for(asks(url, prompt(20, 1)), 20)
                break
            except (aiohttp.ClientError, Refused, TimeoutError) as error:
                if time.monotonic() > until or router.returncode is not None:
                    raise AssertionError(f"the router does not serve: {error}; see {log.name}") from error
            await asyncio.sleep(0.5)
        ask = partial(asks, url)
        said = [
            await _equal(scene, ask, [prompt(50 + 97 * i, 6000 + 100 * width + i) for i in range(12)], width)
            for width in (1, 4, 8)
        ]
    finally:
        await stop(router)
        log.close()
    return f"{'; '.join(said)}; empty after {await scene.empty():.1f} s"


async def through_sglang_router(scene: Scene) -> str:
    """sglang-router 0.3.2 in front of both, by SGLang's route: a completion of token ids is 422 to it."""
    (metrics,) = free_ports(1)
    return await through_a_router(
        scene,
        "sglang-router",
        [
            *(str(scene.prefill.python), "-m", "sglang_router.launch_router", "--pd-disaggregation"),
            *("--prometheus-port", str(metrics)),
            *("--prefill", scene.prefill.url, str(scene.prefill.bootstrap_port), "--decode", scene.decode.url),
        ],
        scene.client.generate,
    )


async def duplicate_room(scene: Scene) -> str:
    """Two requests with one room: one of them at least is answered or refused by name, nobody dies."""
    tokens, room = prompt(900, 4000), new_room()
    expected = await scene.client.alone(tokens)
    got = await asyncio.gather(
        scene.client.pair(tokens, room=room, seconds=60),
        scene.client.pair(tokens, room=room, seconds=60),
        return_exceptions=True,
    )
    for answer in got:
        if isinstance(answer, list):
            check(answer, expected, "tokens")
    seconds = await scene.empty()
    check(await scene.client.pair(tokens), expected, "afterwards")
    return f"{[_short(answer) for answer in got]}; empty after {seconds:.1f} s"


async def memory_released(scene: Scene) -> str:
    """Both let go of their cache's memory and take it up again, as for a trainer that shares the device: the peers
    stay, the next requests are equal."""
    tokens = prompt(600, 5950)
    expected = await scene.client.alone(tokens)
    check(await scene.client.pair(tokens), expected, "before")
    for server in (scene.prefill, scene.decode):
        await scene.empty()
        for route in ("release_memory_occupation", "resume_memory_occupation"):
            async with scene.session.post(f"{server.url}/{route}", json={"tags": ["kv_cache"]}) as answer:
                check(answer.status, 200, f"{server.name} {route}")
        check(await scene.client.pair(tokens), expected, f"after that of {server.name}")
    return f"3 of 3 equal; empty after {await scene.empty():.1f} s"


async def contract(scene: Scene) -> str:
    """One hand-off and two halves of a request, on recording servers: the calls that SGLang makes are those that are
    kept."""
    await scene.client.pair(prompt(700, 5900))
    for server in (scene.prefill, scene.decode):
        with contextlib.suppress(TimeoutError):
            await scene.client.generate(server.url, prompt(300, 5901), seconds=2, **scene.client.place(new_room()))
        await scene.empty()
    directory = Path(scene.prefill.environment[DIRECTORY])
    record = read(directory)
    found = msgspec.json.format(msgspec.json.encode(record), indent=1)
    (directory / "found.json").write_bytes(found)
    if not KEPT.is_file():
        KEPT.write_bytes(found + b"\n")
    check(record, msgspec.json.decode(KEPT.read_bytes()), f"calls (see {directory / 'found.json'})")
    return f"{sum(len(calls) for half in record.values() for calls in half)} calls as kept"


async def listeners(scene: Scene) -> str:
    """Servers of loopback listen there alone, but for what SGLang opens by itself, in a plain server too."""
    tokens = prompt(300, 5950)
    check(await scene.client.pair(tokens), await scene.client.alone(tokens), "tokens")
    return compared(scene.plain, scene.prefill, scene.decode)


async def strangers(scene: Scene) -> str:
    """Who does not know the secret is told nothing by the bootstrap server, and registers nothing."""
    url = f"http://127.0.0.1:{scene.prefill.bootstrap_port}"
    query = "prefill_dp_rank=0&prefill_cp_rank=0&target_tp_rank=0&target_pp_rank=0"
    said = []
    for method, path, body in (
        ("GET", f"/route?{query}", None),
        ("PUT", "/route", {"rank_ip": "127.0.0.1", "rank_port": 9}),
        ("POST", "/register_dp_rank", {"bootstrap_room": 1, "dp_rank": 0}),
    ):
        async with scene.session.request(method, url + path, json=body) as answer:
            check(answer.status, 401, f"{method} {path}")
            said.append(f"{method} {path.partition('?')[0]} {answer.status}")
    async with scene.session.get(f"{url}/health") as answer:
        check(answer.status, 200, "/health")
    return ", ".join(said)


async def client_gone(scene: Scene) -> str:
    """Half a request, whose client goes away: on prefill, then on decode."""
    said = []
    for name, server in (("prefill", scene.prefill), ("decode", scene.decode)):
        with contextlib.suppress(TimeoutError):
            await scene.client.generate(server.url, prompt(600, 5000), seconds=2, **scene.client.place(new_room()))
            raise AssertionError(f"{name} answered alone")
        said.append(f"{name} alone: empty after {await scene.empty():.1f} s")
    tokens = prompt(600, 5001)
    check(await scene.client.pair(tokens), await scene.client.alone(tokens), "afterwards")
    return "; ".join(said)


async def nobody_comes(scene: Scene) -> str:
    """Half a request whose client waits for as long as it takes, on each side: an error at the side's own deadline."""
    said = []
    for server, patience in ((scene.prefill, "bootstrap_timeout"), (scene.decode, "waiting_timeout")):
        started = time.monotonic()
        answer = scene.client.generate(server.url, prompt(600, 5100), seconds=60, **scene.client.place(new_room()))
        (error,) = await asyncio.gather(answer, return_exceptions=True)
        told = f"{server.name} alone, after {time.monotonic() - started:.1f} s: {_short(error)}"
        if not isinstance(error, Refused) or time.monotonic() - started > PATIENCE[patience] + 5:
            raise AssertionError(told)
        said.append(f"{told}, empty after {await scene.empty():.1f} s")
    return "; ".join(said)


async def aborts(scene: Scene) -> str:
    """200 requests, 8 at a time, 30 % of the clients go away: nothing is left."""
    chance = random.Random(7)
    doors = asyncio.Semaphore(8)

    async def one(i: int) -> bool:
        tokens = prompt(chance.randrange(20, 1300), 7000 + i)
        patience = chance.uniform(0.01, 0.6) if chance.random() < 0.3 else 240.0
        async with doors:
            try:
                await scene.client.pair(tokens, seconds=patience, count=4)
            except TimeoutError:
                return True
        return False

    given_up = sum(await asyncio.gather(*(one(i) for i in range(200))))
    seconds = await scene.empty()
    for seed, length in enumerate(LENGTHS):
        tokens = prompt(length, 7900 + seed)
        check(await scene.client.pair(tokens), await scene.client.alone(tokens), f"{length} tokens afterwards")
    return f"{given_up} of 200 given up; empty after {seconds:.1f} s; {len(LENGTHS)} of {len(LENGTHS)} equal afterwards"


async def prefill_killed(scene: Scene) -> str:
    """Eight rooms of 3,500 tokens in the middle, prefill is killed; then it is started again on the same ports."""
    calls = [asyncio.create_task(scene.client.pair(prompt(LONG, 5700 + i), seconds=100)) for i in range(8)]
    await asyncio.sleep(1.5)
    waiting = sum(not call.done() for call in calls)
    if not waiting:
        raise AssertionError("all were answered before the kill")
    killed = time.monotonic()
    scene.prefill.kill()
    got = await asyncio.gather(*calls, return_exceptions=True)
    seconds = time.monotonic() - killed
    told = {_short(answer) for answer in got if isinstance(answer, Exception)}
    if seconds > KILLED_SECONDS:
        raise AssertionError(f"decode answers after {seconds:.1f} s: {told}")
    free = await scene.empty(scene.decode)
    await scene.again(scene.prefill)
    tokens = prompt(600, 5790)
    started = time.monotonic()
    check(await scene.client.pair(tokens), await scene.client.alone(tokens), "after the restart")
    return (
        f"{waiting} rooms answered after {seconds:.1f} s ({'; '.join(sorted(told))[:160]}), free after {free:.1f} s; "
        f"the first request after the restart is equal, {time.monotonic() - started:.1f} s"
    )


async def decode_killed(scene: Scene) -> str:
    """Four rooms of 3,500 tokens in the middle, decode is killed; then it is started again."""
    calls = [asyncio.create_task(scene.client.pair(prompt(LONG, 5600 + i), seconds=60)) for i in range(4)]
    await asyncio.sleep(1.0)
    scene.decode.kill()
    await asyncio.gather(*calls, return_exceptions=True)
    seconds = await scene.empty(scene.prefill, seconds=60)
    await scene.again(scene.decode)
    tokens = prompt(500, 5610)
    check(await scene.client.pair(tokens), await scene.client.alone(tokens), "afterwards")
    return f"prefill empty after {seconds:.1f} s; a new decode is served"


async def retraction(scene: Scene) -> str:
    """Decode's pool is short: requests are retracted and resumed, answers stay equal."""
    prompts = [prompt(300 + 10 * i, 8000 + i) for i in range(8)]
    got = await asyncio.gather(*(scene.client.pair(tokens, count=200) for tokens in prompts))
    equal = sum(
        [answer == await scene.client.alone(tokens, count=200) for tokens, answer in zip(prompts, got, strict=True)]
    )
    check(equal, len(prompts), "equal")
    values = await scene.decode.sums(scene.session)
    count = values.get("sglang:num_retracted_requests_total", 0.0)
    if not count:
        raise AssertionError("nothing was retracted")
    return f"{equal} of {len(prompts)} equal, {count:.0f} retractions; empty after {await scene.empty():.1f} s"


async def metrics(scene: Scene) -> str:
    """SGLang's own metrics of hand-offs are fed, and ours are beside them."""
    await scene.client.pair(prompt(300, 5990))
    await scene.empty()
    values = await scene.prefill.sums(scene.session)
    found = {
        name: values[name] for name in sorted(values) if "kv_transfer" in name and name.endswith(("_sum", "_count"))
    }
    found["writes_posted"] = await _counted(scene, "writes_posted")
    if not (found["writes_posted"] and any("kv_transfer" in name for name in found)):
        raise AssertionError(f"nothing is measured: {found}")
    return ", ".join(f"{name.removeprefix('sglang:')} {value:.3g}" for name, value in found.items())


async def staged(scene: Scene) -> str:
    """Small pieces have travelled together, as prefill's ranks counted it."""
    posted, together = await _counted(scene, "writes_posted"), await _counted(scene, "writes_staged")
    if not together:
        raise AssertionError(f"none of {posted:.0f} writes went through staging")
    return f"{together:.0f} of {posted:.0f} writes"


async def _counted(scene: Scene, event: str) -> float:
    """What prefill's ranks have counted of it."""
    return (await scene.prefill.metrics(scene.session)).get(f'{EVENTS}_total{{event="{event}"}}', 0.0)


async def idle(scene: Scene) -> str:
    """Processor time of the schedulers while nothing happens."""
    await scene.empty()
    watched = {
        f"{name} {i}": process
        for name, server in (("prefill", scene.prefill), ("decode", scene.decode), ("plain", scene.plain))
        for i, process in enumerate(server.schedulers())
    }
    used = dict(zip(watched, await idle_parts(list(watched.values())), strict=True))
    if any(share > IDLE_PART for name, share in used.items() if not name.startswith("plain")):
        raise AssertionError(f"cores in use while idle: {used}")
    return ", ".join(f"{name}: {share:.1%} of a core" for name, share in used.items())


def _short(answer: Any) -> str:
    if isinstance(answer, list):
        return "answered"
    text = str(answer)
    for mark in ("with exception", "message"):
        text = text.rpartition(mark)[2]
    return f"{type(answer).__name__} {getattr(answer, 'status', '')}: {text.strip()[:140]}"


PYTHON = sys.executable


async def through_our_router(scene: Scene) -> str:
    """kvbaton's router in front of both."""
    return await through_a_router(
        scene,
        "kvbaton-router",
        [
            *(PYTHON, "-m", "kvbaton.cli.main", "router", "--pd-disaggregation", "--engine", "sglang"),
            *("--prefill", scene.prefill.url, str(scene.prefill.bootstrap_port), "--decode", scene.decode.url),
        ],
        scene.client.complete,
    )

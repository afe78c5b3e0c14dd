"""Cases of a running pair as a whole: behind a router, for long, idle, its metrics, the calls that vLLM makes."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

from kvbaton.serving.fleet import free_ports
from kvbaton.serving.router.router import Router, RouterConfig
from kvbaton.serving.router.worker import Worker
from lab.engines.campaign import check
from lab.engines.idle import idle_parts
from lab.engines.listeners import compared
from lab.engines.requests import prompt
from lab.engines.server import READY_SECONDS
from lab.programs import output, stop
from lab.vllm.contract import KEPT, read
from lab.vllm.failures import DEAD
from lab.vllm.requests import tokens_of
from lab.vllm.scene import Scene
from lab.vllm.server import VllmServer

#: Requests of the long case, and how many are counted at a time; one in ``GIVEN_UP`` is.
REQUESTS, COUNTED, GIVEN_UP = 1000, 250, 20
#: Most of a core that a worker may use when nothing happens.
IDLE_PART = 0.02
#: What vLLM's own benchmark sends: requests, at once, tokens of the prompt, tokens of the answer.
BENCH = (200, 8, 300, 8)
BENCH_SECONDS = 600.0
#: `kvbaton check` has looked at both sides by then.
CHECK_SECONDS = 60.0


@contextlib.asynccontextmanager
async def _routed(scene: Scene) -> AsyncIterator[str]:
    """The address of our router in front of both."""
    workers = (Worker("prefill", scene.prefill.url), Worker("decode", scene.decode.url))
    router = Router(RouterConfig(workers=workers, engine="vllm"))
    runner = web.AppRunner(router.app)
    await runner.setup()
    (port,) = free_ports(1)
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        await router.workers.probe_all()
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()


async def through_the_router(scene: Scene) -> str:
    """Our router in front of both: the first request one server after the other, the others both at once."""
    prompts = [prompt(50 + 97 * i, 6100 + i) for i in range(12)]
    async with _routed(scene) as url:
        got = [await scene.client.complete(url, prompts[0])]
        got += await asyncio.gather(*(scene.client.complete(url, tokens) for tokens in prompts[1:]))
    for tokens, answer in zip(prompts, got, strict=True):
        check(tokens_of(answer), await scene.client.alone(tokens), f"{len(tokens)} tokens")
    return f"{len(prompts)} of {len(prompts)} equal; empty after {await scene.empty():.1f} s"


async def layouts(scene: Scene) -> str:
    """``kvbaton check`` judges the running pair, and says by name why its prefill cannot hand over to our engine, nor
    ours to its decode."""
    theirs = {name: _control_addresses(server) for name, server in scene.connected.items()}
    check(sorted(theirs["prefill"].split(",")), sorted(await scene.client.sources()), "addresses in the log")
    check((await _checked(theirs["prefill"], theirs["decode"]))["compatible"], True, "vLLM to vLLM")
    (port,) = free_ports(1)
    ours = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "kvbaton.cli.main", "serve", "--model", str(scene.prefill.model)),
        *("--disaggregation-mode", "decode", "--port", str(port), "--disaggregation-transfer-backend", "nixl"),
        *("--dtype", "float32"),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        await _until_answered(scene, f"{url}/layout", ours)
        found = [await _checked(theirs["prefill"], url), await _checked(url, theirs["decode"])]
    finally:
        await stop(ours)
    said = []
    for name, verdict in zip(("vLLM to ours", "ours to vLLM"), found, strict=True):
        fields = [one["field"] for one in verdict["differences"]]
        check((verdict["compatible"], "kv.packing" in fields), (False, True), f"{name}: {fields}")
        said.append(f"{name}: {', '.join(fields)}")
    return f"vLLM to vLLM compatible; {'; '.join(said)}"[:900]


def _control_addresses(server: VllmServer) -> str:
    """Of all ranks, from its log."""
    found = re.findall(r"kvbaton rank pp \d+ tp \d+ at (tcp://\S+)", server.log.read_text(errors="replace"))
    return ",".join(found[-server.ranks :])


async def _checked(prefill: str, decode: str) -> Any:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "kvbaton.cli.main", "check", "--json", prefill, decode),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    told, wrong = await output(process, CHECK_SECONDS)
    if not told:
        raise AssertionError(f"kvbaton check {prefill} {decode}: {wrong.decode(errors='replace')[-300:]}")
    return msgspec.json.decode(told)


async def _until_answered(scene: Scene, url: str, process: asyncio.subprocess.Process) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.returncode is None:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with scene.session.get(url, timeout=aiohttp.ClientTimeout(total=5)) as answer:
                if answer.status == 200:
                    return
        await asyncio.sleep(0.5)
    raise AssertionError(f"{url} does not answer; exit {process.returncode}")


async def bench_serve(scene: Scene) -> str:
    """``vllm bench serve`` through our router: no request fails."""
    count, at_once, size, answer = BENCH
    written = scene.prefill.log.parent / "bench_serve.json"
    written.unlink(missing_ok=True)
    async with _routed(scene) as url:
        process = await asyncio.create_subprocess_exec(
            *(str(scene.prefill.python.parent / "vllm"), "bench", "serve", "--backend", "openai"),
            *("--base-url", url, "--endpoint", "/v1/completions"),
            *("--model", "m", "--tokenizer", str(scene.prefill.model), "--dataset-name", "random"),
            *("--random-input-len", str(size), "--random-output-len", str(answer), "--random-range-ratio", "0.5"),
            *("--num-prompts", str(count), "--max-concurrency", str(at_once), "--ignore-eos", "--disable-tqdm"),
            *("--save-result", "--result-dir", str(written.parent), "--result-filename", written.name),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=scene.prefill.variables,
        )
        try:
            said, _ = await asyncio.wait_for(process.communicate(), BENCH_SECONDS)
        finally:
            if process.returncode is None:
                process.kill()
    if process.returncode or not written.is_file():
        raise AssertionError(f"it ended with {process.returncode}: {said.decode(errors='replace')[-500:]}")
    found = msgspec.json.decode(written.read_bytes())
    check((found["completed"], found["failed"]), (count, 0), "completed and failed")
    rooms = await scene.rooms(scene.decode)
    return (
        f"{count} completed, 0 failed, {at_once} at once, {found['request_throughput']:.1f} a second, "
        f"TTFT {found['median_ttft_ms']:.0f} ms; {rooms}; empty after {await scene.empty():.1f} s"
    )


async def endurance(scene: Scene) -> str:
    """1,000 requests, 24 at a time, one in 20 given up: nothing is left, memory and threads stay."""
    sources = await scene.client.sources()
    chance = random.Random(7)
    doors = asyncio.Semaphore(24)
    workers = [server.worker() for server in scene.connected.values()]
    given_up = 0

    async def one(i: int) -> bool:
        tokens = prompt(chance.randrange(20, 900), 7000 + i)
        patience = chance.uniform(0.01, 0.3) if i % GIVEN_UP == 0 else 120.0
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
    for start in range(0, REQUESTS, COUNTED):
        given_up += sum(await asyncio.gather(*(one(i) for i in range(start, start + COUNTED))))
        await scene.empty()
        memory.append(sum(worker.memory_info().rss for worker in workers) / 1e6)
        threads.append([worker.num_threads() for worker in workers])
    check(threads[-1], threads[1], "threads")
    if memory[-1] > memory[1] * 1.03:
        raise AssertionError(f"memory grows: {memory} MB")
    for server in scene.connected.values():  # gauges are as of the last step: let there be one
        await asyncio.sleep(1.0)
        await scene.client.complete(server.url, prompt(40, 9), count=1)
    live = {
        f"{server.name} {name}": value
        for server in scene.connected.values()
        for name, value in (await server.metrics(scene.session)).items()
        if name.startswith(("vllm:kvbaton_live_rooms", "vllm:kvbaton_quarantined_rooms")) and value
    }
    check(live, {}, "rooms left")
    sizes = " ".join(f"{size:.0f}" for size in memory)
    return f"{REQUESTS} requests, {given_up} given up; no room left, threads {threads[-1]}, memory {sizes} MB"


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
    used = await idle_parts([server.worker() for server in scene.connected.values()])
    if max(used) > IDLE_PART:
        raise AssertionError(f"{used} of a core")
    return " and ".join(f"{part:.1%}" for part in used) + " of a core"


async def listeners(scene: Scene) -> str:
    """Servers of loopback listen there alone, but for what vLLM opens by itself."""
    given = prompt(300, 6400)
    check(await scene.client.sequential(given), await scene.client.alone(given), "tokens")
    return compared(scene.plain, scene.prefill, scene.decode)


async def metrics(scene: Scene) -> str:
    rooms = await scene.rooms(scene.decode)
    values = await scene.decode.metrics(scene.session)
    size = sum(value for name, value in values.items() if name.startswith("vllm:kvbaton_received_bytes_sum"))
    check(bool(rooms.get("received success")) and size > 0, True, f"{rooms}, {size} bytes")
    return f"{rooms}; {size:,.0f} bytes"

"""Cases under ``kv_load_failure_policy: fail``: whatever goes wrong, decode's request ends with an error within its
deadline, the reason is in decode's log and metric, no block is left on either side, and both serve on."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from lab.engines.campaign import check
from lab.engines.requests import Refused, prompt
from lab.vllm.failures import DEAD, LONG
from lab.vllm.requests import new_room
from lab.vllm.scene import Scene

#: Seconds within which ends what waits for nobody, and what waits for the heartbeats of a silent peer (10 to 15 s).
SECONDS, SILENT_SECONDS = 5.0, 17.0
#: A worker that is stopped goes on after so long.
STOPPED_SECONDS = 25.0
#: How long the metric may lag behind the answer: vLLM carries it with a step.
METRIC_SECONDS = 5.0
_REASON = re.compile(r"ERROR .*\[worker\.py:\d+\] request \S+?(?:, room \d+)?(?: receives nothing)?: (.*)")

Call = Awaitable[dict[str, Any]]


async def nobody_at_the_address(scene: Scene) -> str:
    return await _fails(scene, _decode(scene, prompt(300, 5900), new_room(), [DEAD]))


async def no_room(scene: Scene) -> str:
    params = {"do_remote_prefill": True, "kvbaton_sources": [DEAD]}
    return await _fails(scene, scene.client.complete(scene.decode.url, prompt(300, 5901), params=params))


async def prompts_differ(scene: Scene) -> str:
    params = await scene.client.to_prefill(prompt(300, 5902))
    return await _fails(scene, scene.client.complete(scene.decode.url, prompt(400, 5903), params=params))


async def decode_comes_too_late(scene: Scene) -> str:
    """Prefill has freed the blocks because nobody came for them."""
    tokens = prompt(300, 5904)
    params = await scene.client.to_prefill(tokens)
    await scene.empty(scene.prefill, seconds=60)
    return await _fails(scene, scene.client.complete(scene.decode.url, tokens, params=params))


async def prefill_is_aborted(scene: Scene) -> str:
    """Its client goes away while chunks are computed: of prompts that came before, so that it is never too late."""
    sources = await scene.client.sources()
    async with contextlib.AsyncExitStack() as stack:
        for seed in range(5912, 5915):
            await stack.enter_async_context(_under_way(scene, seed, sources))
        call = await stack.enter_async_context(_under_way(scene, 5905, sources, patience=0.4))
        return await _fails(scene, call)


async def prefill_stands_still(scene: Scene) -> str:
    """The answer does not wait for its worker, which goes on later; until then the blocks are kept aside. Of prompts
    that came before some may have been handed over by then."""
    worker, sources = scene.prefill.worker(), await scene.client.sources()
    async with contextlib.AsyncExitStack() as stack:
        for seed in range(5915, 5918):
            await stack.enter_async_context(_under_way(scene, seed, sources))
        call = await stack.enter_async_context(_under_way(scene, 5906, sources))
        await asyncio.sleep(0.5)
        worker.send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        try:
            told = await _end(scene, [call], SILENT_SECONDS, alone=False)
            aside = await scene.decode.usage(scene.session)
            await asyncio.sleep(max(0.0, stopped + STOPPED_SECONDS - time.monotonic()))
        finally:
            worker.send_signal(signal.SIGCONT)
    return f"{told}; {aside:.1%} of the blocks kept aside while it stood; {await _recovered(scene)}"


async def prefill_is_killed(scene: Scene) -> str:
    """Four rooms in the middle, and one that it had answered."""
    tokens = prompt(600, 5911)
    params = await scene.client.to_prefill(tokens)
    sources = await scene.client.sources()
    async with contextlib.AsyncExitStack() as stack:
        calls = [await stack.enter_async_context(_under_way(scene, 5907 + i, sources)) for i in range(4)]
        await asyncio.sleep(0.3)  # the first of them has been computed after about 0.6 s
        told = await _end(scene, calls, fault=scene.prefill.kill)
    late = await _end(scene, [scene.client.complete(scene.decode.url, tokens, params=params)])
    await scene.empty(scene.decode)
    await scene.again(scene.prefill)
    return f"in the middle: {told}; answered, then killed: {late}; {await _recovered(scene)}"


def _decode(scene: Scene, tokens: Sequence[int], room: str, sources: Sequence[str]) -> Call:
    params = {"do_remote_prefill": True, "kvbaton_room": room, "kvbaton_sources": list(sources)}
    return scene.client.complete(scene.decode.url, tokens, params=params)


@contextlib.asynccontextmanager
async def _under_way(
    scene: Scene, seed: int, sources: Sequence[str], *, patience: float = 120.0
) -> AsyncIterator[Call]:
    """Decode's leg of a long prompt, of which prefill's leg runs as well, for ``patience`` seconds at most."""
    tokens, room = prompt(LONG, seed), new_room()
    decode = asyncio.ensure_future(_decode(scene, tokens, room, sources))
    own = {"do_remote_decode": True, "kvbaton_room": room}
    prefill = asyncio.create_task(
        scene.client.complete(scene.prefill.url, tokens, count=1, params=own, seconds=patience)
    )
    try:
        yield decode
    finally:
        await asyncio.gather(decode, prefill, return_exceptions=True)


async def _fails(scene: Scene, call: Call) -> str:
    return f"{await _end(scene, [call])}; {await _recovered(scene)}"


async def _end(
    scene: Scene,
    calls: Sequence[Call],
    seconds: float = SECONDS,
    *,
    fault: Callable[[], None] = lambda: None,
    alone: bool = True,
) -> str:
    """What all calls end with, within ``seconds`` of ``fault``: status, our reason in decode's log, as many in its
    metric. ``alone``: nothing else fails meanwhile."""
    before, read = await _failed(scene), scene.decode.log.stat().st_size
    fault()
    started = time.monotonic()
    ended = await asyncio.gather(*(_status(call, seconds) for call in calls))
    took = time.monotonic() - started
    log = scene.decode.log.read_bytes()[read:].decode(errors="replace")
    reasons = _REASON.findall(log)
    check(len(reasons) if alone else min(len(reasons), len(calls)), len(calls), f"{ended}, reasons in decode's log")
    until = time.monotonic() + METRIC_SECONDS
    while sum((now := await _failed(scene)).values()) < sum(before.values()) + len(calls):
        if time.monotonic() > until:
            raise AssertionError(f"{ended}, but no metric has counted {reasons[-1]!r}: {now}")
        await asyncio.sleep(0.1)
    codes = [f"{code} {now[code] - before.get(code, 0):.0f}" for code in now if now[code] > before.get(code, 0)]
    return f"HTTP {ended[0]} after {took:.1f} s, {', '.join(codes)}: {reasons[-1]}"


async def _status(call: Call, seconds: float) -> int:
    """Of the error that a call ends with."""
    try:
        await asyncio.wait_for(asyncio.shield(call), seconds)
    except Refused as error:
        return error.status
    except TimeoutError:
        raise AssertionError(f"no answer within {seconds:g} s") from None
    raise AssertionError("an answer although the policy is fail")


async def _failed(scene: Scene) -> dict[str, float]:
    """Rooms of decode that have failed, by code."""
    rooms = await scene.rooms(scene.decode)
    counted = {name.removeprefix("received "): value for name, value in rooms.items() if name.startswith("received ")}
    return {code: value for code, value in counted.items() if code != "success"}


async def _recovered(scene: Scene) -> str:
    seconds = await scene.empty(seconds=60)
    await scene.serves()
    return f"empty after {seconds:.1f} s, serves on"

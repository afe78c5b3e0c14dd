"""Cases of failure: processes killed and stopped, requests aborted and wrong, blocks short."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Sequence
from typing import Any

from lab.engines.campaign import check
from lab.engines.requests import prompt
from lab.vllm.requests import new_room, tokens_of
from lab.vllm.scene import Scene

#: Tokens of a prompt that takes several steps.
LONG = 3500
#: An address where nobody listens.
DEAD = "tcp://127.0.0.1:9"


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
        check(tokens_of(answer), expected, str(params))
    await scene.client.complete(
        scene.prefill.url, tokens, count=1, params={"do_remote_decode": True, "kvbaton_room": 7}
    )
    return f"{len(wrong)} of {len(wrong)} computed; empty after {await scene.empty():.1f} s"


async def dead_address(scene: Scene) -> str:
    tokens = prompt(300, 5000)
    params = {"do_remote_prefill": True, "kvbaton_room": new_room(), "kvbaton_sources": [DEAD]}
    started = time.monotonic()
    answer = await scene.client.complete(scene.decode.url, tokens, params=params)
    check(tokens_of(answer), await scene.client.alone(tokens), "tokens")
    return f"equal after {time.monotonic() - started:.1f} s; empty after {await scene.empty():.1f} s"


async def other_prompt(scene: Scene) -> str:
    params = await scene.client.to_prefill(prompt(300, 5100))
    tokens = prompt(400, 5101)
    answer = await scene.client.complete(scene.decode.url, tokens, params=params)
    check(tokens_of(answer), await scene.client.alone(tokens), "tokens")
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
        got = tokens_of(await decode)
        check(got, await scene.client.alone(tokens), f"aborted after {patience} s")
    return f"3 of 3 equal; empty after {await scene.empty():.1f} s"


async def nobody_decodes(scene: Scene) -> str:
    """Prefill frees the blocks when nobody has come for them, and refuses whoever comes then."""
    tokens = prompt(300, 5400)
    params = await scene.client.to_prefill(tokens)
    seconds = await scene.empty(scene.prefill, seconds=60)
    started = time.monotonic()
    answer = await scene.client.complete(scene.decode.url, tokens, params=params)
    check(tokens_of(answer), await scene.client.alone(tokens), "tokens")
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
    check(tokens_of(answer), await scene.client.alone(other), "tokens")
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
    check(tokens_of(late), await scene.client.alone(prompt(600, 5710)), "answered, then killed")
    await scene.empty(scene.decode)
    await scene.again(scene.prefill)
    await scene.serves()
    return f"4 of 4 equal after {seconds:.1f} s; answered, then killed: equal; a new prefill serves"


async def preempted(scene: Scene) -> str:
    """Prefill has few blocks and decodes for others, so that it preempts: every answer is equal, and decode, which has
    received every prompt, has not noticed."""
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
    rooms = await scene.rooms(scene.decode)
    check({name: number for name, number in rooms.items() if "success" not in name and number}, {}, "failed on decode")
    return f"{len(got)} of {len(got)} equal, {count:.0f} preemptions; empty after {await scene.empty():.1f} s"

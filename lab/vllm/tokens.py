"""Cases of right answers: tokens equal to one plain instance, in both flows."""

from __future__ import annotations

import asyncio

from lab.engines.campaign import check
from lab.engines.requests import Refused, prompt
from lab.vllm.requests import tokens_of
from lab.vllm.scene import Scene

#: Around one, two and three blocks, where windows have their edges; and several chunks of 512 tokens.
LENGTHS = (1, 2, 127, 128, 129, 254, 255, 256, 257, 383, 384, 511, 512, 639, 1023, 1800)


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
    return await _at_once(scene, 48)


async def some_at_once(scene: Scene) -> str:
    """12 together: where ranks share two cores, more take minutes."""
    return await _at_once(scene, 12)


async def _at_once(scene: Scene, count: int) -> str:
    sources = await scene.client.sources()
    prompts = [prompt(60 + 41 * i, 2000 + i) for i in range(count)]
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
        check(tokens_of(answer), expected, turn)
    return f"both equal; empty after {await scene.empty():.1f} s"


async def logprobs_of_the_prompt(scene: Scene) -> str:
    """Decode must not use any cache: prefill is let go."""
    tokens = prompt(300, 4200)
    params = await scene.client.to_prefill(tokens)
    answer = await scene.client.complete(scene.decode.url, tokens, params=params, prompt_logprobs=1, seconds=240)
    check(tokens_of(answer), await scene.client.alone(tokens), "tokens")
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

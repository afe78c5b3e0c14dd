"""Requests whose answers are known, asked in numbers: what came back, and how long a stream stood still."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec

from kvbaton.serving.demo.show import JSON
from kvbaton.serving.evaluation.recall import make_prompts

#: Distinct questions, half of them greedy, the others with a seed.
QUESTIONS = 40
#: An answer that is not here by then hangs.
PATIENCE_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """A request's body, and the tokens that the single process answers it with."""

    body: dict[str, Any]
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of one request. ``pause_seconds``: the longest time between two events of its stream."""

    error: str = ""
    pause_seconds: float = 0.0


async def expectations(
    http: aiohttp.ClientSession, url: str, *, max_tokens: int, count: int = QUESTIONS
) -> list[Expected]:
    """Ask the single process."""

    async def one(number: int, prompt: str) -> Expected:
        how = {"temperature": 0.0} if number % 2 == 0 else {"temperature": 1.2, "top_p": 0.95, "seed": number}
        body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "return_token_ids": True, **how}
        async with http.post(f"{url}/v1/completions", data=msgspec.json.encode(body), headers=JSON) as response:
            answer = msgspec.json.decode(await response.read())
        return Expected(body=body, tokens=tuple(answer["choices"][0]["token_ids"]))

    prompts = make_prompts(count, seed=21)
    return list(await asyncio.gather(*(one(number, prompt.prompt) for number, prompt in enumerate(prompts))))


async def ask(http: aiohttp.ClientSession, url: str, expected: Expected, *, stream: bool) -> Outcome:
    """One request, judged."""
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            tokens, pause, error = await _answer(http, url, {**expected.body, "stream": stream})
    except TimeoutError:
        return Outcome(error=f"no answer within {PATIENCE_SECONDS:g} s")
    except (aiohttp.ClientError, OSError) as failure:
        return Outcome(error=f"{type(failure).__name__}: {failure}")
    if not error and tokens != expected.tokens:
        error = f"other tokens: {tokens} instead of {expected.tokens}"
    return Outcome(error=error, pause_seconds=pause)


async def _answer(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> tuple[tuple[int, ...], float, str]:
    tokens: list[int] = []
    pause, last, is_done = 0.0, None, False
    async with http.post(f"{url}/v1/completions", data=msgspec.json.encode(body), headers=JSON) as response:
        if response.status != 200:
            return (), 0.0, f"HTTP {response.status}: {(await response.text())[:300]}"
        if not body["stream"]:
            return tuple(msgspec.json.decode(await response.read())["choices"][0]["token_ids"]), 0.0, ""
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            now = time.monotonic()
            pause, last = max(pause, now - last if last is not None else 0.0), now
            if line.strip() == b"data: [DONE]":
                is_done = True
                continue
            event = msgspec.json.decode(line[len(b"data: ") :])
            if "error" in event:
                return (), pause, f"an error event: {event['error']['message'][:300]}"
            tokens += event["choices"][0]["token_ids"]
    return tuple(tokens), pause, "" if is_done else "the stream has no end"


async def run_load(
    ask_one: Callable[[Expected, bool], Awaitable[Outcome]],
    expected: Sequence[Expected],
    requests: int,
    concurrency: int,
    answered: Callable[[int], None],
) -> list[Outcome]:
    """``requests`` of them, ``concurrency`` at once, half of them streaming; ``answered`` hears how many are done."""
    numbers = iter(range(requests))
    outcomes: list[Outcome] = []

    async def client() -> None:
        for number in numbers:
            # a question that was asked whole the first time streams the next time
            stream = (number + number // len(expected)) % 2 == 0
            outcomes.append(await ask_one(expected[number % len(expected)], stream))
            answered(len(outcomes))

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return outcomes

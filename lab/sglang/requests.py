"""Requests as a router sends them: to both sides at once, with one room."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from lab.engines.requests import Refused

SECONDS = 240.0
TOKENS = 8


def new_room() -> int:
    return random.SystemRandom().randrange(1, 1 << 62)


@dataclass(frozen=True, slots=True)
class Client:
    session: aiohttp.ClientSession
    plain: str
    prefill: str
    decode: str
    bootstrap_port: int

    async def generate(
        self, url: str, tokens: Sequence[int], *, count: int = TOKENS, seconds: float = SECONDS, **more: Any
    ) -> list[int]:
        """Raises Refused, TimeoutError, aiohttp.ClientError."""
        body = _body(tokens, count, **more)
        async with self.session.post(
            f"{url}/generate", json=body, timeout=aiohttp.ClientTimeout(total=seconds)
        ) as answer:
            if answer.status != 200:
                raise Refused(answer.status, await answer.text())
            return _output(await answer.json())

    async def streamed(self, tokens: Sequence[int], *, count: int = TOKENS) -> AsyncIterator[list[int]]:
        """Decode's tokens so far, each time that some more come. Raises Refused, TimeoutError, aiohttp.ClientError."""
        place = self.place(new_room())
        prefill = asyncio.create_task(self.generate(self.prefill, tokens, count=count, **place))
        body = _body(tokens, count, stream=True, **place)
        timeout = aiohttp.ClientTimeout(total=SECONDS)
        try:
            async with self.session.post(f"{self.decode}/generate", json=body, timeout=timeout) as answer:
                if answer.status != 200:
                    raise Refused(answer.status, await answer.text())
                async for line in answer.content:
                    name, _, carried = line.partition(b": ")
                    if name == b"data" and carried.strip() != b"[DONE]":
                        yield _output(json.loads(carried))
        finally:
            await _ended(prefill)

    async def complete(self, url: str, tokens: Sequence[int], *, count: int = TOKENS, **more: Any) -> list[int]:
        """The same by OpenAI's route. Raises Refused, TimeoutError, aiohttp.ClientError."""
        body = {
            "model": "m",
            "prompt": list(tokens),
            "max_tokens": count,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            **more,
        }
        timeout = aiohttp.ClientTimeout(total=SECONDS)
        async with self.session.post(f"{url}/v1/completions", json=body, timeout=timeout) as answer:
            if answer.status != 200:
                raise Refused(answer.status, await answer.text())
            found: list[int] = (await answer.json())["choices"][0]["token_ids"]
            return found

    async def alone(self, tokens: Sequence[int], **more: Any) -> list[int]:
        """The answer of the plain instance."""
        return await self.generate(self.plain, tokens, **more)

    def place(self, room: int) -> dict[str, Any]:
        """What a router adds to a request."""
        return {"bootstrap_host": "127.0.0.1", "bootstrap_port": self.bootstrap_port, "bootstrap_room": room}

    async def pair(self, tokens: Sequence[int], *, room: int | None = None, **more: Any) -> list[int]:
        """Decode's answer; both clients go away together."""
        place = self.place(new_room() if room is None else room)
        prefill = asyncio.create_task(self.generate(self.prefill, tokens, **place, **more))
        try:
            return await self.generate(self.decode, tokens, **place, **more)
        finally:
            await _ended(prefill)


def _body(tokens: Sequence[int], count: int, **more: Any) -> dict[str, Any]:
    greedy = {"temperature": 0, "max_new_tokens": count, "ignore_eos": True}
    return {"input_ids": list(tokens), "sampling_params": greedy, **more}


def _output(answer: dict[str, Any]) -> list[int]:
    """Raises Refused where a stream carries an error."""
    if "error" in answer:
        raise Refused(int(answer["error"].get("code", 500)), str(answer["error"]))
    found: list[int] = answer["output_ids"]
    return found


async def _ended(prefill: asyncio.Task[list[int]]) -> None:
    """Its client goes away with that of decode."""
    if not prefill.done():
        await asyncio.wait([prefill], timeout=5)
    prefill.cancel()
    await asyncio.gather(prefill, return_exceptions=True)

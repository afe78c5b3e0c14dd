"""Requests in both flows, as a router sends them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from lab.engines.requests import Refused, prompt

SECONDS = 120.0
TOKENS = 8


def new_room() -> str:
    return str(random.SystemRandom().randrange(1, 1 << 53))


@dataclass(frozen=True, slots=True)
class Client:
    session: aiohttp.ClientSession
    plain: str
    prefill: str
    decode: str

    async def complete(
        self,
        url: str,
        tokens: Sequence[int],
        *,
        count: int = TOKENS,
        params: dict[str, Any] | None = None,
        seconds: float = SECONDS,
        **more: Any,
    ) -> dict[str, Any]:
        """Raises Refused, TimeoutError, aiohttp.ClientError."""
        body = {
            "model": "m",
            "prompt": list(tokens),
            "max_tokens": count,
            "temperature": 0,
            "return_token_ids": True,
            **more,
        }
        if params is not None:
            body["kv_transfer_params"] = params
        timeout = aiohttp.ClientTimeout(total=seconds)
        async with self.session.post(f"{url}/v1/completions", json=body, timeout=timeout) as answer:
            if answer.status != 200:
                raise Refused(answer.status, await answer.text())
            found: dict[str, Any] = await answer.json()
            return found

    async def alone(self, tokens: Sequence[int], **more: Any) -> list[list[int]]:
        """The answers of the plain instance."""
        return tokens_of(await self.complete(self.plain, tokens, **more))

    async def to_prefill(self, tokens: Sequence[int], room: str | None = None) -> dict[str, Any]:
        """Prefill's ``kv_transfer_params``."""
        params: dict[str, Any] = {"do_remote_decode": True}
        if room is not None:
            params["kvbaton_room"] = room
        answer = await self.complete(self.prefill, tokens, count=1, params=params)
        return answer["kv_transfer_params"] or {}

    async def sequential(self, tokens: Sequence[int], **more: Any) -> list[list[int]]:
        params = await self.to_prefill(tokens)
        return tokens_of(await self.complete(self.decode, tokens, params=params or None, **more))

    async def concurrent(self, tokens: Sequence[int], sources: Sequence[str], **more: Any) -> list[list[int]]:
        room = new_room()
        params = {"do_remote_prefill": True, "kvbaton_room": room, "kvbaton_sources": list(sources)}
        prefill = asyncio.create_task(self.to_prefill(tokens, room))
        try:
            return tokens_of(await self.complete(self.decode, tokens, params=params, **more))
        finally:
            await asyncio.gather(prefill, return_exceptions=True)

    async def sources(self) -> list[str]:
        """The addresses of prefill's ranks; what they prefilled for it is let go."""
        tokens = prompt(40, 1)
        params = await self.to_prefill(tokens)
        await self.complete(self.decode, tokens, count=1, params=dict(params))
        found: list[str] = params["kvbaton_sources"]
        return found


def tokens_of(answer: dict[str, Any]) -> list[list[int]]:
    """The tokens of each answer."""
    return [choice["token_ids"] for choice in answer["choices"]]

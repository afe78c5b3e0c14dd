"""Asks an OpenAI-compatible server for completions; what ``eval`` measures with.

Rules: any server that speaks ``/v1/completions`` will do. A failure of one request is part of its answer, not an
exception, so that a run of hundreds says how many failed and why.

This file must not know of recall, kvbaton's servers or the terminal.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from time import perf_counter

import aiohttp
import msgspec

from kvbaton.errors import ConfigError, PeerLostError


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One answer. ``error`` is empty when there is one."""

    text: str = ""
    error: str = ""
    seconds: float = 0.0


class _Choice(msgspec.Struct):
    text: str


class _Answer(msgspec.Struct):
    choices: list[_Choice]


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


class CompletionClient:
    """Greedy completions from the server at ``url``. Use as an async context manager."""

    def __init__(self, url: str, *, model: str | None = None, timeout_seconds: float = 300.0) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"--url {url!r} is not a URL like http://127.0.0.1:8000")
        self._url = url.rstrip("/").removesuffix("/v1")
        self._model = model
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> CompletionClient:
        self._session = aiohttp.ClientSession(timeout=self._timeout, connector=aiohttp.TCPConnector(limit=0))
        try:
            await self._find_model()
        except BaseException:
            await self._session.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def complete(self, prompt: str, *, max_tokens: int) -> Completion:
        """One greedy completion."""
        started = perf_counter()
        body = {"model": self._model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        try:
            async with self._need_session().post(
                f"{self._url}/v1/completions",
                data=BytesIO(msgspec.json.encode(body)),
                headers={"Content-Type": "application/json"},
            ) as response:
                payload = await response.read()
            if response.status != 200:
                return Completion(
                    error=f"HTTP {response.status}: {payload[:500].decode(errors='replace')}",
                    seconds=perf_counter() - started,
                )
            text = msgspec.json.decode(payload, type=_Answer).choices[0].text
        except (aiohttp.ClientError, OSError, msgspec.MsgspecError, UnicodeDecodeError, IndexError) as error:
            return Completion(error=f"{type(error).__name__}: {error}", seconds=perf_counter() - started)
        return Completion(text=text, seconds=perf_counter() - started)

    async def complete_all(
        self, prompts: Sequence[str], *, max_tokens: int, concurrency: int, done: Callable[[Completion], None]
    ) -> list[Completion]:
        """One completion per prompt, in their order, at most ``concurrency`` at once; ``done`` hears of each."""
        slots = asyncio.Semaphore(concurrency)

        async def one(prompt: str) -> Completion:
            async with slots:
                completion = await self.complete(prompt, max_tokens=max_tokens)
            done(completion)
            return completion

        return list(await asyncio.gather(*(one(prompt) for prompt in prompts)))

    async def _find_model(self) -> None:
        """The server's first model, unless one was given. Raises PeerLostError when nobody answers."""
        if self._model is not None:
            return
        try:
            async with self._need_session().get(f"{self._url}/v1/models") as response:
                models = msgspec.json.decode(await response.read(), type=_Models).data
        except (aiohttp.ClientError, OSError) as error:
            raise PeerLostError(f"no server answers at {self._url}: {error or type(error).__name__}") from None
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise PeerLostError(f"{self._url}/v1/models does not answer as an OpenAI server does: {error}") from None
        if not models:
            raise PeerLostError(f"{self._url} serves no model now; wait until /ready says so, or pass --model")
        self._model = models[0].id

    def _need_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise ConfigError("a CompletionClient is used as an async context manager")
        return self._session

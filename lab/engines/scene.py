"""The servers that cases run on: a plain one, whose answers are right; one prefill and one decode; and, where ways of
handing over are compared, a second pair."""

from __future__ import annotations

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import aiohttp

from kvbaton.errors import ConfigError
from lab.engines.server import EngineServer

ServerT = TypeVar("ServerT", bound=EngineServer)
PairT = TypeVar("PairT")
Part = Literal["plain", "prefill", "decode"]

#: After a case nothing may be in use within so many seconds.
EMPTY_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Place:
    """Of one server in a scene. ``rival``: of the second pair."""

    part: Part
    rival: bool = False

    def __str__(self) -> str:
        return f"rival-{self.part}" if self.rival else self.part


def places(*, plain: bool, rival: bool) -> list[Place]:
    """All places of a scene: the plain server, the pair, the rival pair."""
    found = [Place("plain")] if plain else []
    for second in (False, True) if rival else (False,):
        found += [Place("prefill", second), Place("decode", second)]
    return found


class EngineScene(ABC, Generic[ServerT, PairT]):
    """``PairT``: what a rival is, a scene of the same kind."""

    def __init__(
        self,
        plain: ServerT | None,
        servers: Sequence[ServerT],
        session: aiohttp.ClientSession,
        rival: PairT | None = None,
    ) -> None:
        self._plain, self._rival = plain, rival
        self.prefill, self.decode = servers
        self.session = session

    @property
    def plain(self) -> ServerT:
        """Raises ConfigError where there is none."""
        if self._plain is None:
            raise ConfigError("this scene has no plain server")
        return self._plain

    @property
    def rival(self) -> PairT:
        """The same plain server, and the pair with the engine's own way. Raises ConfigError where there is none."""
        if self._rival is None:
            raise ConfigError("this scene has no rival")
        return self._rival

    @abstractmethod
    async def in_use(self, server: ServerT) -> Any:
        """What a server has under way; falsy: nothing."""

    async def empty(self, *servers: ServerT, seconds: float = EMPTY_SECONDS) -> float:
        """Seconds until ``servers``, or prefill and decode, have nothing under way. Raises AssertionError."""
        started = time.monotonic()
        used: list[Any] = []
        while time.monotonic() < started + seconds:
            used = [await self.in_use(server) for server in servers or (self.prefill, self.decode)]
            if not any(used):
                return time.monotonic() - started
            await asyncio.sleep(0.2)
        raise AssertionError(f"in use after {seconds:g} s: {used}")

    async def again(self, server: ServerT) -> None:
        """A server that was killed, started anew."""
        await server.again(self.session)


@contextlib.asynccontextmanager
async def started(servers: Sequence[EngineServer]) -> AsyncIterator[aiohttp.ClientSession]:
    """All of them answer; they are ended. The session is for asking them."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)) as session:
        try:
            for server in servers:
                server.start()
            for server in servers:
                await server.ready(session)
            yield session
        finally:
            await asyncio.gather(*(server.stop() for server in servers))

"""The servers that cases run on: one plain, one prefill, one decode; and what a case may ask and break."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import aiohttp

from kvbaton.errors import ConfigError
from kvbaton.serving.fleet import free_ports
from lab.engines.campaign import Play
from lab.vllm.contract import DIRECTORY
from lab.vllm.models import FAMILIES, write_model
from lab.vllm.requests import Client
from lab.vllm.server import Role, VllmServer

#: After a case nothing may be in use within so many seconds.
EMPTY_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """How the servers of a scene are started; ``tp``: ranks of prefill and of decode; ``rival``: a second pair, with
    vLLM's NixlConnector; ``plain``: a server without any, whose answers the others are compared with."""

    family: str
    policy: Literal["fail", "recompute"] = "recompute"
    options: Mapping[str, object] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    prefill_arguments: tuple[str, ...] = ()
    prefill_blocks: int = 300
    tp: tuple[int, int] = (1, 1)
    recorded: bool = False
    rival: bool = False
    plain: bool = True


class Scene:
    """``outcomes`` of rooms and usage are read from the servers' own metrics."""

    def __init__(
        self,
        plain: VllmServer | None,
        servers: Sequence[VllmServer],
        session: aiohttp.ClientSession,
        rival: Scene | None = None,
    ) -> None:
        self._plain = plain
        self.prefill, self.decode = servers
        self.session = session
        self._rival = rival
        self.client = Client(session, plain.url if plain is not None else "", self.prefill.url, self.decode.url)

    @property
    def plain(self) -> VllmServer:
        """Raises ConfigError where there is none."""
        if self._plain is None:
            raise ConfigError("this scene has no plain server")
        return self._plain

    @property
    def rival(self) -> Scene:
        """The same plain server, and the pair with NixlConnector. Raises ConfigError where there is none."""
        if self._rival is None:
            raise ConfigError("this scene has no rival")
        return self._rival

    @property
    def connected(self) -> dict[str, VllmServer]:
        return {"prefill": self.prefill, "decode": self.decode}

    async def empty(self, *servers: VllmServer, seconds: float = EMPTY_SECONDS) -> float:
        """Seconds until no block of prefill and decode is in use. Raises AssertionError."""
        started = time.monotonic()
        usage: list[float] = []
        while time.monotonic() < started + seconds:
            usage = [await server.usage(self.session) for server in servers or (self.prefill, self.decode)]
            if not any(usage):
                return time.monotonic() - started
            await asyncio.sleep(0.2)
        raise AssertionError(f"blocks are in use after {seconds:g} s: {usage}")

    async def rooms(self, server: VllmServer) -> dict[str, float]:
        """Ended hand-offs by side and outcome."""
        found = {}
        for name, value in (await server.metrics(self.session)).items():
            if name.startswith("vllm:kvbaton_rooms_total"):
                labels = dict(part.split("=", 1) for part in name[name.index("{") + 1 : -1].split(","))
                found[f"{labels['side'].strip(chr(34))} {labels['outcome'].strip(chr(34))}"] = value
        return found

    async def again(self, server: VllmServer) -> None:
        """A server that was killed, started anew."""
        await server.again(self.session)

    async def serves(self) -> Any:
        """One hand-off, to see that everybody is alive."""
        return await self.client.sequential([7] * 40)


@contextlib.asynccontextmanager
async def opened(play: Play[Setting, Scene], *, python: Path, models: Path, logs: Path) -> AsyncIterator[Scene]:
    """Start the servers; ends them."""
    setting = play.setting
    model = write_model(setting.family, models / setting.family)
    pairs = ["", "rival "] if setting.rival else [""]
    places: list[tuple[str, str, Role]] = [("", "plain", "plain")] if setting.plain else []
    for pair in pairs:
        places += [(pair, "prefill", "kv_producer"), (pair, "decode", "kv_consumer")]
    servers = []
    for port, (pair, name, role) in zip(free_ports(len(places)), places, strict=True):
        ranks = {"plain": 1, "prefill": setting.tp[0], "decode": setting.tp[1]}[name]
        parallel = ("--tensor-parallel-size", str(ranks)) if ranks > 1 else ()
        own = setting.prefill_arguments if name == "prefill" else ()
        servers.append(
            VllmServer(
                name=f"{pair}{name}",
                python=python,
                model=model,
                dtype=FAMILIES[setting.family][2],
                port=port,
                log=logs / f"{setting.family}-{pair.replace(' ', '-')}{name}.log",
                role=role,
                policy=setting.policy,
                options={} if pair else setting.options,
                arguments=(*setting.arguments, *own, *parallel),
                blocks=setting.prefill_blocks if name == "prefill" else 300,
                **(_recording(logs / f"calls-{name}") if setting.recorded and name != "plain" else {}),
                **(_nixl() if pair else {}),
            )
        )
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)) as session:
        try:
            for server in servers:
                server.start()
            for server in servers:
                await server.ready(session)
            plain = servers[0] if setting.plain else None
            connected = servers[1:] if setting.plain else servers
            rival = Scene(plain, connected[2:], session) if setting.rival else None
            yield Scene(plain, connected[:2], session, rival)
        finally:
            await asyncio.gather(*(server.stop() for server in servers))


def _nixl() -> dict[str, Any]:
    """vLLM's own connector, with a listener of its own."""
    (port,) = free_ports(1)
    return {"connector": ("NixlConnector", ""), "environment": {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(port)}}


def _recording(directory: Path) -> dict[str, Any]:
    """Another connector, which writes down its calls."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    root = Path(__file__).parents[2]
    return {
        "connector": ("RecordingConnector", "lab.vllm.recorder"),
        "environment": {DIRECTORY: str(directory.absolute()), "PYTHONPATH": str(root)},
    }

"""The servers that cases run on: one plain, one prefill, one decode; and what a case may ask and break."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from kvbaton.errors import ConfigError
from kvbaton.serving.fleet import free_ports
from lab.engines.campaign import Play
from lab.sglang.contract import DIRECTORY, plug_in
from lab.sglang.models import write_model
from lab.sglang.requests import Client
from lab.sglang.server import SglangServer

#: After a case nothing may be in use within so many seconds.
EMPTY_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """How the servers of a scene are started; ``tp``: ranks of prefill and of decode; ``tokens``: of decode's pool;
    ``plug_in``: the module beside this one that lets SGLang run the family on a CPU; ``rival``: instead of a plain
    server a second pair, with SGLang's own NIXL backend."""

    family: str
    backend: str = "kvbaton"
    options: Mapping[str, object] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    prefill_arguments: tuple[str, ...] = ()
    decode_arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    tp: tuple[int, int] = (1, 1)
    secret: bool = False
    recorded: bool = False
    plug_in: str = ""
    rival: bool = False
    tokens: int = 16_384


class Scene:
    """Servers and what may be asked of them."""

    def __init__(
        self,
        plain: SglangServer | None,
        servers: Sequence[SglangServer],
        session: aiohttp.ClientSession,
        rival: Scene | None = None,
    ) -> None:
        self._plain, self._rival = plain, rival
        self.prefill, self.decode = servers
        self.session = session
        alone = plain.url if plain is not None else ""
        self.client = Client(session, alone, self.prefill.url, self.decode.url, self.prefill.bootstrap_port)

    @property
    def plain(self) -> SglangServer:
        """Raises ConfigError where there is none."""
        if self._plain is None:
            raise ConfigError("this scene has no plain server")
        return self._plain

    @property
    def rival(self) -> Scene:
        """The pair with SGLang's own backend. Raises ConfigError where there is none."""
        if self._rival is None:
            raise ConfigError("this scene has no rival")
        return self._rival

    async def busy(self, server: SglangServer) -> dict[str, float]:
        """What a server has under way, of what it counts."""
        async with self.session.get(f"{server.url}/v1/loads", params={"include": "all"}) as answer:
            loads = (await answer.json())["loads"]
        found: dict[str, float] = {}
        for load in loads:
            for name in ("num_running_reqs", "num_waiting_reqs", "num_used_tokens"):
                found[name] = found.get(name, 0) + load[name]
            for name, value in (load.get("disaggregation") or {}).items():
                if name.endswith("_reqs"):
                    found[name] = found.get(name, 0) + value
        return {name: value for name, value in found.items() if value}

    async def empty(self, *servers: SglangServer, seconds: float = EMPTY_SECONDS) -> float:
        """Seconds until prefill and decode have nothing under way. Raises AssertionError."""
        started = time.monotonic()
        busy: list[Any] = []
        while time.monotonic() < started + seconds:
            busy = [await self.busy(server) for server in servers or (self.prefill, self.decode)]
            if not any(busy):
                return time.monotonic() - started
            await asyncio.sleep(0.2)
        raise AssertionError(f"busy after {seconds:g} s: {busy}")

    async def again(self, server: SglangServer) -> None:
        """A server that was killed, started anew."""
        await server.again(self.session)


@contextlib.asynccontextmanager
async def opened(play: Play[Setting, Scene], *, python: Path, models: Path, logs: Path) -> AsyncIterator[Scene]:
    """Start the servers; ends them. The play's name names the logs."""
    name, setting = play.name, play.setting
    model = write_model(setting.family, models / setting.family)
    ports = free_ports(6)
    options = dict(setting.options)
    if setting.secret:
        file = logs.absolute() / "secret"
        file.touch(0o600)
        file.write_text(secrets.token_hex(32))
        options["secret_file"] = str(file)
    shutil.rmtree(logs / "calls", ignore_errors=True)
    servers = []
    pairs = [("", "prefill"), ("", "decode")]
    places = [*pairs, *(("rival ", role) for _, role in pairs)] if setting.rival else [("", "plain"), *pairs]
    for port, (pair, role) in zip(ports, places, strict=False):
        own = {"plain": (), "prefill": setting.prefill_arguments, "decode": setting.decode_arguments}[role]
        log = logs / f"{name}-{pair}{role}.log".replace(" ", "_").replace(",", "")
        log.unlink(missing_ok=True)
        servers.append(
            SglangServer(
                name=f"{pair}{role}",
                python=python,
                model=model,
                port=port,
                bootstrap_port=ports[5] if pair else ports[4],
                log=log,
                role=role,  # type: ignore[arg-type]
                backend="nixl" if pair else setting.backend,
                tp={"plain": 1, "prefill": setting.tp[0], "decode": setting.tp[1]}[role],
                tokens=setting.tokens if role == "decode" else 16_384,
                options=options,
                arguments=(*setting.arguments, *own),
                environment={
                    **setting.environment,
                    **(_recording(logs / "calls") if setting.recorded else {}),
                    **(_with_plug_in(logs, setting.plug_in) if setting.plug_in else {}),
                    **(_with_plug_in(logs, "nixl_on_cpu") if pair else {}),
                },
            )
        )
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)) as session:
        try:
            for server in servers:
                server.start()
            for server in servers:
                await server.ready(session)
            if setting.rival:
                yield Scene(None, servers[:2], session, Scene(None, servers[2:], session))
            else:
                yield Scene(servers[0], servers[1:], session)
        finally:
            await asyncio.gather(*(server.stop() for server in servers))


def _recording(directory: Path) -> dict[str, str]:
    """A further plug-in, which writes down the calls."""
    directory.mkdir(parents=True, exist_ok=True)
    return {DIRECTORY: str(directory.absolute()), **_with_plug_in(directory, "recorder")}


def _with_plug_in(directory: Path, module: str) -> dict[str, str]:
    paths = [str(plug_in(directory.absolute() / "plug-ins" / module, module)), str(Path(__file__).parents[2])]
    return {"PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])}

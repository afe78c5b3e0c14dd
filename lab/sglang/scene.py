"""The servers that cases run on: one plain, one prefill, one decode; and what a case may ask and break."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from kvbaton.serving.fleet import free_ports
from lab.engines.campaign import Play
from lab.engines.models import write_model
from lab.engines.scene import EngineScene, places, started
from lab.sglang.contract import DIRECTORY, plug_in
from lab.sglang.models import FAMILIES
from lab.sglang.requests import Client
from lab.sglang.server import SglangServer


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


class Scene(EngineScene[SglangServer, "Scene"]):
    """What is under way is read from the servers' own loads."""

    def __init__(
        self,
        plain: SglangServer | None,
        servers: Sequence[SglangServer],
        session: aiohttp.ClientSession,
        rival: Scene | None = None,
    ) -> None:
        super().__init__(plain, servers, session, rival)
        alone = plain.url if plain is not None else ""
        self.client = Client(session, alone, self.prefill.url, self.decode.url, self.prefill.bootstrap_port)

    async def in_use(self, server: SglangServer) -> dict[str, float]:
        """What it counts."""
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


@contextlib.asynccontextmanager
async def opened(play: Play[Setting, Scene], *, python: Path, models: Path, logs: Path) -> AsyncIterator[Scene]:
    """Start the servers; ends them. The play's name names the logs."""
    setting = play.setting
    model = write_model(FAMILIES[setting.family], models / setting.family)
    where = places(plain=not setting.rival, rival=setting.rival)
    *ports, bootstrap, rivals_bootstrap = free_ports(len(where) + 2)
    options = dict(setting.options)
    if setting.secret:
        file = logs.absolute() / "secret"
        file.touch(0o600)
        file.write_text(secrets.token_hex(32))
        options["secret_file"] = str(file)
    shutil.rmtree(logs / "calls", ignore_errors=True)
    servers = []
    for port, place in zip(ports, where, strict=True):
        own = {"plain": (), "prefill": setting.prefill_arguments, "decode": setting.decode_arguments}[place.part]
        log = logs / f"{play.name}-{place}.log".replace(" ", "_").replace(",", "")
        log.unlink(missing_ok=True)
        servers.append(
            SglangServer(
                name=str(place),
                python=python,
                model=model,
                port=port,
                bootstrap_port=rivals_bootstrap if place.rival else bootstrap,
                log=log,
                role=place.part,
                backend="nixl" if place.rival else setting.backend,
                tp={"plain": 1, "prefill": setting.tp[0], "decode": setting.tp[1]}[place.part],
                tokens=setting.tokens if place.part == "decode" else 16_384,
                options=options,
                arguments=(*setting.arguments, *own),
                environment={
                    **setting.environment,
                    **(_recording(logs / "calls") if setting.recorded else {}),
                    **(_with_plug_in(logs, setting.plug_in) if setting.plug_in else {}),
                    **(_with_plug_in(logs, "nixl_on_cpu") if place.rival else {}),
                },
            )
        )
    async with started(servers) as session:
        if setting.rival:
            yield Scene(None, servers[:2], session, Scene(None, servers[2:], session))
        else:
            yield Scene(servers[0], servers[1:], session)


def _recording(directory: Path) -> dict[str, str]:
    """A further plug-in, which writes down the calls."""
    directory.mkdir(parents=True, exist_ok=True)
    return {DIRECTORY: str(directory.absolute()), **_with_plug_in(directory, "recorder")}


def _with_plug_in(directory: Path, module: str) -> dict[str, str]:
    paths = [str(plug_in(directory.absolute() / "plug-ins" / module, module)), str(Path(__file__).parents[2])]
    return {"PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])}

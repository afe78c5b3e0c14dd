"""The servers that cases run on: one plain, one prefill, one decode; and what a case may ask and break."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import aiohttp

from kvbaton.serving.fleet import free_ports
from lab.engines.campaign import Play
from lab.engines.models import write_model
from lab.engines.scene import EngineScene, Part, places, started
from lab.vllm.contract import DIRECTORY
from lab.vllm.models import FAMILIES
from lab.vllm.requests import Client
from lab.vllm.server import Role, VllmServer

ROLES: Mapping[Part, Role] = {"plain": "plain", "prefill": "kv_producer", "decode": "kv_consumer"}


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


class Scene(EngineScene[VllmServer, "Scene"]):
    """Outcomes of rooms and usage are read from the servers' own metrics."""

    def __init__(
        self,
        plain: VllmServer | None,
        servers: Sequence[VllmServer],
        session: aiohttp.ClientSession,
        rival: Scene | None = None,
    ) -> None:
        super().__init__(plain, servers, session, rival)
        self.client = Client(session, plain.url if plain is not None else "", self.prefill.url, self.decode.url)

    @property
    def connected(self) -> dict[str, VllmServer]:
        return {"prefill": self.prefill, "decode": self.decode}

    async def in_use(self, server: VllmServer) -> float:
        """Part of its blocks."""
        return await server.usage(self.session)

    async def rooms(self, server: VllmServer) -> dict[str, float]:
        """Ended hand-offs by side and outcome."""
        found = {}
        for name, value in (await server.metrics(self.session)).items():
            if name.startswith("vllm:kvbaton_rooms_total"):
                labels = dict(part.split("=", 1) for part in name[name.index("{") + 1 : -1].split(","))
                found[f"{labels['side'].strip(chr(34))} {labels['outcome'].strip(chr(34))}"] = value
        return found

    async def serves(self) -> Any:
        """One hand-off, to see that everybody is alive."""
        return await self.client.sequential([7] * 40)


@contextlib.asynccontextmanager
async def opened(play: Play[Setting, Scene], *, python: Path, models: Path, logs: Path) -> AsyncIterator[Scene]:
    """Start the servers; ends them."""
    setting = play.setting
    family = FAMILIES[setting.family]
    model = write_model(family, models / setting.family)
    where = places(plain=setting.plain, rival=setting.rival)
    servers = []
    for port, place in zip(free_ports(len(where)), where, strict=True):
        ranks = {"plain": 1, "prefill": setting.tp[0], "decode": setting.tp[1]}[place.part]
        parallel = ("--tensor-parallel-size", str(ranks)) if ranks > 1 else ()
        own = setting.prefill_arguments if place.part == "prefill" else ()
        servers.append(
            VllmServer(
                name=str(place),
                python=python,
                model=model,
                dtype=family.dtype,
                port=port,
                log=logs / f"{setting.family}-{place}.log",
                role=ROLES[place.part],
                policy=setting.policy,
                options={} if place.rival else setting.options,
                arguments=(*setting.arguments, *own, *parallel),
                blocks=setting.prefill_blocks if place.part == "prefill" else 300,
                **(_recording(logs / f"calls-{place}") if setting.recorded and place.part != "plain" else {}),
                **(_nixl() if place.rival else {}),
            )
        )
    async with started(servers) as session:
        plain = servers[0] if setting.plain else None
        connected = servers[1:] if setting.plain else servers
        rival = Scene(plain, connected[2:], session) if setting.rival else None
        yield Scene(plain, connected[:2], session, rival)


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

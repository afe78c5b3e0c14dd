"""The attacks: what is sent to whom, how much of it, and what may come back."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from kvbaton.control.address import Address
from kvbaton.protocol.settings import Settings
from kvbaton.serving.fleet import Fleet, Server

#: A chat template of hours: whoever may name a model's directory, or its template, may write this.
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a * b %}{% endfor %}{% endfor %}"
#: Strangers get so many answers at once, and so many a second.
ANSWERS_AT_ONCE, ANSWERS_A_SECOND = 16, 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How much is sent. ``large_bytes``: of a body that is made of small values."""

    count: int
    large_bytes: int
    body_bytes: int
    bodies: int
    noise: int
    posts: int
    silent: int
    seconds: float
    hold_seconds: float
    calm_seconds: float


FULL = Sizes(
    count=10_000,
    large_bytes=(16 << 20) - (96 << 10),  # just under what a router takes
    body_bytes=100 << 20,
    bodies=24,
    noise=20_000,
    posts=1_024,
    silent=1_500,
    seconds=20.0,
    hold_seconds=6.0,
    calm_seconds=15.0,
)
SMALL = Sizes(
    count=250,
    large_bytes=2 << 20,
    body_bytes=20 << 20,
    bodies=4,
    noise=48,
    posts=64,
    silent=64,
    seconds=0.5,
    hold_seconds=0.2,
    calm_seconds=0.2,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Attack:
    """``allowed``: the statuses that may come back, None: it does not matter; ``least``, ``most``: how often."""

    name: str
    options: Mapping[str, Any]
    allowed: Collection[str] | None = None
    least: Mapping[str, int] | None = None
    most: Mapping[str, int] | None = None

    def complaints(self, got: Mapping[str, int]) -> list[str]:
        """What the servers should not have said."""
        wrong = [] if self.allowed is None else sorted(got.keys() - set(self.allowed))
        return [
            *(f"{what} came back" for what in wrong),
            *(
                f"{what}: {got.get(what, 0)}, less than {n}"
                for what, n in (self.least or {}).items()
                if got.get(what, 0) < n
            ),
            *(
                f"{what}: {got.get(what, 0)}, more than {n}"
                for what, n in (self.most or {}).items()
                if got.get(what, 0) > n
            ),
        ]


async def attacks_on(fleet: Fleet, sizes: Sizes, *, template: bool) -> list[Attack]:
    """Every attack on a running fleet of one pair. ``template``: its model has :data:`ENDLESS` as its template."""
    prefill, decode, registry = fleet.prefills[0], fleet.decodes[0], fleet.registry_ports[0]
    full = sizes is FULL
    links = {server.name: (await fleet.info(server))["handoff"]["address"] for server in (prefill, decode)}
    http = [fleet.router.port, prefill.port, decode.port]
    named = [*http, registry, *(Address.parse(address).port for address in links.values())]
    data = [port for server in (prefill, decode) for port in listening(server) if port not in named]
    targets = [["POST", port, "/v1/completions"] for port in http] + [["PUT", registry, "/route"]]
    timed = {"seconds": sizes.seconds}

    def posts(name: str, payload: str, at_once: int, status: str, ports: Sequence[int] = http) -> Attack:
        options = {
            "kind": "posts",
            "ports": ports,
            "payload": payload,
            "size": sizes.large_bytes,
            "at_once": at_once,
            **timed,
        }
        least = {status: 1} if full else None  # all attacks at once: each body may find the gate shut, again and again
        return Attack(name=name, options=options, allowed={status, "429", "503"}, least=least)

    return [
        posts("six bodies of 15.9 MiB of empty tools, again and again", "tools", 6, "400"),
        posts("six bodies of 8.3 million token ids", "token ids", 6, "400"),
        dataclasses.replace(  # a router ignores what it does not know
            posts("six bodies of 1.3 million unknown fields", "fields", 6, "400"), allowed={"200", "400", "429", "503"}
        ),
        Attack(
            name=f"{sizes.posts:,} posts of one byte to each of {len(http)} ports",
            options={"kind": "one_byte", "ports": http, "count": sizes.posts, **timed},
            allowed={"opened", "408", "hung up"},
            least={"opened": len(http) * sizes.posts},
        ),
        Attack(
            name="100 registrations a second",
            options={"kind": "registrations", "port": registry, "each_second": 100, "seed": 2, **timed},
            allowed={"200", "400", "409", "503"},
        ),
        *([posts("six chats whose template loops", "template", 6, "400", http[:1])] if template else []),
        Attack(
            name=f"{sizes.silent:,} silent connections to each of {len(data)} data ports",
            options={"kind": "half_open", "ports": data, "count": sizes.silent, "hold_seconds": sizes.seconds / 2},
            least={"opened": len(data) * sizes.silent},
        ),
        Attack(
            name=f"{sizes.count:,} rooms of a peer, as many of strangers",
            options={"kind": "rooms", "address": links[prefill.name], "count": sizes.count, "backend": "nixl"},
            least={"greeted": 1, "Opened": 1, **({"overloaded": 1} if full else {})},
            most={"Opened": Settings().rooms_per_peer, "UnknownPeer": ANSWERS_AT_ONCE + 60 * ANSWERS_A_SECOND},
        ),
        Attack(
            name=f"{sizes.count:,} silent connections to each of {len(named)} ports",
            options={"kind": "half_open", "ports": named, "count": sizes.count, "hold_seconds": sizes.hold_seconds},
            least={"closed by the server": 1} if full else None,
        ),
        Attack(
            name=f"{sizes.noise:,} times noise",
            options={"kind": "noise", "ports": named, "count": sizes.noise, "seed": 1},
        ),
        Attack(
            name=f"{sizes.bodies} bodies of {sizes.body_bytes >> 20} MiB",
            options={"kind": "bodies", "targets": targets, "size": sizes.body_bytes, "count": sizes.bodies},
            allowed={"413", "hung up", "400"},
        ),
    ]


def listening(server: Server) -> list[int]:
    """TCP ports of a server's processes."""
    if server.process is None:
        return []
    first = psutil.Process(server.process.pid)
    return [
        connection.laddr.port
        for process in (first, *first.children(recursive=True))
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]


def resident_bytes(server: Server) -> int:
    """What a server's process holds in memory now."""
    if server.process is None:
        return 0
    return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

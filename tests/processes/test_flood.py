"""Floods against a running pair while honest requests go on: all are answered right, memory stays bounded.

The default run floods a little; ``make flood`` (``KVBATON_FLOOD=full``) with 10,000 rooms, 10,000 half-open connections
for each port and bodies of 100 MiB, and prints p99 during over p99 before.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kvbaton.control.address import Address
from kvbaton.protocol.settings import Settings
from kvbaton.serving.demo.show import DemoAnswer, ask, concurrent_questions
from kvbaton.serving.fleet import Fleet, Server

FULL = os.environ.get("KVBATON_FLOOD") == "full"
COUNT = 10_000 if FULL else 250
BODY_BYTES = (100 if FULL else 20) << 20
BODIES = 24 if FULL else 4
NOISE = 2_000 if FULL else 48
CALM_SECONDS = 20.0 if FULL else 1.5
HOLD_SECONDS = 6.0 if FULL else 0.2
#: What a server may have grown by when the flood is over: buffers that the allocator keeps, not what was sent.
GROWTH_BYTES = 192 << 20
#: Honest requests at a time.
CONCURRENT = 4
QUESTIONS = concurrent_questions(16)


@dataclass
class Honest:
    """Requests that go on all the while: how long each took."""

    fleet: Fleet
    expected: list[DemoAnswer]
    seconds: list[float] = field(default_factory=list)

    async def ask_until(self, done: asyncio.Event) -> None:
        async def one(offset: int) -> None:
            number = offset
            while not done.is_set():
                index = number % len(QUESTIONS)
                started = time.monotonic()
                answer = await asyncio.wait_for(ask(self.fleet.http, self.fleet.router.url, QUESTIONS[index]), 60)
                self.seconds.append(time.monotonic() - started)
                assert not answer.error, answer.error
                assert answer.tokens == self.expected[index].tokens
                number += CONCURRENT

        await asyncio.gather(*(one(offset) for offset in range(CONCURRENT)))

    @property
    def p99(self) -> float:
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]


def resident_bytes(server: Server) -> int:
    """What a server's process holds in memory now."""
    assert server.process is not None
    return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def flood(name: str, **options: Any) -> dict[str, Any]:
    """Run one flood in a process of its own; what it says it got."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(Path(__file__).with_name("flood.py")),
        json.dumps({"flood": name, **options}),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")},
    )
    try:
        said, complaint = await asyncio.wait_for(process.communicate(), 300)
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0, complaint.decode()[-4000:]
    answer: dict[str, Any] = json.loads(said)
    return answer


async def all_floods(fleet: Fleet) -> dict[str, Any]:
    prefill, decode = fleet.prefills[0], fleet.decodes[0]
    links = {server.name: (await fleet.info(server))["handoff"]["address"] for server in (prefill, decode)}
    registry = fleet.registry_ports[0]
    http = [fleet.router.port, prefill.port, decode.port, registry]
    ports = [*http, *(Address.parse(address).port for address in links.values())]
    post = [["POST", port, "/v1/completions"] for port in http[:3]]
    return {
        "rooms": await flood("rooms", address=links[prefill.name], count=COUNT, backend="nixl"),
        "half_open": await flood("half_open", ports=ports, count=COUNT, hold_seconds=HOLD_SECONDS),
        "noise": await flood("noise", ports=ports, count=NOISE, seed=1),
        "bodies": await flood("bodies", targets=[*post, ["PUT", registry, "/route"]], size=BODY_BYTES, count=BODIES),
    }


async def during(fleet: Fleet, expected: list[DemoAnswer], work: Any) -> tuple[Honest, Any]:
    """Honest requests while ``work`` goes on."""
    honest, done = Honest(fleet, expected), asyncio.Event()
    asking = asyncio.create_task(honest.ask_until(done))
    try:
        result = await work
    finally:
        done.set()
        await asking
    return honest, result


def test_floods_keep_nobody_from_an_answer(
    fleet: Fleet, runner: asyncio.Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> dict[str, Any]:
        assert fleet.reference is not None
        expected = [await ask(fleet.http, fleet.reference.url, question) for question in QUESTIONS]
        calm, _ = await during(fleet, expected, asyncio.sleep(CALM_SECONDS))
        servers = [*fleet.prefills, *fleet.decodes, fleet.router]
        before = {server.name: resident_bytes(server) for server in servers}
        stormy, floods = await during(fleet, expected, all_floods(fleet))
        growth = {server.name: resident_bytes(server) - before[server.name] for server in servers}
        await fleet.all_returned()
        return {
            "requests": [len(calm.seconds), len(stormy.seconds)],
            "p99_seconds": [calm.p99, stormy.p99],
            "p99_ratio": stormy.p99 / calm.p99,
            "growth_mib": {name: round(grown / 2**20, 1) for name, grown in growth.items()},
            "floods": floods,
        }

    report = runner.run(scenario())
    with capsys.disabled():
        if FULL:
            print("\n" + json.dumps(report, indent=1))
    floods = report["floods"]
    assert floods["rooms"]["greeted"] == 1, floods
    assert floods["rooms"]["UnknownPeer"] <= 16 + 4 * 60, "strangers are answered now and then only"
    assert 0 < floods["rooms"]["Opened"] <= Settings().rooms_per_peer
    if FULL:
        assert floods["rooms"]["overloaded"] > 0, floods
        assert floods["half_open"]["closed by the server"] > 0, floods
    assert set(floods["bodies"]) <= {"413", "hung up", "400"}, floods
    assert max(report["growth_mib"].values()) < GROWTH_BYTES / 2**20, report

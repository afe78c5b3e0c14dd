"""One wave of attacks after the other on a running fleet, a calm between: p99 of honest requests, memory, readiness.

What is usual is taken from the calm before an attack and the one after it together: what else goes on in a machine
comes and goes.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import aiohttp

from kvbaton.errors import TransferFailedError
from kvbaton.serving.demo.show import DemoAnswer
from kvbaton.serving.fleet import Fleet, Server
from lab.flood.attacks import Attack, Sizes, resident_bytes
from lab.flood.honest import Honest, expected_answers, p99
from lab.programs import output

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
#: Most that p99 of honest requests may be during an attack, compared with the calm around it.
MOST_RATIO = 3.0
#: What a server may have grown by at any time of one attack: bodies that it reads (six of 16 MiB, a copy each), and
#: buffers that the allocator keeps.
GROWTH_BYTES = 256 << 20
WATCH_SECONDS = 0.2
ATTACK_SECONDS = 900.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What one attack did to the fleet."""

    name: str
    requests: tuple[int, int]
    p99_seconds: tuple[float, float]
    peak_growth_mib: dict[str, float]
    got: dict[str, int]
    complaints: list[str] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return self.p99_seconds[1] / max(self.p99_seconds[0], 1e-9)

    @property
    def ok(self) -> bool:
        return not self.complaints


@dataclass
class Watch:
    """Looks at every server again and again: the most memory it held, and whether it was ready."""

    fleet: Fleet
    servers: Sequence[Server]
    peak: dict[str, int] = field(default_factory=dict)
    not_ready: dict[str, int] = field(default_factory=dict)

    async def look_until(self, done: asyncio.Event) -> None:
        while not done.is_set():
            for server in self.servers:
                self.peak[server.name] = max(self.peak.get(server.name, 0), resident_bytes(server))
            await asyncio.gather(*map(self._ask, self.servers))
            await asyncio.sleep(WATCH_SECONDS)

    async def _ask(self, server: Server) -> None:
        try:
            async with self.fleet.http.get(f"{server.url}/ready") as response:
                ready = response.status == 200
        except (aiohttp.ClientError, OSError):
            ready = False
        if not ready:
            self.not_ready[server.name] = self.not_ready.get(server.name, 0) + 1


async def run(
    fleet: Fleet,
    waves: Sequence[Sequence[Attack]],
    sizes: Sizes,
    begin: Callable[[str], None],
    tell: Callable[[Result], None],
    *,
    judge_p99: bool,
) -> list[Result]:
    """Every wave of attacks that go on at once, and a calm before and after each. ``begin`` is told the name of each,
    ``tell`` what came of it. Without ``judge_p99`` a slow answer is no complaint."""
    expected, results = await expected_answers(fleet), []
    servers = [*fleet.prefills, *fleet.decodes, fleet.router]

    async def calm() -> Honest:
        await fleet.all_returned()
        honest, _, _ = await _during(fleet, servers, expected, asyncio.sleep(sizes.calm_seconds))
        return honest

    before = await calm()
    for wave in waves:
        name = "; ".join(attack.name for attack in wave)
        begin(name)
        held = {server.name: resident_bytes(server) for server in servers}
        during, watch, got = await _during(fleet, servers, expected, _attacker(wave))
        after = await calm()
        growth = {name: peak - held[name] for name, peak in watch.peak.items()}
        usual = p99([*before.seconds, *after.seconds])
        ratio = p99(during.seconds) / max(usual, 1e-9)
        wrong = {"": during.wrong, "in the calm around it, ": [*before.wrong, *after.wrong]}
        complaints = [
            *(
                f"{attack.name}: {said}"
                for attack, its in zip(wave, got, strict=True)
                for said in attack.complaints(its)
            ),
            *(f"{when}{len(said)} honest answers wrong: {said[0]}" for when, said in wrong.items() if said),
            *(f"{name} was not ready {times} times" for name, times in watch.not_ready.items()),
            *(f"{name} grew by {grown >> 20} MiB" for name, grown in growth.items() if grown > GROWTH_BYTES),
            *([f"p99 is {ratio:.1f} times what is usual"] if judge_p99 and ratio > MOST_RATIO else []),
        ]
        results.append(
            Result(
                name=name,
                requests=(len(before.seconds) + len(after.seconds), len(during.seconds)),
                p99_seconds=(round(usual, 3), round(p99(during.seconds), 3)),
                peak_growth_mib={name: round(grown / 2**20, 1) for name, grown in growth.items()},
                got=dict(sum(map(Counter, got), Counter())),
                complaints=complaints,
            )
        )
        tell(results[-1])
        before = after
    return results


async def _during(
    fleet: Fleet, servers: Sequence[Server], expected: Sequence[DemoAnswer], work: Awaitable[T]
) -> tuple[Honest, Watch, T]:
    """Honest requests and a watch while ``work`` goes on."""
    honest, watch, done = Honest(fleet, expected), Watch(fleet, servers), asyncio.Event()
    beside = [asyncio.create_task(honest.ask_until(done)), asyncio.create_task(watch.look_until(done))]
    try:
        result = await work
    finally:
        done.set()
        await asyncio.gather(*beside)
    return honest, watch, result


async def _attacker(wave: Sequence[Attack]) -> list[dict[str, int]]:
    """Run attacks in a process of their own; what it says that each got."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "lab.flood.attacker", json.dumps([dict(attack.options) for attack in wave])),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    said, complaint = await output(process, ATTACK_SECONDS)
    if process.returncode != 0:
        raise TransferFailedError(f"the attacker of {wave[0].name!r} failed: {complaint.decode()[-4000:]}")
    answers: list[dict[str, int]] = json.loads(said)
    return answers

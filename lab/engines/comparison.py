"""Two pairs of servers, ours and the engine's own way, measured in turns with the same requests on one machine.

While one pair is measured the other is stopped: progress threads that spin would otherwise take the cores that both
share. Before its turn a pair serves a few requests, so that what the pause has cost is not measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import statistics
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from lab.engines.requests import prompt
from lab.engines.server import EngineServer

#: So many rounds; on a machine that is busy otherwise none begins after so long.
ROUNDS, SECONDS = 5, 200.0
#: Requests that a pair serves before its turn, and their tokens.
WARM_REQUESTS, WARM_TOKENS = 2, 64

#: What is measured of one request, by name, in seconds.
Seconds = Mapping[str, float]
Ask = Callable[[Sequence[int]], Awaitable[Seconds]]


@dataclass(frozen=True, slots=True)
class Cell:
    """So many requests of a length at once, so often in a round."""

    at_once: int
    length: int
    times: int = 1

    def __str__(self) -> str:
        return f"{self.at_once} x {self.length}"


@dataclass(frozen=True, slots=True)
class Pair:
    """Servers, and the ways in which a request goes through them, by name."""

    servers: Sequence[EngineServer]
    ways: Mapping[str, Ask]

    def send_signal(self, number: signal.Signals) -> None:
        for server in self.servers:
            server.send_signal(number)


@dataclass(slots=True)
class Measured:
    """Samples by cell, way and name; ``wall``: seconds for each of all requests of a cell, by cell and way."""

    samples: dict[tuple[Cell, str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    wall: dict[tuple[Cell, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    loads: list[float] = field(default_factory=list)
    rounds: int = 0

    def median(self, cell: Cell, way: str, name: str) -> float:
        return statistics.median(self.samples[cell, way, name])

    def per_second(self, cell: Cell, way: str) -> float:
        """Requests."""
        return 1.0 / statistics.median(self.wall[cell, way])

    @property
    def conditions(self) -> str:
        return f"{self.rounds} rounds, load {min(self.loads):.0f} to {max(self.loads):.0f} on {os.cpu_count()} cores"

    def row(self, cell: Cell, ways: Sequence[str], names: Sequence[str], *, against: str) -> str:
        """One line: each name by each way, in ms and over ``against``."""
        told = []
        for name in names:
            base = self.median(cell, against, name)
            figures = [f"{way} {self.median(cell, way, name) * 1e3:.0f} ms" for way in ways]
            ratios = [f"{self.median(cell, way, name) / base:.2f}" for way in ways if way != against]
            told.append(f"{name} {', '.join(figures)} ({', '.join(ratios)})")
        rates = ", ".join(f"{way} {self.per_second(cell, way):.1f}" for way in ways)
        return f"{cell}: {'; '.join(told)}; a second {rates}"


async def measure(pairs: Mapping[str, Pair], cells: Sequence[Cell], *, seed: int) -> Measured:
    """Rounds over all pairs, in alternating order, over all cells and ways."""
    measured, started = Measured(loads=[os.getloadavg()[0]]), time.monotonic()
    with contextlib.ExitStack() as stopped:
        for pair in pairs.values():
            stopped.enter_context(paused(pair))
        while measured.rounds < ROUNDS and time.monotonic() < started + SECONDS:
            measured.rounds += 1
            order = list(pairs.values())
            for pair in order if measured.rounds % 2 else reversed(order):
                async with _its_turn(pair):
                    seed = await _round(pair, cells, measured, seed)
                measured.loads.append(os.getloadavg()[0])
    return measured


async def _round(pair: Pair, cells: Sequence[Cell], measured: Measured, seed: int) -> int:
    for cell in cells:
        for _ in range(cell.times):
            for way, ask in pair.ways.items():
                prompts = [prompt(cell.length, seed + i) for i in range(cell.at_once)]
                seed += cell.at_once
                began = time.monotonic()
                for seconds in await asyncio.gather(*(ask(tokens) for tokens in prompts)):
                    for name, value in seconds.items():
                        measured.samples[cell, way, name].append(value)
                measured.wall[cell, way].append((time.monotonic() - began) / cell.at_once)
    return seed


@contextlib.asynccontextmanager
async def _its_turn(pair: Pair) -> AsyncIterator[None]:
    """A stopped pair goes on for a while."""
    pair.send_signal(signal.SIGCONT)
    try:
        for ask in pair.ways.values():
            for number in range(WARM_REQUESTS):
                await ask(prompt(WARM_TOKENS, 40_000 + number))
        yield
    finally:
        pair.send_signal(signal.SIGSTOP)


@contextlib.contextmanager
def paused(pair: Pair) -> Iterator[None]:
    """It stands still."""
    pair.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        pair.send_signal(signal.SIGCONT)

"""Runs one scenario: spawns the ranks, lets the contestants take turns, verifies the bytes, sums up in medians."""

from __future__ import annotations

import multiprocessing
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from kvbaton.bench.rank import TIMEOUT_SECONDS, BenchRankSpec, serve
from kvbaton.bench.scenario import BenchScenario
from kvbaton.errors import ExpiredError, TransportError

CONTESTANTS = ("memcpy", "raw", "leanest", "kvbaton")
IDLE_SECONDS = 5.0

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchResult:
    """Figures of one scenario. ``seconds`` holds every round of every contestant; a ratio compares medians."""

    scenario: BenchScenario
    seconds: dict[str, list[float]]
    verified_bytes: int
    idle_cpu: dict[str, float] = field(default_factory=dict)
    evidence: str = ""
    cpu_seconds: dict[str, float] = field(default_factory=dict)  #: of all ranks together, a round
    load: float = 0.0  #: of the machine, over the last minute

    def median(self, contestant: str) -> float | None:
        times = self.seconds.get(contestant)
        return statistics.median(times) if times else None

    def least(self, contestant: str) -> float | None:
        """Of the best round."""
        return min(self.seconds.get(contestant, ()), default=None)

    def over(self, contestant: str) -> float | None:
        """kvbaton's median time as a multiple of another's; below 1 is faster."""
        other, ours = self.median(contestant), self.median("kvbaton")
        return ours / other if other and ours else None

    def cpu_per_gigabyte(self, contestant: str) -> float | None:
        """CPU seconds of both sides for each gigabyte that is moved."""
        used = self.cpu_seconds.get(contestant)
        return used / (self.total_bytes / 1e9) if used is not None else None

    @property
    def rooms_per_second(self) -> float:
        """Rooms that kvbaton hands over, at the scenario's concurrency."""
        return self.scenario.rooms / (self.median("kvbaton") or float("inf"))

    @property
    def total_bytes(self) -> int:
        return self.scenario.room_bytes * self.scenario.rooms


class _Rank:
    """The parent's end of one rank's process."""

    def __init__(self, spec: BenchRankSpec) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = f"{spec.side} {spec.rank}"
        self._pipe: Connection
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(spec, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.described: dict[str, Any] = {}
        self.cpu_seconds = 0.0  #: of the last command

    def tell(self, command: str, *arguments: object) -> None:
        self._pipe.send((command, arguments))

    def recv(self) -> tuple[str, Any]:
        if not self._pipe.poll(TIMEOUT_SECONDS):
            raise ExpiredError(f"benchmark rank {self.name} did not answer within {TIMEOUT_SECONDS:g} s")
        try:
            kind, value, self.cpu_seconds = self._pipe.recv()
        except EOFError as error:
            raise TransportError(f"benchmark rank {self.name} died (exit code {self._process.exitcode})") from error
        if kind == "error":
            raise TransportError(f"benchmark rank {self.name}: {value}")
        return kind, value

    def ask(self, command: str, *arguments: object) -> Any:
        self.tell(command, *arguments)
        return self.recv()[1]

    def end(self) -> None:
        self._process.join(5.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._pipe.close()


class TransferBench:
    """All ranks of one scenario. A context manager; leaving it ends every process."""

    def __init__(self, scenario: BenchScenario, transport: str = "nixl") -> None:
        self.scenario = scenario
        self._sources = [
            _Rank(BenchRankSpec(side="source", rank=r, scenario=scenario, transport=transport))
            for r in range(scenario.source_tp)
        ]
        self._targets = [
            _Rank(BenchRankSpec(side="target", rank=r, scenario=scenario, transport=transport))
            for r in range(scenario.target_tp)
        ]

    def __enter__(self) -> TransferBench:
        for rank in (*self._sources, *self._targets):
            rank.described = rank.recv()[1]
        for source in self._sources:
            source.ask("connect", [target.described for target in self._targets])
        for target in self._targets:
            target.ask("expect_writers", [source.described for source in self._sources])
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        for rank in (*self._sources, *self._targets):
            if kind is None:
                rank.ask("stop")
            rank.end()

    def run(self, progress: Progress, *, idle: bool = False, only: Sequence[str] = ()) -> BenchResult:
        """One warm-up of everything, then ``rounds`` rounds in which the contestants (or ``only`` some) take turns."""
        seconds: dict[str, list[float]] = {name: [] for name in only or self._contestants()}
        used = dict.fromkeys(seconds, 0.0)
        verified = 0
        for number in range(self.scenario.rounds + 1):
            for name in seconds:
                progress(f"round {number}/{self.scenario.rounds}: {name}")
                elapsed = self._play(name)
                if number:
                    seconds[name].append(elapsed)
                    used[name] += sum(rank.cpu_seconds for rank in (*self._sources, *self._targets))
                elif name in ("leanest", "kvbaton"):
                    verified = self._verify()
        idle_cpu = {}
        if idle:
            progress(f"idle for {IDLE_SECONDS:g} s")
            ranks = (*self._sources, *self._targets)
            for rank in ranks:
                rank.tell("idle_cpu", IDLE_SECONDS)
            idle_cpu = {rank.name: rank.recv()[1] for rank in ranks}
        return BenchResult(
            scenario=self.scenario,
            seconds=seconds,
            verified_bytes=verified,
            idle_cpu=idle_cpu,
            evidence=self._sources[0].ask("evidence"),
            cpu_seconds={name: total / self.scenario.rounds for name, total in used.items() if name != "memcpy"},
            load=os.getloadavg()[0],
        )

    def open_rooms(self, count: int) -> None:
        """Have so many rooms open that wait for prefill, between every source and target."""
        addresses = [source.described["address"] for source in self._sources]
        for source in self._sources:
            source.ask("open_senders", count)
        for target in self._targets:
            target.ask("open_receivers", count, addresses)

    def _contestants(self) -> tuple[str, ...]:
        """One raw write of the same bytes only means something between two ranks."""
        equal = self.scenario.source_tp == self.scenario.target_tp == 1
        return CONTESTANTS if equal else ("memcpy", "leanest", "kvbaton")

    def _play(self, name: str) -> float:
        if name == "memcpy":
            return float(self._sources[0].ask("memcpy"))
        if name == "kvbaton":
            addresses = [source.described["address"] for source in self._sources]
            for source in self._sources:
                source.tell("kvbaton_send")
            for target in self._targets:
                target.tell("kvbaton_receive", addresses)
            elapsed = max(target.recv()[1] for target in self._targets)
        else:
            for source in self._sources:
                source.tell(f"{name}_send")
            for target in self._targets:
                target.tell(f"{name}_receive")
            elapsed = max(target.recv()[1] for target in self._targets)
        for source in self._sources:
            source.recv()
        return float(elapsed)

    def _verify(self) -> int:
        layouts = [source.described["layout"] for source in self._sources]
        verified = sum(target.ask("verify", layouts) for target in self._targets)
        for target in self._targets:
            target.ask("clear")
        return int(verified)

"""What a room costs beside others that are open and wait for prefill, and the CPU that waiting costs decode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from kvbaton.bench.scenario import BenchScenario
from kvbaton.bench.transfer import BenchResult, TransferBench

#: Open rooms beside which one is measured.
OPEN = (0, 1, 100, 1_000, 10_000)
ROUNDS = 100

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Beside:
    """Figures of one small room beside ``open`` others; ``waiting_cpu``: share of a core that decode uses for them."""

    open: int
    result: BenchResult
    waiting_cpu: float

    @property
    def milliseconds(self) -> float:
        return 1e3 * (self.result.median("kvbaton") or 0.0)


def measure(rounds: int, seed: int, transport: str, progress: Progress) -> list[Beside]:
    """One small room, again and again, beside more and more open ones of the same pair of ranks."""
    scenario = BenchScenario(
        name="131 kB",
        layers=2,
        pages=1,
        rooms=1,
        concurrency=1,
        open_rooms=max(OPEN),
        rounds=max(rounds, ROUNDS),
        seed=seed,
    )
    found = []
    with TransferBench(scenario, transport) as bench:
        for count in OPEN:
            progress(f"opening {count} rooms")
            bench.open_rooms(count)
            result = bench.run(partial(_told, progress, count), idle=True, only=("leanest", "kvbaton"))
            found.append(Beside(open=count, result=result, waiting_cpu=result.idle_cpu["target 0"]))
    return found


def _told(progress: Progress, count: int, text: str) -> None:
    progress(f"beside {count}: {text}")

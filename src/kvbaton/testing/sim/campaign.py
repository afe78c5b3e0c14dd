"""Many seeds on all cores: what they covered, what they broke."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from kvbaton.testing.sim.generate import generate
from kvbaton.testing.sim.world import run

#: Seeds that one worker takes at a time.
BATCH = 25


@dataclass(kw_only=True, slots=True)
class SimFinding:
    """A seed whose run broke an invariant."""

    seed: int
    kind: str
    text: str


@dataclass(kw_only=True, slots=True)
class Summary:
    """Everything that a number of runs showed. ``clean``: runs without a fault; ``seconds`` is simulated time."""

    seeds: int = 0
    steps: int = 0
    seconds: float = 0.0
    findings: list[SimFinding] = field(default_factory=list)
    cells: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    results: Counter[str] = field(default_factory=Counter)

    def add(self, other: Summary) -> None:
        self.seeds += other.seeds
        self.steps += other.steps
        self.seconds += other.seconds
        self.findings += other.findings
        self.cells.update(other.cells)
        self.faults.update(other.faults)
        self.results.update(other.results)


def run_seeds(seeds: Sequence[int]) -> Summary:
    """Run seeds one after the other, in this process; drivers do not warn of what is done to them on purpose."""
    logger = logging.getLogger("kvbaton")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        return _run_seeds(seeds)
    finally:
        logger.setLevel(level)


def _run_seeds(seeds: Sequence[int]) -> Summary:
    summary = Summary()
    for seed in seeds:
        outcome = run(generate(seed))
        summary.seeds += 1
        summary.steps += outcome.steps
        summary.seconds += outcome.seconds
        summary.cells.update(outcome.cells)
        summary.faults.update(outcome.faults)
        summary.results.update(outcome.results)
        if not outcome.ok:
            summary.findings.append(SimFinding(seed=seed, kind=outcome.kind, text=outcome.text))
    return summary


def run_campaign(
    first: int, count: int, *, jobs: int | None = None, on_progress: Callable[[Summary], None] | None = None
) -> Summary:
    """Run ``count`` seeds from ``first`` on with ``jobs`` processes (default: one per core). ``on_progress`` gets each
    batch's summary."""
    jobs = jobs or os.cpu_count() or 1
    batches = [range(at, min(at + BATCH, first + count)) for at in range(first, first + count, BATCH)]
    total = Summary()
    for summary in _run_batches(batches, min(jobs, len(batches))):
        total.add(summary)
        if on_progress is not None:
            on_progress(summary)
    total.findings.sort(key=lambda finding: finding.seed)
    return total


def _run_batches(batches: Sequence[Sequence[int]], jobs: int) -> Iterator[Summary]:
    if jobs <= 1:
        yield from map(run_seeds, batches)
        return
    with multiprocessing.get_context("spawn").Pool(jobs, initializer=_prepare_worker) as pool:
        yield from pool.imap_unordered(run_seeds, batches)


def _prepare_worker() -> None:
    """Runs make cycles, but small ones: collect seldom, and never look at what imports have made."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)

"""What the plan costs: building it, turning pages into table entries, and how many descriptors pages become."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np

from kvbaton.layout import CacheLayout, InteriorOrder, Region, kv_pool, pool_bytes
from kvbaton.plan.pair import make_plan
from kvbaton.plan.runs import merge

HEADS = 8
HEAD_BYTES = 256
PAGE_SIZE = 16
#: The pool is larger than the prompt, so that the runs of neighbouring layers do not touch.
SPARE_PAGES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanCost:
    """Medians, in seconds, for one target rank; ``runs`` are descriptors after merging, pages contiguous."""

    source_tp: int
    target_tp: int
    layers: int
    pages: int
    order: str
    writers: int
    plan_seconds: float
    entries_seconds: float
    entries: int
    runs: int


def measure(
    *, source_tp: int, target_tp: int, layers: int, pages: int, order: InteriorOrder = "HND", rounds: int = 20
) -> PlanCost:
    """Build the plan of target rank 0 and the entries of ``pages`` contiguous pages, ``rounds`` times."""
    sources = [_layout(layers, pages, order, source_tp, rank, side=0) for rank in range(source_tp)]
    target = _layout(layers, pages, order, target_tp, 0, side=1)
    ids = np.arange(pages, dtype=np.int64)
    plan_times, entry_times = [], []
    entries = runs = writers = 0
    for _ in range(rounds):
        start = time.perf_counter()
        plan = make_plan(sources, target)
        built = time.perf_counter()
        posts = [
            (part, part.entries(part.blocks(0, pages * PAGE_SIZE), ids, 0, ids, 0))
            for pair in plan.pairs
            for part in pair.parts
        ]
        plan_times.append(built - start)
        entry_times.append(time.perf_counter() - built)
        writers = len(plan.writers)
        entries = sum(len(source) for _, (source, _) in posts)
        runs = sum(len(merge(part.source.table, s, part.target.table, t)) for part, (s, t) in posts)
    return PlanCost(
        source_tp=source_tp,
        target_tp=target_tp,
        layers=layers,
        pages=pages,
        order=order,
        writers=writers,
        plan_seconds=statistics.median(plan_times),
        entries_seconds=statistics.median(entry_times),
        entries=entries,
        runs=runs,
    )


def _layout(layers: int, pages: int, order: InteriorOrder, tp_size: int, tp_rank: int, *, side: int) -> CacheLayout:
    pool = kv_pool(
        range(layers),
        pages=pages + SPARE_PAGES,
        page_size=PAGE_SIZE,
        heads=HEADS,
        head_bytes=HEAD_BYTES,
        dtype="bfloat16",
        order=order,
        tp_size=tp_size,
        tp_rank=tp_rank,
    )
    return CacheLayout("bench", (Region((1 + side * 32 + tp_rank) << 44, pool_bytes(pool)),), (pool,))

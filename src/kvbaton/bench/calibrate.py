"""Measures what the cost model is made of, on this machine, over the transport that will be used.

Descriptor and wire cost come from rooms of many small pages against rooms of the same bytes in one piece; copy and
piece cost from gather and scatter of large and of small pieces; the fixed cost of staging is the rest of the difference
between a small staged room and a small direct one. The best of many rounds counts: whatever else the machine does only
adds to them.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from kvbaton.bench.scenario import HEADS, BenchScenario, buffer
from kvbaton.bench.transfer import TransferBench
from kvbaton.layout import CacheLayout, Region, kv_pool, pool_bytes
from kvbaton.plan.costs import Costs
from kvbaton.plan.pair import PartPlan, pair_plan
from kvbaton.runtime.gather import gather, scatter

ROUNDS = 15
PAGE_SIZE = 64
#: Of a descriptor: as small as those that staging is an alternative to, since NIXL's cost of one depends on its size.
RUN_BYTES = 512
Progress = Callable[[str], None]


def calibrate(progress: Progress) -> Costs:
    """Costs of this machine, from about half a minute of measuring."""
    progress("descriptors and wire")
    small, count = _room_seconds(item_bytes=RUN_BYTES, pages=2048)
    whole, _ = _room_seconds(item_bytes=RUN_BYTES, pages=2048, contiguous=True)
    size = count * RUN_BYTES
    wire = whole / size
    descriptor = max(0.0, small - whole) / count
    progress("gather and scatter")
    copy, piece = _copy_costs()
    progress("the fixed cost of staging")
    fixed = _staged_fixed(copy, piece)
    return Costs(
        descriptor_seconds=descriptor,
        wire_byte_seconds=wire,
        copy_byte_seconds=copy,
        piece_seconds=piece,
        staged_seconds=fixed,
    )


def _room_seconds(*, item_bytes: int, pages: int, contiguous: bool = False) -> tuple[float, int]:
    """Seconds of one leanest room, and its descriptors when pages are shuffled."""
    scenario = BenchScenario(
        layers=4,
        pages=pages,
        item_bytes=item_bytes,
        rooms=2,
        concurrency=1,
        order="contiguous" if contiguous else "shuffled",
        rounds=ROUNDS,
    )
    with TransferBench(scenario) as bench:
        result = bench.run(lambda _text: None, only=("leanest",))
    return (result.least("leanest") or 0.0) / scenario.rooms, 4 * 2 * pages


def _copy_costs() -> tuple[float, float]:
    """Seconds a byte for large pieces, and extra seconds a small piece costs; gather and scatter together, of the same
    bytes in more and in fewer pieces, more than caches hold."""
    large, large_pieces, size = _copy_seconds(head_bytes=4096, pages=8)
    small, small_pieces, _ = _copy_seconds(head_bytes=64, pages=512)
    return large / size, max(0.0, small - large) / (small_pieces - large_pieces)


def _copy_seconds(head_bytes: int, pages: int) -> tuple[float, int, int]:
    """(seconds, pieces, bytes) of one gather and scatter, TP 4 to 1 with tokens outermost."""
    source_memory, source = _layout(head_bytes, pages, 4, seed=1)
    target_memory, target = _layout(head_bytes, pages, 1, seed=None)
    part: PartPlan = pair_plan(source, target).parts[0]
    order = np.random.default_rng(0).permutation(pages).astype(np.int64)
    blocks = part.blocks(0, pages * PAGE_SIZE)
    read, written = part.source_blocks(blocks, order, 0), part.target_blocks(blocks, order[::-1].copy(), 0)
    through = np.zeros((len(blocks), part.block_bytes), dtype=np.uint8)
    times = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        gather(part.source_lanes, read, through.ctypes.data)
        scatter(part.target_lanes, written, through.ctypes.data)
        times.append(time.perf_counter() - start)
    if not (source_memory.any() and target_memory.any()):
        raise AssertionError("nothing was copied")
    return min(times), len(blocks) * len(part.lane_bytes), through.nbytes


def _layout(head_bytes: int, pages: int, tp_size: int, *, seed: int | None) -> tuple[np.ndarray, CacheLayout]:
    pool = kv_pool(
        range(2),
        pages=pages,
        page_size=PAGE_SIZE,
        heads=HEADS,
        head_bytes=head_bytes,
        dtype="bytes",
        order="NHD",
        tp_size=tp_size,
    )
    memory = buffer(pool_bytes(pool), seed=seed)
    return memory, CacheLayout("bench", (Region(memory.ctypes.data, len(memory)),), (pool,))


def _staged_fixed(copy: float, piece: float) -> float:
    """What a staged room costs beyond its copies, against a direct one."""
    seconds = {}
    for policy in ("never", "always"):
        scenario = BenchScenario(
            layers=2,
            pages=1,
            item_bytes=HEADS * PAGE_SIZE * 16,
            rooms=1,
            concurrency=1,
            page_size=PAGE_SIZE,
            staging="always" if policy == "always" else "never",
            rounds=2 * ROUNDS,
        )
        with TransferBench(scenario) as bench:
            result = bench.run(lambda _text: None, only=("kvbaton",))
        seconds[policy] = result.least("kvbaton") or 0.0
    extra = seconds["always"] - seconds["never"] - copy * scenario.room_bytes - piece * 4
    return max(1e-5, extra)

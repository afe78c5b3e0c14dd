"""Staging against direct writes over run length and size: when it pays, and whether the cost model knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from kvbaton.bench.scenario import HEADS, BenchScenario
from kvbaton.bench.transfer import TransferBench
from kvbaton.layout import InteriorOrder
from kvbaton.plan.costs import Costs
from kvbaton.plan.pair import pair_plan

SOURCE_TP = 4
LAYERS = 8
#: Bytes of the pieces of a token, and pages of a room: the grid.
RUN_BYTES = (64, 128, 256, 512, 1024, 2048, 4096, 16384)
ROOM_PAGES = (1, 4, 16, 64)
#: Most bytes of a room in the grid.
MOST_BYTES = 64 << 20

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One size: the best round of a room, directly, staged, and between equal groups (the same bytes, no pieces)."""

    run_bytes: int
    pages: int
    page_size: int
    interior: InteriorOrder
    room_bytes: int
    direct_seconds: float
    staged_seconds: float
    equal_seconds: float
    prefers_staging: bool

    @property
    def staging_is_faster(self) -> bool:
        return self.staged_seconds < self.direct_seconds

    @property
    def regret(self) -> float:
        """Time of the way the cost model picks, over the time of the faster way; 1 where it is right."""
        picked = self.staged_seconds if self.prefers_staging else self.direct_seconds
        return picked / min(self.staged_seconds, self.direct_seconds)


def scenario(run_bytes: int, pages: int, rounds: int, page_size: int, interior: InteriorOrder) -> BenchScenario:
    """TP 4 to 1: a token of a layer falls into pieces of ``run_bytes``. They are alone where tokens are outermost
    (NHD), and those of a page lie together where heads are (HND)."""
    return BenchScenario(
        name=f"{run_bytes} B runs, {pages} pages",
        layers=LAYERS,
        pages=pages,
        item_bytes=run_bytes * SOURCE_TP * page_size,
        rooms=1,
        concurrency=1,
        source_tp=SOURCE_TP,
        page_size=page_size,
        interior=interior,
        rounds=rounds,
    )


def measure(direct: BenchScenario, costs: Costs, progress: Progress) -> Point:
    """One point of the grid: three pairs of groups, one after the other."""
    seconds = {}
    for name, one in (
        ("direct", direct),
        ("staged", replace(direct, staging="always")),
        ("equal", replace(direct, source_tp=1)),
    ):
        progress(f"{direct.name}: {name}")
        with TransferBench(one) as bench:
            result = bench.run(lambda _text: None, only=("kvbaton",))
            if result.verified_bytes != result.total_bytes:
                raise AssertionError(f"{one.name}: {result.verified_bytes} of {result.total_bytes} bytes verified")
            seconds[name] = result.least("kvbaton") or 0.0
    part = pair_plan(direct.layout(1 << 40, SOURCE_TP, 0), direct.layout(2 << 40, 1, 0)).parts[0]
    return Point(
        run_bytes=direct.run_bytes,
        pages=direct.pages,
        page_size=direct.page_size,
        interior=direct.interior,
        room_bytes=direct.room_bytes,
        direct_seconds=seconds["direct"],
        staged_seconds=seconds["staged"],
        equal_seconds=seconds["equal"],
        prefers_staging=costs.prefers_staging(part, len(part.blocks(0, direct.tokens))),
    )


def grid(rounds: int, page_size: int, interior: InteriorOrder) -> Iterator[BenchScenario]:
    """Every point."""
    for run_bytes in RUN_BYTES:
        for pages in ROOM_PAGES:
            if run_bytes % (HEADS // SOURCE_TP) == 0:
                point = scenario(run_bytes, pages, rounds, page_size, interior)
                if point.room_bytes <= MOST_BYTES:
                    yield point

"""The verifier finds what it is there to find."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from kvbaton.errors import LayoutError
from kvbaton.layout import CacheLayout, Region, kv_pool, pool_bytes
from kvbaton.plan.pair import pair_plan
from kvbaton.plan.runs import Runs
from kvbaton.plan.verify import check_bounds, check_disjoint


def layout(base: int) -> CacheLayout:
    pool = kv_pool([0], pages=4, page_size=4, heads=2, head_bytes=8, dtype="u1")
    return CacheLayout("m", (Region(base, pool_bytes(pool)),), (pool,))


SOURCE, TARGET = layout(1 << 40), layout(1 << 41)


def test_a_plan_stays_within_its_regions() -> None:
    check_bounds(pair_plan(SOURCE, TARGET), SOURCE, TARGET)


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("change", [{"length": 511}, {"address": (1 << 40) + 1}, {"address": 1 << 30}])
def test_a_row_outside_is_named_with_its_side(side: str, change: dict[str, int]) -> None:
    pair = pair_plan(SOURCE, TARGET)
    sides = {"source": SOURCE, "target": TARGET}
    smaller = msgspec.structs.replace(sides[side].regions[0], **change)
    if side == "target" and "address" in change:
        smaller = msgspec.structs.replace(smaller, address=change["address"] << 1)
    sides[side] = msgspec.structs.replace(sides[side], regions=(smaller,))
    with pytest.raises(LayoutError, match=rf"part kv layers 0..0 items 0..1, {side}: table row .* outside"):
        check_bounds(pair, sides["source"], sides["target"])


def runs(*targets: int, length: int = 8) -> Runs:
    at = np.array(targets, dtype=np.int64)
    return Runs(source=at, target=at, length=np.full(len(at), length, dtype=np.int64))


def test_writes_that_touch_are_disjoint() -> None:
    check_disjoint([runs(0, 16), runs(8, 24)])
    check_disjoint([runs()])


@pytest.mark.parametrize("writes", [[runs(0, 7)], [runs(0), runs(0)], [runs(24, 0), runs(20)]])
def test_a_byte_that_is_written_twice_is_named(writes: list[Runs]) -> None:
    with pytest.raises(LayoutError, match="two runs write the byte at"):
        check_disjoint(writes)

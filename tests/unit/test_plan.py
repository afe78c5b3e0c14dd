"""The plan in small: parts, blocks, entries, digests, gaps. Whole topologies are in tests/property."""

from __future__ import annotations

import re

import msgspec
import numpy as np
import pytest

from kvbaton.errors import IncompatibleError, LayoutError
from kvbaton.layout import Axis, CacheLayout, Pool, Region, aux_pool, index_pool, kv_pool, pool_bytes
from kvbaton.plan.pair import (
    MAX_ROWS,
    MOST_ITEMS_SHOWN,
    PartId,
    PartPlan,
    check_coverage,
    make_plan,
    overlap,
    pair_plan,
)


def layout(
    *, base: int = 1 << 40, layers: range = range(2), tp: int = 1, rank: int = 0, aux: bool = True, **kv: object
):
    settings = {"pages": 8, "page_size": 4, "heads": 4, "head_bytes": 2, "dtype": "u1"} | kv
    pool = kv_pool(layers, tp_size=tp, tp_rank=rank, **settings)
    pools: list[Pool] = [pool]
    regions = [Region(base, pool_bytes(pool))]
    if aux:
        pools.append(aux_pool(slots=3, slot_bytes=8, tp_size=tp, tp_rank=rank, region=1))
        regions.append(Region(base + (1 << 32), 24))
    made = CacheLayout("m", tuple(regions), tuple(pools))
    made.validate()
    return made


TARGET = layout(base=1 << 41)


def part_of(source: CacheLayout, target: CacheLayout, pool: str = "kv") -> PartPlan:
    return next(part for part in pair_plan(source, target).parts if part.id.pool == pool)


def test_equal_layouts_have_one_part_for_each_pool() -> None:
    pair = pair_plan(layout(), TARGET)
    assert [part.id for part in pair.parts] == [PartId("kv", 0, 2, 0, 4), PartId("aux", -1, 0, 0, 1)]
    assert [str(part.id) for part in pair.parts] == ["kv layers 0..1 items 0..3", "aux items 0..0"]


def test_equal_layouts_move_a_page_of_a_tensor_as_one_piece() -> None:
    part = part_of(layout(), TARGET)
    assert part.lane_bytes.tolist() == [4 * 4 * 2] * 4  # two layers, k and v
    assert part.block_bytes == 128
    assert part.source.blocks_per_unit == part.target.blocks_per_unit == 1


@pytest.mark.parametrize(
    ("source", "target", "lanes"),
    [("page", "page", [64] * 2), ("page", "none", [32] * 4), ("none", "page", [32] * 4)],
)
def test_tensors_that_lie_side_by_side_on_both_sides_move_as_one_piece(
    source: str, target: str, lanes: list[int]
) -> None:
    part = part_of(layout(fusion=source), layout(base=1 << 41, fusion=target))
    assert part.lane_bytes.tolist() == lanes


def test_another_interior_order_falls_into_items() -> None:
    part = part_of(layout(order="NHD"), TARGET)
    assert set(part.lane_bytes.tolist()) == {2}
    assert part.block_bytes == 128


def test_fewer_heads_move_what_overlaps() -> None:
    parts = [part_of(layout(tp=4, rank=rank), TARGET) for rank in range(4)]
    assert [(part.id.item_start, part.id.item_stop) for part in parts] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert sum(part.block_bytes for part in parts) == 128


def test_pages_of_different_size_move_in_their_common_divisor() -> None:
    part = part_of(layout(page_size=6), TARGET)
    assert part.block_rows == 2
    assert (part.source.blocks_per_unit, part.target.blocks_per_unit) == (3, 2)
    assert (part.source.unit_rows, part.target.unit_rows) == (6, 4)


def pooled(page_size: int, row_tokens: int) -> CacheLayout:
    """Keys that ``row_tokens`` tokens share."""
    pool = index_pool([0], pages=2, page_size=page_size, key_bytes=4, dtype="x", row_tokens=row_tokens)
    return CacheLayout("m", (Region(1 << 40, pool_bytes(pool)),), (pool,))


@pytest.mark.parametrize(
    ("source", "target"),
    [
        pytest.param(pooled(4, 1), pooled(4, 2), id="blocks of 4 rows and of 2"),
        pytest.param(pooled(12, 4), pooled(6, 6), id="blocks of 1 row and a half in the source"),
        pytest.param(pooled(6, 6), pooled(12, 4), id="blocks of 1 row and a half in the target"),
    ],
)
def test_blocks_that_are_not_as_many_whole_rows_on_both_sides_are_refused(
    source: CacheLayout, target: CacheLayout
) -> None:
    with pytest.raises(LayoutError, match="do not pair; use the same page size"):
        pair_plan(source, target)


def test_a_replica_that_is_not_elected_is_a_bystander() -> None:
    sources = [layout(heads=1, tp=2, rank=rank) for rank in range(2)]
    plan = make_plan(sources, layout(base=1 << 41, heads=1))
    assert plan.writers == (0,)
    assert plan.pairs[1].parts == ()


def test_pipeline_stages_pair_by_layer() -> None:
    sources = [layout(layers=range(1), aux=False), layout(layers=range(1, 2))]
    plan = make_plan(sources, TARGET)
    assert [[str(part.id) for part in pair.parts] for pair in plan.pairs] == [
        ["kv layers 0..0 items 0..3"],
        ["kv layers 1..1 items 0..3", "aux items 0..0"],
    ]


@pytest.mark.parametrize(
    ("start", "stop", "blocks"),
    [(0, 0, 0), (8, 8, 0), (9, 4, 0), (0, 1, 1), (0, 4, 1), (0, 5, 2), (4, 9, 2), (8, 9, 1)],
)
def test_blocks_of_a_token_range(start: int, stop: int, blocks: int) -> None:
    part = part_of(layout(), TARGET)
    assert len(part.blocks(start, stop)) == blocks
    assert part.bytes(start, stop) == blocks * part.block_bytes


def test_a_range_begins_at_the_common_granularity() -> None:
    with pytest.raises(LayoutError, match=r"token 2 is no multiple of 4"):
        part_of(layout(), TARGET).blocks(2, 8)
    assert len(part_of(layout(page_size=2), TARGET).blocks(2, 8)) == 3


def test_a_slot_is_one_block_whatever_the_tokens() -> None:
    aux = part_of(layout(), TARGET, "aux")
    assert not aux.paged
    assert aux.blocks(3, 99) == range(1)
    assert aux.bytes(0, 0) == 8


def test_entries_name_the_memory_of_their_pages() -> None:
    source = layout(page_size=8)
    part = part_of(source, TARGET)
    s_units, t_units = np.array([5, 2]), np.array([7, 1, 0])
    s_entries, t_entries = part.entries(part.blocks(8, 20), s_units, 1, t_units, 2)
    t_at = part.target.table.addresses(t_entries)
    plane = TARGET.pools[0].planes[0]
    page = {7: 0, 1: 0, 0: 0}
    for address in t_at.tolist():
        offset = address - TARGET.regions[0].address - plane.offset
        if offset < 8 * plane.unit_stride:
            page[offset // plane.unit_stride] += 1
    assert all(page.values())
    assert set(page) == {7, 1, 0}
    assert len(s_entries) == len(t_entries)
    assert part.source.table.lengths(s_entries).tolist() == part.target.table.lengths(t_entries).tolist()


def test_a_digest_covers_both_memories_and_the_geometry() -> None:
    digests = {
        pair_plan(source, target).digest
        for source, target in (
            (layout(), TARGET),
            (layout(base=1 << 42), TARGET),
            (layout(), layout(base=1 << 43)),
            (layout(page_size=8), TARGET),
            (layout(), layout(base=1 << 41, pages=9)),
        )
    }
    assert len(digests) == 5
    assert pair_plan(layout(), TARGET).digest == pair_plan(layout(), TARGET).digest


def test_what_nobody_writes_is_named() -> None:
    with pytest.raises(
        IncompatibleError, match=r"'kv' layer 1 plane 'k'.*needs items \[0, 1, 2, 3\].*write \[\]"
    ) as error:
        check_coverage([layout(layers=range(1))], TARGET)
    assert error.value.field == "kv.1.k"
    with pytest.raises(IncompatibleError, match=r"write \[0, 1\]"):
        check_coverage([layout(tp=2, rank=0)], TARGET)


def test_few_items_are_named_by_number_however_high_and_many_by_their_range() -> None:
    few, many = (layout(base=1 << 41, heads=128, tp=tp, rank=tp - 1) for tp in (64, 1))
    with pytest.raises(IncompatibleError, match=r"needs items \[126, 127\] once each"):
        check_coverage([], few)
    with pytest.raises(IncompatibleError, match=r"needs items \[0\.\.127\] once each"):
        check_coverage([], many)


@pytest.mark.parametrize(
    ("heads", "named"),
    [(MOST_ITEMS_SHOWN, list(range(MOST_ITEMS_SHOWN))), (MOST_ITEMS_SHOWN + 1, f"[0..{MOST_ITEMS_SHOWN}]")],
)
def test_as_many_items_as_the_bound_says_are_named_by_number(heads: int, named: object) -> None:
    with pytest.raises(IncompatibleError, match=re.escape(f"needs items {named} once each")):
        check_coverage([], layout(base=1 << 41, heads=heads))


def test_what_two_ranks_write_is_named() -> None:
    with pytest.raises(IncompatibleError, match=r"write \[0, 1, 2, 3, 0, 1, 2, 3\]"):
        check_coverage([layout(), layout()], TARGET)


def test_a_pairing_of_too_many_pieces_is_refused() -> None:
    rows = MAX_ROWS
    source, target = (
        layout(page_size=size, pages=1, heads=2, head_bytes=1, order=order)
        for size, order in ((rows, "HND"), (rows, "NHD"))
    )
    with pytest.raises(LayoutError, match="a block falls into more than"):
        pair_plan(source, target)


def test_rows_are_counted_over_all_layers_and_pieces() -> None:
    """Fewer pieces a layer than the bound, more in all."""
    source, target = (
        layout(layers=range(4), page_size=MAX_ROWS // 16, pages=1, heads=8, head_bytes=1, order=order)
        for order in ("HND", "NHD")
    )
    with pytest.raises(LayoutError, match="the pairing needs more than"):
        pair_plan(source, target)


def test_a_pairing_may_have_as_many_rows_as_the_bound_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers, K and V of each, one piece each."""
    monkeypatch.setattr("kvbaton.plan.pair.MAX_ROWS", 4)
    assert len(part_of(layout(), TARGET).source.table.rows) == 4
    monkeypatch.setattr("kvbaton.plan.pair.MAX_ROWS", 3)
    with pytest.raises(LayoutError, match="the pairing needs more than 3 table rows"):
        pair_plan(layout(), TARGET)


def test_more_entries_than_32_bits_number_are_refused() -> None:
    pool = kv_pool([0], pages=1 << 30, page_size=1, heads=1, head_bytes=1, dtype="u1")
    huge = CacheLayout("m", (Region(0, pool_bytes(pool)),), (pool,))
    with pytest.raises(LayoutError, match="table entries; use larger pages"):
        pair_plan(huge, huge)


def test_pools_that_the_other_side_lacks_take_no_part() -> None:
    source = layout()
    only_aux = msgspec.structs.replace(source, pools=source.pools[1:])
    assert [part.id.pool for part in pair_plan(only_aux, TARGET).parts] == ["aux"]
    assert [part.id.pool for part in pair_plan(TARGET, only_aux).parts] == ["aux"]
    assert pair_plan(msgspec.structs.replace(source, pools=()), TARGET).parts == ()


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_replicas_share_the_targets(heads: int) -> None:
    """With more ranks than heads on both sides each elected replica serves some targets, none serves all."""
    served = {
        source: sum(bool(overlap(Axis(heads, 16, source), Axis(heads, 16, target))) for target in range(16))
        for source in range(16)
    }
    assert set(served.values()) == {1}

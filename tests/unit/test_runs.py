"""Runs: what is adjacent on both sides is one."""

from __future__ import annotations

import numpy as np
import pytest

from kvbaton.layout import CacheLayout, Region, kv_pool, pool_bytes
from kvbaton.plan.pair import PartPlan, pair_plan
from kvbaton.plan.runs import Runs, merge
from kvbaton.plan.table import Table


def layout(base: int, **changes: object) -> CacheLayout:
    settings = {"pages": 16, "page_size": 4, "heads": 2, "head_bytes": 8, "dtype": "u1"} | changes
    pool = kv_pool(range(3), **settings)  # type: ignore[arg-type]
    return CacheLayout("m", (Region(base, pool_bytes(pool)),), (pool,))


def runs_of(part: PartPlan, s_pages: list[int], t_pages: list[int], tokens: int) -> Runs:
    s_entries, t_entries = part.entries(part.blocks(0, tokens), np.array(s_pages), 0, np.array(t_pages), 0)
    return merge(part.source.table, s_entries, part.target.table, t_entries)


@pytest.fixture
def part() -> PartPlan:
    return pair_plan(layout(1 << 40), layout(1 << 41)).parts[0]


def test_contiguous_pages_cost_one_run_for_each_layer_and_tensor(part: PartPlan) -> None:
    runs = runs_of(part, [2, 3, 4, 5], [7, 8, 9, 10], 16)
    assert len(runs) == 3 * 2
    assert runs.bytes == part.bytes(0, 16)
    assert set(runs.length.tolist()) == {4 * 4 * 2 * 8}


def test_a_whole_pool_is_one_run() -> None:
    part = pair_plan(layout(1 << 40), layout(1 << 41)).parts[0]
    assert len(runs_of(part, list(range(16)), list(range(16)), 64)) == 1


@pytest.mark.parametrize(
    ("s_pages", "t_pages", "per_tensor"),
    [([2, 3, 9, 10], [7, 8, 9, 10], 2), ([2, 3, 4, 5], [10, 9, 8, 7], 4), ([5, 2, 9, 0], [1, 3, 5, 7], 4)],
)
def test_what_is_apart_on_one_side_stays_apart(
    part: PartPlan, s_pages: list[int], t_pages: list[int], per_tensor: int
) -> None:
    assert len(runs_of(part, s_pages, t_pages, 16)) == 6 * per_tensor


def test_smaller_pages_on_one_side_cost_no_more_runs_where_they_are_contiguous() -> None:
    part = pair_plan(layout(1 << 40, page_size=8, order="NHD"), layout(1 << 41, order="NHD")).parts[0]
    assert len(runs_of(part, [2, 3], [4, 5, 6, 7], 16)) == 6


def test_runs_are_in_the_memory_that_the_tables_name(part: PartPlan) -> None:
    runs = runs_of(part, [2, 3], [9, 8], 8)
    assert ((runs.source >= 1 << 40) & (runs.source < 1 << 41)).all()
    assert (runs.target >= 1 << 41).all()


def test_nothing_is_no_run() -> None:
    table = Table(rows=np.array([[0, 8, 0, 8, 4]], dtype=np.int64))
    nothing = np.empty(0, dtype=np.int32)
    runs = merge(table, nothing, table, nothing)
    assert len(runs) == 0
    assert runs.bytes == 0


def test_entries_are_numbered_row_by_row() -> None:
    table = Table(rows=np.array([[1000, 8, 0, 16, 3], [5000, 4, 0, 4, 2]], dtype=np.int64))
    entries = np.arange(5, dtype=np.int32)
    assert table.addresses(entries).tolist() == [1000, 1016, 1032, 5000, 5004]
    assert table.lengths(entries).tolist() == [8, 8, 8, 4, 4]

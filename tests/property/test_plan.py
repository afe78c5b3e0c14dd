"""Every target byte is written exactly once, with the right value, for every topology; against a naive reshard."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import Group, Memory, make_group
from numpy.typing import NDArray

from kvbaton.layout import Axis, CacheLayout, Plane, Pool
from kvbaton.plan import make_plan, overlap
from kvbaton.runs import Runs, merge
from kvbaton.verify import check_bounds, check_disjoint

SIZES = (1, 2, 4, 8, 16)
Ids = NDArray[np.int64]
Slots = tuple[int, int]


@pytest.mark.parametrize("heads", SIZES)
def test_every_item_is_written_exactly_once(heads: int) -> None:
    for sources in SIZES:
        for targets in SIZES:
            for target_rank in range(targets):
                target = Axis(heads, targets, target_rank)
                written = sorted(i for p in range(sources) for i in overlap(Axis(heads, sources, p), target))
                wanted = list(range(target.first, target.first + target.width))
                assert written == wanted, (sources, targets, target_rank)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Group, Group, int, int]:
    heads = draw(st.sampled_from((1, 2, 4, 6, 8)), label="heads")
    layers = draw(st.integers(1, 4), label="layers")
    head_bytes = draw(st.sampled_from((2, 8)), label="head_bytes")
    groups = []
    for side in (0, 1):
        tp = draw(st.sampled_from([t for t in (1, 2, 3, 4, 8) if heads % t == 0 or t % heads == 0]), label="tp")
        groups.append(
            make_group(
                side=side,
                heads=heads,
                layers=layers,
                head_bytes=head_bytes,
                page_size=draw(st.sampled_from((1, 2, 4, 6, 8)), label="page_size"),
                tp=tp,
                pp=draw(st.integers(1, min(3, layers)), label="pp"),
                order=draw(st.sampled_from(("HND", "NHD", "fused")), label="order"),
            )
        )
    tokens = draw(st.integers(1, 40), label="tokens")
    common = math.lcm(groups[0].page_size, groups[1].page_size)
    prefix = draw(st.integers(0, tokens // common), label="prefix") * common
    return groups[0], groups[1], tokens, min(prefix, tokens)


@given(case=cases(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_bytes_equal_a_naive_reshard(case: tuple[Group, Group, int, int], seed: int) -> None:
    source, target, tokens, prefix = case
    rng = np.random.default_rng(seed)
    source_memory, target_memory = Memory(source.layouts, rng), Memory(target.layouts)
    make_replicas_equal(source, source_memory)
    source_pages = rng.permutation(source.pages)[: -(-tokens // source.page_size)]
    first_page = prefix // target.page_size
    target_pages = rng.permutation(target.pages)[: max(0, -(-tokens // target.page_size) - first_page)]
    slots = (int(rng.integers(4)), int(rng.integers(4)))
    for layout in target.layouts:
        runs = write(source, layout, source_pages, target_pages, prefix, tokens, slots)
        check_disjoint(runs)
        for run in runs:
            for s, t, n in zip(run.source, run.target, run.length, strict=True):
                target_memory.view(int(t), int(n))[:] = source_memory.view(int(s), int(n))
    expect_resharded(source, target, source_memory, target_memory, source_pages, target_pages, prefix, tokens, slots)


def write(
    source: Group, target: CacheLayout, source_pages: Ids, target_pages: Ids, prefix: int, tokens: int, slots: Slots
) -> list[Runs]:
    plan = make_plan(source.layouts, target)
    runs = []
    for layout, pair in zip(source.layouts, plan.pairs, strict=True):
        check_bounds(pair, layout, target)
        for part in pair.parts:
            blocks = part.blocks(prefix, tokens)
            s_units, t_units = source_pages, target_pages
            if not part.paged:
                s_units, t_units = np.array([slots[0]]), np.array([slots[1]])
            first = prefix // part.target.unit_rows if part.paged else 0
            entries = part.entries(blocks, s_units.astype(np.int64), 0, t_units.astype(np.int64), first)
            run = merge(part.source.table, entries[0], part.target.table, entries[1])
            assert run.bytes == part.bytes(prefix, tokens)
            runs.append(run)
    return runs


def expect_resharded(
    source: Group,
    target: Group,
    source_memory: Memory,
    target_memory: Memory,
    source_pages: Ids,
    target_pages: Ids,
    prefix: int,
    tokens: int,
    slots: Slots,
) -> None:
    """Item by item: what a token's item is on the target equals what it is on a source rank that has it."""
    first_page = prefix // target.page_size
    for layout in target.layouts:
        for pool in layout.pools:
            for plane in pool.planes:
                for item in range(plane.axis.first, plane.axis.first + plane.axis.width):
                    positions = range(prefix, tokens) if pool.paged else range(1)
                    for token in positions:
                        got = target_memory.item(
                            layout,
                            plane,
                            int(target_pages[token // pool.rows - first_page]) if pool.paged else slots[1],
                            token % pool.rows,
                            item,
                        )
                        owner, s_pool, s_plane = find_owner(source, pool.name, plane.layer, plane.name, item)
                        unit = int(source_pages[token // s_pool.rows]) if pool.paged else slots[0]
                        wanted = source_memory.item(owner, s_plane, unit, token % s_pool.rows, item)
                        np.testing.assert_array_equal(got, wanted)


def make_replicas_equal(source: Group, memory: Memory) -> None:
    """Ranks that hold the same item hold the same bytes, as in a real model."""
    for layout in source.layouts:
        for pool in layout.pools:
            for plane in pool.planes:
                for item in range(plane.axis.first, plane.axis.first + plane.axis.width):
                    owner, _, s_plane = find_owner(source, pool.name, plane.layer, plane.name, item)
                    if owner is not layout:
                        for unit in range(pool.units):
                            for row in range(pool.rows):
                                original = memory.item(owner, s_plane, unit, row, item)
                                memory.item(layout, plane, unit, row, item)[:] = original


def find_owner(source: Group, pool_name: str, layer: int, name: str, item: int) -> tuple[CacheLayout, Pool, Plane]:
    for layout in source.layouts:
        for pool in layout.pools:
            for plane in pool.planes:
                axis = plane.axis
                if (pool.name, plane.layer, plane.name) == (pool_name, layer, name) and (
                    axis.first <= item < axis.first + axis.width
                ):
                    return layout, pool, plane
    raise AssertionError(f"nobody has {pool_name} {layer} {name} {item}")


@given(case=cases(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_bytes_outside_the_grant_stay_untouched(case: tuple[Group, Group, int, int], seed: int) -> None:
    source, target, tokens, prefix = case
    rng = np.random.default_rng(seed)
    source_memory, target_memory = Memory(source.layouts, rng), Memory(target.layouts)
    source_pages = rng.permutation(source.pages)[: -(-tokens // source.page_size)]
    first_page = prefix // target.page_size
    target_pages = rng.permutation(target.pages)[: max(0, -(-tokens // target.page_size) - first_page)]
    allowed = Memory(target.layouts)
    for layout in target.layouts:
        for run in write(source, layout, source_pages, target_pages, prefix, tokens, (0, 1)):
            for s, t, n in zip(run.source, run.target, run.length, strict=True):
                target_memory.view(int(t), int(n))[:] = source_memory.view(int(s), int(n))
        for pool in layout.pools:
            for plane in pool.planes:
                for unit in target_pages if pool.paged else [1]:
                    for row in range(pool.rows):
                        for item in range(plane.axis.first, plane.axis.first + plane.axis.width):
                            allowed.item(layout, plane, int(unit), row, item)[:] = 1
    for touched, permitted in zip(target_memory.everything(), allowed.everything(), strict=True):
        assert not (touched.astype(bool) & ~permitted.astype(bool)).any()

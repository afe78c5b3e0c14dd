"""Chunks of any layers in any order: each byte goes once, never before it was handed in, and nothing is left over."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from groups import Cut, Model, Prompt, make_group
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from property_cases import share
from test_plan import cases

from kvbaton.errors import LayoutError, LocalProtocolError
from kvbaton.layout import CacheLayout, Pool, Region, kv_pool, window_range
from kvbaton.plan.coverage import Coverage
from kvbaton.plan.pair import PartPlan, make_plan

Rectangle = tuple[int, int, tuple[int, int] | None]


def layers_of_lanes(layout: CacheLayout, pool: Pool, part: PartPlan) -> list[set[int]]:
    """The layers whose bytes a lane has in its first block, told by addresses alone."""
    found = []
    for row in part.source.table.rows[:: part.source.blocks_per_unit].tolist():
        start, stop = row[0], row[0] + row[1]
        lane = set()
        for plane in pool.planes:
            at = layout.regions[plane.region].address + plane.offset
            rows, items = np.arange(pool.rows_of(plane)), np.arange(plane.axis.width)
            begins = at + rows[:, None] * plane.row_stride + items[None, :] * plane.item_stride
            if ((begins >= start) & (begins < stop)).any() or (
                (begins <= start) & (begins + plane.item_bytes > start)
            ).any():
                lane.add(plane.layer)
        found.append(lane)
    return found


@st.composite
def schedules(draw: st.DrawFn, tokens: int, page: int, layers: int) -> list[Rectangle]:
    """Chunks that cover all layers of all tokens: in each layer in token order, otherwise as it comes; whole chunks
    and layers that come again in between."""
    edges = draw(
        st.lists(st.sampled_from(range(page, tokens, page) or [tokens]), max_size=3, unique=True), label="edges"
    )
    stops = sorted({*(edge for edge in edges if edge < tokens), tokens})
    cuts = sorted({0, layers, *draw(st.lists(st.integers(0, layers), max_size=3), label="cuts")})
    bands = list(pairwise(cuts))
    done = dict.fromkeys(bands, 0)
    made: list[Rectangle] = []
    while any(number < len(stops) for number in done.values()):
        if draw(st.integers(0, 5)) == 0:  # a whole chunk: as far as every layer may go
            number = min(done.values())
            chosen, band = bands, None
        else:
            band = draw(st.sampled_from([band for band, number in done.items() if number < len(stops)]))
            number, chosen = done[band], [band]
        made.append((stops[number - 1] if number else 0, stops[number], band))
        done.update({band: max(done[band], number + 1) for band in chosen})
        if draw(st.integers(0, 9)) == 0:
            made.append(made[-1])
    return made


@given(case=cases(), data=st.data(), whole=st.booleans())
@settings(max_examples=share(0.15), deadline=None)
def test_every_byte_goes_once_and_never_too_early(
    case: tuple[Model, Cut, Cut, Prompt], data: st.DataObject, whole: bool
) -> None:
    model, source_cut, target_cut, prompt = case
    source = make_group(model, source_cut, target=False, tokens=prompt.tokens)
    target = make_group(model, target_cut, target=True, tokens=prompt.tokens)
    layout = data.draw(st.sampled_from(target.layouts), label="target rank")
    plan = make_plan(source.layouts, layout)
    for ours, pair in zip(source.layouts, plan.pairs, strict=True):
        for part in pair.parts:
            wanted = wanted_tokens(part, model, layout, prompt)
            page = part.source.unit_rows if part.paged else 1
            schedule = data.draw(schedules(prompt.tokens, page, len(model.layers)), label=part.id.pool)
            expect_each_once(ours, part, wanted, schedule, whole=whole)


def wanted_tokens(part: PartPlan, model: Model, layout: CacheLayout, prompt: Prompt) -> range:
    if not part.paged:
        return range(0, 1)
    window = model.window if part.id.pool == "swa" else 0
    page, theirs = layout.pool(part.id.pool).rows, part.source.unit_rows
    return window_range(prompt.tokens, window, prefix=prompt.prefix, target_page=page, source_page=theirs)


def expect_each_once(
    layout: CacheLayout, part: PartPlan, wanted: range, schedule: list[Rectangle], *, whole: bool
) -> None:
    lanes = layers_of_lanes(layout, layout.pool(part.id.pool), part)
    granted = part.blocks(wanted.start, wanted.stop)
    written = np.zeros((len(lanes), len(granted)), dtype=int)
    coverage, total = Coverage(part, wanted.start, wanted.stop, whole=whole), 0
    come = dict.fromkeys(range(-1, 64), 0)
    for index, (start, stop, layers) in enumerate(schedule):
        last = index == len(schedule) - 1
        for layer in come:
            if layers is None or layers[0] <= layer < layers[1] or (layer == -1 and last):
                come[layer] = max(come[layer], stop)
        for piece in coverage.add(layers, start, stop, last=last):
            chosen = range(len(lanes)) if piece.lanes is None else piece.lanes.tolist()
            assert not (whole and piece.lanes is not None)
            written[np.ix_(list(chosen), [block - granted.start for block in piece.blocks])] += 1
            total += piece.bytes
            if part.paged:
                assert set(piece.blocks) <= set(part.blocks(start // part.block_rows * part.block_rows, stop))
                needed = min(piece.blocks.stop * part.block_rows, wanted.stop)
                of = set().union(*lanes) if whole else set().union(*(lanes[lane] for lane in chosen))
                assert all(come[layer] >= needed for layer in of)
    assert (written == 1).all()
    assert total == coverage.bytes == part.bytes(wanted.start, wanted.stop)


@given(case=cases(), data=st.data(), whole=st.booleans())
@settings(max_examples=share(0.05), deadline=None)
def test_what_is_withdrawn_comes_again(case: tuple[Model, Cut, Cut, Prompt], data: st.DataObject, whole: bool) -> None:
    """Some writes are out when an engine takes its chunks back: all that has not settled goes with the second try."""
    model, source_cut, target_cut, prompt = case
    source = make_group(model, source_cut, target=False, tokens=prompt.tokens)
    target = make_group(model, target_cut, target=True, tokens=prompt.tokens)
    layout = target.layouts[0]
    for pair in make_plan(source.layouts, layout).pairs:
        for part in pair.parts:
            wanted = wanted_tokens(part, model, layout, prompt)
            page = part.source.unit_rows if part.paged else 1
            schedule = data.draw(schedules(prompt.tokens, page, len(model.layers)), label=part.id.pool)
            granted = part.blocks(wanted.start, wanted.stop)
            there = np.zeros((len(part.lane_bytes), len(granted)), dtype=bool)
            coverage = Coverage(part, wanted.start, wanted.stop, whole=whole)
            first = schedule[: data.draw(st.integers(0, len(schedule)), label="first try")]
            pieces = [piece for each in first for piece in coverage.add(each[2], *each[:2], last=each is schedule[-1])]
            out = [piece for piece in pieces if data.draw(st.booleans(), label="out")]
            coverage.withdraw(out)
            again = [
                piece for each in schedule for piece in coverage.add(each[2], *each[:2], last=each is schedule[-1])
            ]
            for piece in [*(piece for piece in pieces if id(piece) not in set(map(id, out))), *again]:
                lanes = range(len(part.lane_bytes)) if piece.lanes is None else piece.lanes.tolist()
                there[np.ix_(list(lanes), [block - granted.start for block in piece.blocks])] = True
            assert there.all()
            assert coverage.bytes == part.bytes(wanted.start, wanted.stop)


# ---- by example ------------------------------------------------------------------------------------------------------


def one_part(**how: object) -> PartPlan:
    model = Model(layers=("kv", "kv", "kv"))
    source = make_group(model, Cut(**how), target=False, tokens=16)  # type: ignore[arg-type]
    target = make_group(model, Cut(**how), target=True, tokens=16)  # type: ignore[arg-type]
    return make_plan(source.layouts, target.layouts[0]).pairs[0].parts[0]


def lanes_of(part: PartPlan, layer: int) -> Iterator[int]:
    return (i for i, (first, last) in enumerate(part.lane_layers.tolist()) if first <= layer <= last)


def test_a_layer_goes_by_itself() -> None:
    part = one_part()
    coverage = Coverage(part, 0, 16)
    (piece,) = coverage.add((1, 2), 0, 8, last=False)
    assert piece.lanes is not None
    assert (piece.lanes.tolist(), piece.blocks) == (list(lanes_of(part, 1)), range(2))
    (rest,) = coverage.add(None, 0, 8, last=False)
    assert rest.lanes is not None
    assert rest.lanes.tolist() == [*lanes_of(part, 0), *lanes_of(part, 2)]
    (piece,) = coverage.add(None, 8, 16, last=True)
    assert (piece.lanes, piece.blocks, coverage.bytes) == (None, range(2, 4), part.bytes(0, 16))


def test_a_part_that_travels_whole_waits_for_its_last_layer() -> None:
    part = one_part()
    coverage = Coverage(part, 0, 16, whole=True)
    assert coverage.add((1, 3), 0, 16, last=False) == []
    (piece,) = coverage.add((0, 1), 0, 16, last=True)
    assert (piece.lanes, piece.blocks) == (None, range(4))


def test_layers_that_lie_side_by_side_in_a_page_go_together() -> None:
    """One lane of all layers: it goes, block by block, when the last of them has come."""
    layout = stacked(layers=3)
    (part,) = make_plan([layout], layout).pairs[0].parts
    assert (part.lane_bytes.tolist(), part.lane_layers.tolist()) == ([3 * 2 * 64], [[0, 2]])
    coverage = Coverage(part, 0, 16)
    assert coverage.add((0, 2), 0, 8, last=False) == []
    assert coverage.add((0, 2), 8, 16, last=False) == []
    assert [piece.blocks for piece in coverage.add((2, 3), 0, 8, last=False)] == [range(2)]
    assert [piece.blocks for piece in coverage.add((2, 3), 8, 16, last=True)] == [range(2, 4)]


def stacked(layers: int) -> CacheLayout:
    """Pages of all layers, as ``[pages, layers, k and v, heads, tokens, head]``."""
    pool = kv_pool(range(layers), pages=4, page_size=4, heads=2, head_bytes=8, dtype="u1", region=0)
    page = 2 * layers * 64
    planes = [replace(plane, offset=64 * i, unit_stride=page) for i, plane in enumerate(pool.planes)]
    return CacheLayout("m", (Region(1 << 20, 4 * page),), (replace(pool, planes=tuple(planes)),))


def test_tokens_that_are_missing_in_a_layer_are_named() -> None:
    coverage = Coverage(one_part(), 0, 16)
    coverage.add((0, 2), 0, 8, last=False)
    with pytest.raises(LocalProtocolError, match="chunk starts at token 8 but 0 of layer 2 is next"):
        coverage.add(None, 8, 16, last=True)
    with pytest.raises(LocalProtocolError, match="chunk starts at token 4 but 0 is next"):
        Coverage(one_part(), 0, 16).add(None, 4, 8, last=False)


def test_a_chunk_that_begins_in_a_block_is_refused() -> None:
    coverage = Coverage(one_part(), 0, 16)
    coverage.add((0, 1), 0, 6, last=False)
    with pytest.raises(LayoutError, match="no multiple of 4"):
        coverage.add((0, 1), 6, 16, last=False)

"""What a layout contradicts is refused by name: every check of ``layout/validation.py``, and of an axis."""

from __future__ import annotations

import msgspec
import pytest

from kvbaton.errors import LayoutError
from kvbaton.layout import MAX_PLANES, MAX_STRIDE, Axis, CacheLayout, Plane, Pool, Region, Staging, aux_pool, kv_pool

GOOD = CacheLayout(
    "m",
    (Region(1 << 40, 1024), Region(1 << 41, 24), Region(1 << 42, 64)),
    (
        kv_pool([0], pages=4, page_size=4, heads=2, head_bytes=8, dtype="u1"),
        aux_pool(slots=3, slot_bytes=8, region=1),
    ),
    Staging(2, 16, 4),
)


def plane(**changes: object) -> CacheLayout:
    first = msgspec.structs.replace(GOOD.pools[0].planes[0], **changes)
    return pool(planes=(first, GOOD.pools[0].planes[1]))


def pool(**changes: object) -> CacheLayout:
    return whole(pools=(msgspec.structs.replace(GOOD.pools[0], **changes), GOOD.pools[1]))


def whole(**changes: object) -> CacheLayout:
    return msgspec.structs.replace(GOOD, **changes)


def region(**changes: object) -> CacheLayout:
    return whole(regions=(msgspec.structs.replace(GOOD.regions[0], **changes), *GOOD.regions[1:]))


def many_planes() -> CacheLayout:
    planes = tuple(Plane(i, "k", 0, 0, 8, 8, 8, 8) for i in range(MAX_PLANES + 1))
    return whole(pools=(Pool("kv", "kv", 1, 1, True, "u1", planes),))


BAD: dict[str, tuple[CacheLayout, str]] = {
    "too many pools": (whole(pools=GOOD.pools * 40), "more than 64 pools"),
    "too many planes": (many_planes(), "65536 planes"),
    "too many regions": (whole(regions=GOOD.regions * 30_000), "more than 65536 regions"),
    "two pools of a name": (whole(pools=(GOOD.pools[0], GOOD.pools[0])), "two pools share a name: kv, kv"),
    "empty region": (region(length=0), "is empty or not addressable"),
    "negative region": (region(address=-1), "is empty or not addressable"),
    "region past the end of memory": (region(address=(1 << 63) - 1), "is empty or not addressable"),
    "no such device": (region(device=-1), "there is no device -1"),
    "no units": (pool(units=0), "pool 'kv': units=0"),
    "too many units": (pool(units=1 << 31), "pool 'kv': units=2147483648"),
    "no rows": (pool(rows=0), "rows=0 must be positive"),
    "negative window": (pool(window=-1), "window=-1 must be positive"),
    "no planes": (pool(planes=()), "pool 'kv' has no planes"),
    "two planes of a name": (plane(name="v"), "pool 'kv' layer 0 plane 'v' appears twice"),
    "axis without this rank": (plane(axis=Axis(2, 2, 2)), "axis of 2 items over 2 ranks has no rank 2"),
    "axis of nothing": (plane(axis=Axis(0, 1, 0)), "axis of 0 items"),
    "axis that does not divide": (plane(axis=Axis(6, 4, 0)), "6 items do not divide over 4 ranks"),
    "rows that do not divide": (plane(rows=3), "3 rows do not divide the page of 4 tokens"),
    "empty items": (plane(item_bytes=0), "every stride must be at least item_bytes=0"),
    "stride within an item": (plane(row_stride=4), "every stride must be at least item_bytes=8"),
    "gigantic stride": (plane(unit_stride=MAX_STRIDE + 1), "a stride or offset exceeds"),
    "gigantic offset": (plane(offset=MAX_STRIDE + 1), "a stride or offset exceeds"),
    "no such region": (plane(region=7), "region 7 does not exist, the layout has 3"),
    "negative number of a region": (plane(region=-1), "region -1 does not exist"),
    "unit larger than its stride": (plane(unit_stride=63), "a unit spans 64 bytes but unit_stride is 63"),
    "rows and items overlap": (plane(row_stride=8, item_stride=8), "rows (stride 8) and items (stride 8) overlap"),
    "outside the region": (plane(offset=960), "bytes 960..1216 leave region 0 of 1024"),
    "before the region": (plane(offset=-8), "bytes -8..248 leave region 0"),
    "staging in no region": (whole(staging=Staging(9, 16, 4)), "staging: region 9 does not exist"),
    "staging without slots": (whole(staging=Staging(2, 16, 0)), "slots=0 and slot_bytes=16 must be positive"),
    "staging of empty slots": (whole(staging=Staging(2, 0, 4)), "slot_bytes=0 must be positive"),
    "staging outside its region": (whole(staging=Staging(2, 16, 5)), "5 slots of 16 bytes leave region 2"),
}


def test_the_layout_that_is_spoilt_below_is_good() -> None:
    GOOD.validate()


@pytest.mark.parametrize("what", BAD)
def test_a_contradiction_is_refused_by_name(what: str) -> None:
    layout, words = BAD[what]
    with pytest.raises(LayoutError) as caught:
        layout.validate()
    assert words in caught.value.message


def test_a_pool_lies_in_one_kind_of_memory() -> None:
    regions = (Region(1 << 40, 256), Region(1 << 41, 256, "VRAM"))
    planes = GOOD.pools[0].planes
    planes = (planes[0], msgspec.structs.replace(planes[1], region=1, offset=0))
    mixed = CacheLayout("m", regions, (msgspec.structs.replace(GOOD.pools[0], planes=planes),))
    with pytest.raises(LayoutError, match="pool 'kv' lies in several kinds of memory"):
        mixed.validate()


def test_an_unknown_pool_is_named_with_those_that_exist() -> None:
    assert GOOD.pool("aux") is GOOD.pools[1]
    with pytest.raises(LayoutError, match=r"no pool 'lora'; it has kv, aux"):
        GOOD.pool("lora")
    with pytest.raises(LayoutError, match="it has none"):
        CacheLayout("m", (), ()).pool("kv")


def test_a_digest_names_the_memory_exactly() -> None:
    assert GOOD.digest() == msgspec.convert(msgspec.to_builtins(GOOD), CacheLayout).digest()
    assert GOOD.digest() != whole(model="n").digest()
    assert GOOD.digest() != region(address=4096).digest()


@pytest.mark.parametrize(
    ("items", "ranks", "expected"),
    [
        (8, 1, [(0, 8)]),
        (8, 4, [(0, 2), (2, 2), (4, 2), (6, 2)]),
        (2, 4, [(0, 1), (0, 1), (1, 1), (1, 1)]),
        (1, 3, [(0, 1), (0, 1), (0, 1)]),
    ],
)
def test_an_axis_says_what_each_rank_holds(items: int, ranks: int, expected: list[tuple[int, int]]) -> None:
    axes = [Axis(items, ranks, rank) for rank in range(ranks)]
    assert [(axis.first, axis.width) for axis in axes] == expected
    assert {axis.replicas for axis in axes} == {max(1, ranks // items)}

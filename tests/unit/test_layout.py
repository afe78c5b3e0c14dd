"""Constructors, what validation refuses, and the window: bad input is named before any traffic."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from kvbaton.errors import IncompatibleError, LayoutError
from kvbaton.layout import (
    CacheLayout,
    Plane,
    Pool,
    Region,
    Shard,
    StateTensor,
    gated_delta_net,
    index_pool,
    kv_pool,
    mamba2,
    mla_pool,
    pool_bytes,
    scale_pool,
    state_pool,
    swa_pool,
    window_range,
)
from kvbaton.plan.compatibility import differences, group_differences
from kvbaton.plan.pair import make_plan, pair_plan
from kvbaton.plan.verify import check_bounds

KV = {"pages": 4, "page_size": 4, "heads": 2, "head_bytes": 8, "dtype": "u1"}


def layout(*pools: Pool, slack: int = 0) -> CacheLayout:
    """Pools that all lie in one region from byte 0 on, each written for itself."""
    length = max(pool_bytes(pool) for pool in pools) + slack
    return CacheLayout("m", (Region(1 << 40, length),), pools)


def tensor(**changes: object) -> StateTensor:
    settings = {
        "name": "conv",
        "shape": (8, 4),
        "element_bytes": 2,
        "dtype": "x",
        "axis": 0,
        "shards": (Shard("x", 8, 4),),
    }
    return StateTensor(**(settings | changes))  # type: ignore[arg-type]


# ---- constructors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: kv_pool([0], **(KV | {"heads": 6}), tp_size=4), "6 items do not divide over 4 ranks"),
        (lambda: kv_pool([0], **KV, tp_size=2, tp_rank=2), "has no rank 2"),
        (lambda: kv_pool([0], **KV, order="NDH"), "interior order 'NDH' is unknown"),
        (lambda: kv_pool([0], **KV, fusion="row"), "fusion 'row' is unknown"),
        (lambda: kv_pool([0], **(KV | {"page_size": 0})), "page_size=0 must be positive"),
        (lambda: swa_pool([0], window=0, **KV), "window=0 must be at least one token"),
        (lambda: mla_pool([0], pages=1, page_size=4, latent_bytes=0, rope_bytes=1, dtype="x"), "latent_bytes=0"),
        (
            lambda: index_pool([0], pages=1, page_size=6, key_bytes=4, dtype="x", row_tokens=4),
            "row_tokens=4 does not divide the page of 6 tokens",
        ),
        (lambda: scale_pool(kv_pool([0], **KV), scale_bytes=4, row_tokens=3), "'kv_scale': row_tokens=3"),
        (lambda: state_pool([0], [], slots=1), "0 tensors must be positive"),
        (lambda: state_pool([0], [tensor(axis=2)], slots=1), "axis 2 is unknown, its shape"),
        (lambda: state_pool([0], [tensor(axis=-1)], slots=1), "axis -1 is unknown"),
        (lambda: state_pool([0], [tensor(axis=None)], slots=1), "shards but no sharded axis"),
        (lambda: state_pool([0], [tensor(shards=())], slots=1), "the shards along axis 0 are nothing"),
        (lambda: state_pool([0], [tensor(shards=(Shard("q", 4, 2),))], slots=1), "are q 4, the axis has 8"),
        (lambda: state_pool([0], [tensor(shards=(Shard("q", 8, 3),))], slots=1), "'q' of 8 does not divide in 3"),
        (lambda: state_pool([0], [tensor(shape=(0, 4))], slots=1), "must be positive"),
        (lambda: state_pool([0], [tensor()], slots=1, tp_size=3), "4 items do not divide over 3 ranks"),
    ],
)  # fmt: skip
def test_a_pool_that_cannot_be_is_refused_by_name(make: Callable[[], Pool], words: str) -> None:
    with pytest.raises(LayoutError) as caught:
        make()
    assert words in caught.value.message
    assert "pool '" in caught.value.message


def test_states_of_real_models_have_the_shapes_that_transformers_shows() -> None:
    """Per request, as in transformers' ``modeling_qwen3_next.py`` and ``modeling_mamba2.py``."""
    gdn = gated_delta_net(
        key_heads=4, value_heads=8, key_dim=64, value_dim=64, conv_width=4, element_bytes=2, dtype="bfloat16"
    )
    assert [t.shape for t in gdn] == [(1024, 4), (8, 64, 64)]
    mamba = mamba2(heads=8, head_dim=64, groups=1, state_size=64, conv_width=4, element_bytes=2, dtype="bfloat16")
    assert [t.shape for t in mamba] == [(640, 4), (8, 64, 64)]
    quarter = state_pool([0], gdn, slots=1, tp_size=8, tp_rank=5)
    assert [(p.name, p.axis.first, p.axis.width) for p in quarter.planes] == [
        ("conv.q", 2, 1), ("conv.k", 2, 1), ("conv.v", 5, 1), ("recurrent", 5, 1),
    ]  # fmt: skip
    assert quarter.dtype == "conv=bfloat16,recurrent=float32"


def test_fused_tensors_lie_where_their_names_say() -> None:
    page, item = (kv_pool([0], **KV, fusion=fusion) for fusion in ("page", "item"))
    assert [plane.offset for plane in page.planes] == [0, 4 * 2 * 8]
    assert [plane.offset for plane in item.planes] == [0, 8]
    assert pool_bytes(page) == pool_bytes(item) == pool_bytes(kv_pool([0], **KV)) == 2 * 4 * 4 * 2 * 8


# ---- validation ------------------------------------------------------------------------------------------------------


def with_planes(pool: Pool, *changes: dict[str, int]) -> Pool:
    planes = [msgspec.structs.replace(plane, **change) for plane, change in zip(pool.planes, changes, strict=True)]
    return msgspec.structs.replace(pool, planes=tuple(planes))


@pytest.mark.parametrize(
    ("pool", "words"),
    [
        (with_planes(kv_pool([0], **KV), {}, {"offset": 0}), "share bytes"),
        (with_planes(kv_pool([0], **KV), {}, {"offset": 32}), "share bytes|runs into"),
        (with_planes(kv_pool([0], **KV, fusion="page"), {}, {"offset": 60}), "share bytes|runs into"),
        (with_planes(kv_pool([0], **KV, fusion="item"), {}, {"offset": 4}), "share bytes|runs into"),
        (with_planes(kv_pool([0], **KV, fusion="item"), {}, {"unit_stride": 256}), "share bytes|leave region"),
        (with_planes(kv_pool([0], **KV), {"rows": 3}, {}), "3 rows do not divide the page of 4 tokens"),
        (msgspec.structs.replace(state_pool([0], [tensor()], slots=2), window=4), "only pages have one"),
        (with_planes(state_pool([0], [tensor()], slots=2), {"rows": -1}), "-1 rows"),
    ],
)
def test_planes_that_contradict_each_other_are_refused(pool: Pool, words: str) -> None:
    with pytest.raises(LayoutError) as caught:
        layout(pool, slack=64).validate()
    assert any(part in caught.value.message for part in words.split("|")), caught.value.message


def test_pools_may_share_memory_that_an_allocator_hands_out_to_either() -> None:
    layout(kv_pool([0], **KV), swa_pool([1], window=8, **KV)).validate()


def test_interleaved_planes_are_no_overlap() -> None:
    for fusion in ("none", "page", "item"):
        for order in ("HND", "NHD"):
            layout(kv_pool(range(3), **KV, fusion=fusion, order=order)).validate()  # type: ignore[arg-type]
    layout(mla_pool(range(3), pages=2, page_size=4, latent_bytes=6, rope_bytes=2, dtype="x")).validate()
    layout(index_pool(range(3), pages=2, page_size=4, key_bytes=6, scale_bytes=2, dtype="x")).validate()


def test_many_planes_are_judged_in_reasonable_time() -> None:
    """All layers of a page side by side, as some allocators have them: 20,000 planes that interleave."""
    count = 20_000
    planes = tuple(Plane(i, "k", 0, 8 * i, 8 * count, 8, 8, 8) for i in range(count))
    pool = Pool("kv", "kv", 4, 1, True, "u1", planes)
    CacheLayout("m", (Region(0, 4 * 8 * count),), (pool,)).validate()


# ---- the plan --------------------------------------------------------------------------------------------------------


def test_what_lies_side_by_side_on_both_sides_travels_as_one_piece() -> None:
    fused = layout(kv_pool(range(3), **KV, fusion="item"))
    apart = layout(kv_pool(range(3), **KV))
    lanes = [len(pair_plan(a, b).parts[0].lane_bytes) for a, b in ((fused, fused), (apart, apart), (fused, apart))]
    assert lanes == [3, 6, 3 * 2 * 2 * 4]


def test_pieces_in_different_regions_stay_apart_even_where_addresses_touch() -> None:
    """One page, and the registered region of V begins where that of K ends."""
    pool = kv_pool([0], **(KV | {"pages": 1}))
    size = pool_bytes(pool) // 2
    k, v = pool.planes
    pool = msgspec.structs.replace(pool, planes=(k, msgspec.structs.replace(v, region=1, offset=0)))
    split = CacheLayout("m", (Region(1 << 40, size), Region((1 << 40) + size, size)), (pool,))
    split.validate()
    pair = pair_plan(split, split)
    assert pair.parts[0].lane_bytes.tolist() == [size, size]
    check_bounds(pair, split, split)


def test_a_part_of_a_state_is_named_by_its_finest_tensor() -> None:
    tensors = gated_delta_net(
        key_heads=2, value_heads=8, key_dim=2, value_dim=2, conv_width=4, element_bytes=2, dtype="x"
    )
    whole = layout(state_pool([4], tensors, slots=2))
    half = layout(state_pool([4], tensors, slots=2, tp_size=2, tp_rank=1))
    assert str(pair_plan(whole, half).parts[0].id) == "state layers 4..4 items 4..7"


def test_rows_that_do_not_pair_are_refused_by_the_plan_too() -> None:
    sides = [layout(index_pool([0], pages=2, page_size=size, key_bytes=4, dtype="x", row_tokens=4)) for size in (4, 8)]
    make_plan([sides[0]], sides[1])
    odd = layout(index_pool([0], pages=2, page_size=12, key_bytes=4, dtype="x", row_tokens=6))
    with pytest.raises(LayoutError, match="do not pair; use the same page size"):
        pair_plan(sides[1], odd)


def test_coverage_of_a_huge_axis_takes_no_memory() -> None:
    items = 1 << 40
    plane = Plane(
        0, "k", 0, 0, items, items, 1, 1, msgspec.convert([items, 1, 0], type(kv_pool([0], **KV).planes[0].axis))
    )
    huge = CacheLayout("m", (Region(0, 2 * items),), (Pool("kv", "kv", 2, 1, True, "u1", (plane,)),))
    huge.validate()
    found = group_differences([layout(kv_pool([1], **KV))], [huge])
    assert [difference.field for difference in found] == ["kv.layers"]
    with pytest.raises(IncompatibleError, match=r"items \[0\.\.1099511627775\]"):
        make_plan([layout(kv_pool([1], **KV))], huge)


def test_a_verdict_names_a_difference_once_for_all_layers() -> None:
    found = differences(layout(kv_pool(range(40), **KV)), layout(kv_pool(range(40), **(KV | {"head_bytes": 4}))))
    assert [difference.field for difference in found] == ["kv.0.k.item_bytes", "kv.0.v.item_bytes"]


# ---- the window ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "window", "prefix", "target_page", "source_page", "expected"),
    [
        (100, 20, 0, 16, 16, (80, 100)),
        (100, 20, 0, 64, 64, (64, 100)),
        (100, 20, 0, 64, 16, (80, 100)),  # the source keeps pages 80 to 100 only: no more is asked for
        (100, 20, 0, 16, 64, (80, 100)),
        (100, 20, 0, 64, None, (64, 100)),
        (100, 20, 96, 16, 16, (96, 100)),  # the target holds most of the window
        (100, 20, 64, 16, 16, (80, 100)),
        (100, 20, 100, 16, 16, (100, 100)),
        (10, 20, 0, 16, 16, (0, 10)),
        (100, 0, 32, 16, 16, (32, 100)),
        (0, 20, 0, 16, 16, (0, 0)),
    ],
)
def test_a_window_begins_at_a_page(tokens, window, prefix, target_page, source_page, expected) -> None:
    found = window_range(tokens, window, prefix=prefix, target_page=target_page, source_page=source_page)
    assert (found.start, found.stop) == expected


@pytest.mark.parametrize(
    ("tokens", "window", "prefix", "page", "words"),
    [
        (100, 20, 10, 16, "a prefix of 10 of 100 tokens is not whole pages of 16 tokens"),
        (100, 20, 112, 16, "a prefix of 112 of 100 tokens"),
        (100, -1, 0, 16, "makes no sense"),
        (100, 20, 0, 0, "makes no sense"),
    ],
)
def test_a_window_that_cannot_be_is_refused(tokens, window, prefix, page, words) -> None:
    with pytest.raises(LayoutError, match=words):
        window_range(tokens, window, prefix=prefix, target_page=page)

"""Every difference that matters is named with both values; what does not matter is not."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from kvbaton.layout import CacheLayout, Pool, Region, aux_pool, index_pool, kv_pool, pool_bytes
from kvbaton.plan.compatibility import differences, group_differences

KV = {"pages": 4, "page_size": 4, "heads": 4, "head_bytes": 8, "dtype": "u1"}


def layout(*pools: Pool, model: str = "m") -> CacheLayout:
    regions = tuple(Region((i + 1) << 40, pool_bytes(pool)) for i, pool in enumerate(pools))
    placed = tuple(
        msgspec.structs.replace(p, planes=tuple(msgspec.structs.replace(plane, region=i) for plane in p.planes))
        for i, p in enumerate(pools)
    )
    made = CacheLayout(model, regions, placed)
    made.validate()
    return made


def kv(**changes: object) -> Pool:
    return kv_pool(range(2), **(KV | changes))  # type: ignore[arg-type]


def alter(pool: Pool, **changes: object) -> Pool:
    return msgspec.structs.replace(pool, **changes)


CASES: dict[str, tuple[CacheLayout, CacheLayout, str, str, str]] = {
    "model": (layout(kv(), model="a"), layout(kv(), model="b"), "model", "a", "b"),
    "kind": (layout(kv()), layout(kv(kind="mla")), "kv.kind", "kv", "mla"),
    "paged": (layout(kv()), layout(alter(kv(), paged=False)), "kv.paged", "True", "False"),
    "dtype": (layout(kv()), layout(kv(dtype="e4m3")), "kv.dtype", "u1", "e4m3"),
    "packing": (layout(kv()), layout(alter(kv(), packing="x8")), "kv.packing", "", "x8"),
    "window": (layout(kv(window=8)), layout(kv(window=16)), "kv.window", "8", "16"),
    "page size": (layout(kv(page_size=6)), layout(kv(page_size=4)), "kv.page_size", "6", "4"),
    "packed page size": (
        layout(alter(kv(), packing="x8")),
        layout(alter(kv(page_size=8), packing="x8")),
        "kv.page_size",
        "4",
        "8",
    ),
    "item bytes": (layout(kv()), layout(kv(head_bytes=4)), "kv.0.k.item_bytes", "8", "4"),
    "heads": (layout(kv()), layout(kv(heads=8)), "kv.0.k.items", "4", "8"),
    "aux rows": (
        layout(aux_pool(slots=2, slot_bytes=64, region=0)),
        layout(aux_pool(slots=2, slot_bytes=512, region=0)),
        "aux.-1.row.item_bytes",
        "64",
        "512",
    ),
    "tensors": (layout(kv()), layout(kv(tensors=("k", "w"))), "kv.0.tensors", "['k', 'v']", "['k', 'w']"),
    "pooled keys": (
        layout(index_pool([0], pages=2, page_size=8, key_bytes=4, dtype="x")),
        layout(index_pool([0], pages=2, page_size=8, key_bytes=4, dtype="x", row_tokens=4)),
        "index.0.key.row_tokens",
        "1",
        "4",
    ),
}


@pytest.mark.parametrize("what", CASES)
def test_a_difference_is_named_with_both_values(what: str) -> None:
    source, target, field, ours, theirs = CASES[what]
    found = {error.field: error for error in differences(source, target)}
    assert field in found, list(found)
    error = found[field]
    assert (error.ours, error.theirs) == (ours, theirs)
    assert error.message.startswith(f"{field}: prefill has ")
    assert error.hint
    assert error.hint in error.message


@pytest.mark.parametrize("what", CASES)
def test_the_mirror_names_the_same_fields(what: str) -> None:
    source, target, *_ = CASES[what]
    there = {(e.field, e.ours, e.theirs) for e in differences(source, target)}
    back = {(e.field, e.theirs, e.ours) for e in differences(target, source)}
    assert there == back


SAME: dict[str, Callable[[], tuple[CacheLayout, CacheLayout]]] = {
    "equal": lambda: (layout(kv()), layout(kv())),
    "tensor parallel sizes": lambda: (layout(kv(tp_size=4, tp_rank=3)), layout(kv(tp_size=2, tp_rank=1))),
    "page sizes that divide": lambda: (layout(kv(page_size=16)), layout(kv(page_size=4))),
    "interior order": lambda: (layout(kv(order="NHD")), layout(kv(order="HND"))),
    "fusion": lambda: (layout(kv(fusion="page")), layout(kv())),
    "number of pages": lambda: (layout(kv(pages=40)), layout(kv())),
    "pools of one side": lambda: (layout(kv(), aux_pool(slots=2, slot_bytes=8, region=1)), layout(kv())),
    "layers of another stage": lambda: (layout(kv_pool([7], **KV)), layout(kv())),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("what", SAME)
def test_what_the_plan_bridges_is_no_difference(what: str) -> None:
    source, target = SAME[what]()
    assert differences(source, target) == []


def test_all_differences_are_told_not_only_the_first() -> None:
    found = differences(layout(kv(), model="a"), layout(kv(dtype="f2", head_bytes=16), model="b"))
    assert [error.field for error in found] == ["model", "kv.dtype", "kv.0.k.item_bytes", "kv.0.v.item_bytes"]


def test_groups_that_hand_over_have_no_difference() -> None:
    sources = [layout(kv(tp_size=4, tp_rank=rank)) for rank in range(4)]
    targets = [layout(kv(tp_size=2, tp_rank=rank)) for rank in range(2)]
    assert group_differences(sources, targets) == []


def test_a_rank_that_is_missing_is_told_once() -> None:
    sources = [layout(kv(tp_size=4, tp_rank=rank)) for rank in range(3)]
    targets = [layout(kv(tp_size=2, tp_rank=rank)) for rank in range(2)]
    found = group_differences(sources, targets)
    assert [error.field for error in found] == ["kv.0.k"]
    assert (found[0].ours, found[0].theirs) == ("[2]", "[2, 3]")  # ours: the sources'


@pytest.mark.parametrize("lacking", ["source", "target"])
def test_a_pool_or_layer_that_one_group_lacks_is_told(lacking: str) -> None:
    whole = [layout(kv(), aux_pool(slots=2, slot_bytes=8, region=1))]
    part = [layout(kv_pool([0], **KV))]  # type: ignore[arg-type]
    found = group_differences(part, whole) if lacking == "source" else group_differences(whole, part)
    told = {error.field: (error.ours, error.theirs) for error in found}
    aux, layers = ("no such pool", "one row per request"), ("layers 0", "layers 0..1")
    if lacking == "target":
        aux, layers = (aux[1], aux[0]), (layers[1], layers[0])
    assert told == {"aux": aux, "kv.layers": layers}

"""Pools from strides: what an engine's tensor is, byte by byte, and what does not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvbaton.errors import LayoutError
from kvbaton.layout import CacheLayout, Pool, Region, Strided, kv_pool, pool_of_strides


def strided(view: np.ndarray[Any, Any], base: np.ndarray[Any, Any], layer: int = 0) -> Strided:
    """As an engine knows a view of its memory."""
    return Strided(
        layer=layer,
        region=0,
        offset=view.ctypes.data - base.ctypes.data,
        shape=view.shape,
        strides=tuple(stride // view.itemsize for stride in view.strides),
        element_bytes=view.itemsize,
    )


def element(pool: Pool, base: np.ndarray[Any, Any], unit: int, row: int, item: int, layer: int = 0) -> Any:
    """The first element of what a plane says lies there."""
    plane = next(plane for plane in pool.planes if plane.layer == layer)
    at = plane.offset + unit * plane.unit_stride + row * plane.row_stride + item * plane.item_stride
    return base.reshape(-1)[at // base.itemsize]


@pytest.mark.parametrize("order", ["UHNC", "UNHC"])
def test_every_element_is_where_the_tensor_has_it(order: str) -> None:
    base = np.arange(2 * 5 * 3 * 4 * 8, dtype=np.float32)
    shape = {"U": 5, "H": 3, "N": 4, "C": 8}
    layers = base.reshape(2, *(shape[dim] for dim in order))
    views = [layer.transpose([order.index(dim) for dim in "UHNC"]) for layer in layers]
    pool = pool_of_strides(
        "kv", "kv", [strided(v, base, i) for i, v in enumerate(views)], dims="UHNC", dtype="float32", items=3
    )
    CacheLayout("m", (Region(base.ctypes.data, base.nbytes),), (pool,)).validate()
    assert (pool.units, pool.page_size) == (5, 4)
    for layer, view in enumerate(views):
        for u, h, n in np.ndindex(5, 3, 4):
            assert element(pool, base, u, n, h, layer) == view[u, h, n, 0]


def test_layers_that_interleave_block_by_block() -> None:
    base = np.arange(6 * 2 * 4 * 8, dtype=np.float32)
    packed = base.reshape(6, 2, 4, 8)  # [blocks, layers, tokens, content]
    pool = pool_of_strides("m", "mla", [strided(packed[:, i], base, i) for i in range(2)], dims="UNC", dtype="float32")
    CacheLayout("m", (Region(base.ctypes.data, base.nbytes),), (pool,)).validate()
    assert element(pool, base, 3, 2, 0, layer=1) == packed[3, 1, 2, 0]


def test_heads_are_counted_over_all_ranks() -> None:
    base = np.zeros((4, 2, 16, 8), np.float32)
    pool = pool_of_strides("kv", "kv", [strided(base, base)], dims="UHNC", dtype="f", items=4, tp_size=2, tp_rank=1)
    assert (pool.planes[0].axis.first, pool.planes[0].axis.width) == (2, 2)
    with pytest.raises(LayoutError, match="has 2 items"):
        pool_of_strides("kv", "kv", [strided(base, base)], dims="UHNC", dtype="f", items=2, tp_size=2)


def test_it_is_what_the_constructor_makes() -> None:
    base = np.zeros((4, 2, 16, 8), np.float32)
    ours = pool_of_strides("kv", "kv", [strided(base, base)], dims="UHNC", dtype="float32", items=2).planes[0]
    theirs = kv_pool([0], pages=4, page_size=16, heads=2, head_bytes=32, dtype="float32", tensors=("kv",)).planes[0]
    for name in ("offset", "unit_stride", "row_stride", "item_stride", "item_bytes", "axis"):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_a_packed_page_is_one_run_of_each_head() -> None:
    base = np.zeros((4, 2, 16, 8), np.float32)
    pool = pool_of_strides("kv", "kv", [strided(base, base)], dims="UHNC", dtype="f", items=2, packing="odd")
    plane = pool.planes[0]
    assert (plane.rows, plane.item_bytes, pool.rows_of(plane), pool.page_size) == (1, 16 * 8 * 4, 1, 16)


@pytest.mark.parametrize(
    ("changes", "dims", "message"),
    [
        ({"shape": (4, 2, 16)}, "UHNC", "are not 'UHNC'"),
        ({"strides": (256, 128, 16, 2)}, "UHNC", "contiguous"),
        ({"shape": (0, 2, 16, 8)}, "UHNC", "positive"),
        ({"offset": -1}, "UHNC", "positive"),
        ({}, "HUNC", "must begin with U"),
        ({}, "UHHC", "must begin with U"),
        ({}, "UHXC", "must begin with U"),
    ],
)
def test_what_does_not_fit(changes: dict[str, Any], dims: str, message: str) -> None:
    import dataclasses

    base = np.zeros((4, 2, 16, 8), np.float32)
    tensor = dataclasses.replace(strided(base, base), **changes)
    with pytest.raises(LayoutError, match=message):
        pool_of_strides("kv", "kv", [tensor], dims=dims, dtype="f", items=2)


def test_tensors_of_a_pool_have_equal_units() -> None:
    base = np.zeros((4, 2, 16, 8), np.float32)
    with pytest.raises(LayoutError, match="another number of units"):
        pool_of_strides("kv", "kv", [strided(base, base), strided(base[:2], base, 1)], dims="UHNC", dtype="f", items=2)
    with pytest.raises(LayoutError, match="no tensors"):
        pool_of_strides("kv", "kv", [], dims="UHNC", dtype="f")

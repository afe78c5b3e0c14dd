"""Constructors of paged pools (K/V, latent, window, index keys, scales of a quantised cache) and of the aux pool.

Each lays its planes into one region from ``offset`` on, in the shape that its docstring names; an engine whose memory
lies otherwise writes its own :class:`Plane` s. Head counts are the model's totals, never the per-rank numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from kvbaton.errors import LayoutError
from kvbaton.layout.geometry import NO_LAYER, Axis, Plane, Pool, PoolKind

InteriorOrder = Literal["HND", "NHD"]
#: How the tensors of a layer (K and V) lie to each other: apart; side by side in each page; side by side in each item.
Fusion = Literal["none", "page", "item"]


def kv_pool(
    layers: Iterable[int],
    *,
    pages: int,
    page_size: int,
    heads: int,
    head_bytes: int,
    dtype: str,
    order: InteriorOrder = "HND",
    fusion: Fusion = "none",
    tp_size: int = 1,
    tp_rank: int = 0,
    name: str = "kv",
    kind: PoolKind = "kv",
    region: int = 0,
    offset: int = 0,
    tensors: Sequence[str] = ("k", "v"),
    window: int = 0,
) -> Pool:
    """A paged MHA/GQA pool in one region.

    ``interior`` is ``[heads here, page_size, head_bytes]`` for HND and ``[page_size, heads here, head_bytes]``
    for NHD. The whole is shaped

    - ``[layers, tensors, pages, *interior]`` without fusion,
    - ``[layers, pages, tensors, *interior]`` fused by page,
    - ``[layers, pages, *interior[:2], tensors, head_bytes]`` fused by item.
    """
    axis = Axis(heads, tp_size, tp_rank)
    axis.validate(f"pool {name!r}")
    _check_sizes(name, pages=pages, page_size=page_size, head_bytes=head_bytes, tensors=len(tensors))
    if fusion not in ("none", "page", "item"):
        raise LayoutError(f"pool {name!r}: fusion {fusion!r} is unknown, use none, page or item")
    item_stride = head_bytes * (len(tensors) if fusion == "item" else 1)
    row_stride, item_stride = _interior_strides(name, order, page_size, axis.width, item_stride)
    tensor_bytes = axis.width * page_size * head_bytes
    unit_stride = tensor_bytes * (1 if fusion == "none" else len(tensors))
    step = {"none": pages * tensor_bytes, "page": tensor_bytes, "item": head_bytes}[fusion]
    planes = []
    for layer in layers:
        for i, tensor in enumerate(tensors):
            at = offset + i * step
            planes.append(Plane(layer, tensor, region, at, unit_stride, row_stride, item_stride, head_bytes, axis))
        offset += len(tensors) * pages * tensor_bytes
    return Pool(name, kind, pages, page_size, True, dtype, tuple(planes), window)


def _interior_strides(name: str, order: InteriorOrder, page_size: int, width: int, item: int) -> tuple[int, int]:
    """(row stride, item stride) of items that take ``item`` bytes each."""
    if order == "HND":
        return item, page_size * item
    if order == "NHD":
        return width * item, item
    raise LayoutError(f"pool {name!r}: interior order {order!r} is unknown, use HND or NHD")


def _check_sizes(name: str, **sizes: int) -> None:
    for what, value in sizes.items():
        if value < 1:
            raise LayoutError(f"pool {name!r}: {what}={value} must be positive")


def swa_pool(
    layers: Iterable[int],
    *,
    window: int,
    pages: int,
    page_size: int,
    heads: int,
    head_bytes: int,
    dtype: str,
    order: InteriorOrder = "HND",
    fusion: Fusion = "none",
    tp_size: int = 1,
    tp_rank: int = 0,
    name: str = "swa",
    region: int = 0,
    offset: int = 0,
) -> Pool:
    """The paged pool of the layers that attend to the last ``window`` tokens only; shaped like :func:`kv_pool`.

    What moves is what the target grants: see :func:`kvbaton.layout.window.window_range`.
    """
    if window < 1:
        raise LayoutError(f"pool {name!r}: window={window} must be at least one token; without a window use kv_pool")
    return kv_pool(
        layers,
        pages=pages,
        page_size=page_size,
        heads=heads,
        head_bytes=head_bytes,
        dtype=dtype,
        order=order,
        fusion=fusion,
        tp_size=tp_size,
        tp_rank=tp_rank,
        name=name,
        kind="swa",
        region=region,
        offset=offset,
        window=window,
    )


def mla_pool(
    layers: Iterable[int],
    *,
    pages: int,
    page_size: int,
    latent_bytes: int,
    rope_bytes: int,
    dtype: str,
    fusion: Literal["none", "item"] = "item",
    tp_size: int = 1,
    tp_rank: int = 0,
    name: str = "mla",
    region: int = 0,
    offset: int = 0,
) -> Pool:
    """The paged pool of MLA latents: one item per token, the same on every TP rank; planes ``latent`` and ``rope``.

    Fused (the rows of SGLang and vLLM) it is shaped ``[layers, pages, page_size, latent_bytes + rope_bytes]``;
    without fusion ``[layers, (latent: [pages, page_size, latent_bytes], rope: [pages, page_size, rope_bytes])]``.
    """
    _check_sizes(name, pages=pages, page_size=page_size, latent_bytes=latent_bytes, rope_bytes=rope_bytes)
    if fusion not in ("none", "item"):
        raise LayoutError(f"pool {name!r}: fusion {fusion!r} is unknown, use none or item")
    axis = Axis(1, tp_size, tp_rank)
    axis.validate(f"pool {name!r}")
    planes = []
    for layer in layers:
        at = 0
        for tensor, size in (("latent", latent_bytes), ("rope", rope_bytes)):
            row = latent_bytes + rope_bytes if fusion == "item" else size
            planes.append(Plane(layer, tensor, region, offset + at, page_size * row, row, row, size, axis))
            at += size if fusion == "item" else pages * page_size * size
        offset += pages * page_size * (latent_bytes + rope_bytes)
    return Pool(name, "mla", pages, page_size, True, dtype, tuple(planes))


def index_pool(
    layers: Iterable[int],
    *,
    pages: int,
    page_size: int,
    key_bytes: int,
    dtype: str,
    scale_bytes: int = 0,
    row_tokens: int = 1,
    tp_size: int = 1,
    tp_rank: int = 0,
    name: str = "index",
    region: int = 0,
    offset: int = 0,
) -> Pool:
    """The paged pool of a sparse-attention indexer's keys (DSA, NSA): one item per row, the same on every TP rank.

    A page holds its keys and then, where ``scale_bytes`` is set, their scales: shaped
    ``[layers, pages, ([rows, key_bytes], [rows, scale_bytes])]``. ``row_tokens``: tokens that share one pooled key.
    """
    _check_sizes(name, pages=pages, page_size=page_size, key_bytes=key_bytes, row_tokens=row_tokens)
    if page_size % row_tokens:
        raise LayoutError(f"pool {name!r}: row_tokens={row_tokens} does not divide the page of {page_size} tokens")
    axis = Axis(1, tp_size, tp_rank)
    axis.validate(f"pool {name!r}")
    rows = page_size // row_tokens
    unit = rows * (key_bytes + scale_bytes)
    planes = []
    for layer in layers:
        planes.append(Plane(layer, "key", region, offset, unit, key_bytes, key_bytes, key_bytes, axis, rows))
        if scale_bytes:
            at = offset + rows * key_bytes
            planes.append(Plane(layer, "scale", region, at, unit, scale_bytes, scale_bytes, scale_bytes, axis, rows))
        offset += pages * unit
    return Pool(name, "index", pages, page_size, True, dtype, tuple(planes))


def scale_pool(
    pool: Pool, *, scale_bytes: int, dtype: str = "float32", row_tokens: int = 1, region: int = 0, offset: int = 0
) -> Pool:
    """The block scales of a quantised ``pool``: a parallel pool with the same pages, layers, tensors and axes.

    Shaped ``[layers and tensors of pool, pages, rows, items here, scale_bytes]``. ``scale_bytes``: of all scales of one
    item of one row; ``row_tokens``: tokens that share them (the page size for one scale per page). Grant and submit it
    with the same pages and tokens as ``pool``.
    """
    name = f"{pool.name}_scale"
    _check_sizes(name, scale_bytes=scale_bytes, row_tokens=row_tokens)
    if pool.rows % row_tokens:
        raise LayoutError(f"pool {name!r}: row_tokens={row_tokens} does not divide the page of {pool.rows} tokens")
    rows = pool.rows // row_tokens
    planes = []
    for plane in pool.planes:
        row = plane.axis.width * scale_bytes
        planes.append(
            Plane(plane.layer, plane.name, region, offset, rows * row, row, scale_bytes, scale_bytes, plane.axis, rows)
        )
        offset += pool.units * rows * row
    return Pool(name, pool.kind, pool.units, pool.rows, True, dtype, tuple(planes), pool.window)


def aux_pool(*, slots: int, slot_bytes: int, tp_size: int = 1, tp_rank: int = 0, region: int, offset: int = 0) -> Pool:
    """The pool of per-request metadata rows (first token and what comes with it): one item, replicated over TP."""
    plane = Plane(
        NO_LAYER, "row", region, offset, slot_bytes, slot_bytes, slot_bytes, slot_bytes, Axis(1, tp_size, tp_rank)
    )
    return Pool("aux", "aux", slots, 1, False, "bytes", (plane,))


def pool_bytes(pool: Pool) -> int:
    """Bytes from the first to the last byte of ``pool``, for pools that lie in one region."""
    first = min(plane.offset for plane in pool.planes)
    return max(_end(pool, plane) for plane in pool.planes) - first


def _end(pool: Pool, plane: Plane) -> int:
    interior = (pool.rows_of(plane) - 1) * plane.row_stride + (plane.axis.width - 1) * plane.item_stride
    return plane.offset + (pool.units - 1) * plane.unit_stride + interior + plane.item_bytes

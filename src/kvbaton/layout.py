"""What a rank's cache memory is: pools of pages or slots, as plain integers.

A layout travels in the handshake and is all that the plan ever sees of an engine: no tensor, no
model class, no shape to be interpreted. One geometry describes every kind of pool::

    byte address of (unit u, row r, item i) of a plane =
        region.address + offset + u * unit_stride + r * row_stride + i * item_stride   (item_bytes long)

A *unit* is a page (``page_size`` rows, one per token) or a slot (one request). An *item* is what tensor
parallelism shards: a KV head, an MLA latent (one item, replicated), a block of a state tensor. NHD and
HND are then only different strides, fused K/V is a longer item, and a tensor made of independently
sharded blocks (GDN conv = q|k|v) is several planes of one pool.

This file must not know sockets, torch, engines or peers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec
from msgspec import Struct

from kvbaton.errors import LayoutError

PoolKind = Literal["kv", "mla", "swa", "index", "state", "aux"]
MemoryKind = Literal["DRAM", "VRAM"]
InteriorOrder = Literal["HND", "NHD"]

#: Layer id of planes that belong to no layer (aux rows).
NO_LAYER = -1
#: Most planes, regions and pools a layout may have: bounds what a peer can make us allocate.
MAX_PLANES = 65_536
MAX_POOLS = 64
MAX_UNITS = 1 << 31
MAX_STRIDE = 1 << 48


class Axis(Struct, frozen=True, array_like=True):
    """A shard axis of ``items`` items over ``ranks`` ranks, seen from ``rank``.

    With more ranks than items an item is replicated over ``replicas`` neighbouring ranks; otherwise
    each rank holds ``width`` neighbouring items from ``first`` (DESIGN: the plan's one formula).
    """

    items: int = 1
    ranks: int = 1
    rank: int = 0

    @property
    def width(self) -> int:
        return max(1, self.items // self.ranks)

    @property
    def replicas(self) -> int:
        return max(1, self.ranks // self.items)

    @property
    def first(self) -> int:
        return (self.rank // self.replicas) * self.width

    def validate(self, where: str) -> None:
        if self.items < 1 or self.ranks < 1 or not 0 <= self.rank < self.ranks:
            raise LayoutError(f"{where}: axis of {self.items} items over {self.ranks} ranks has no rank {self.rank}")
        if self.items % self.ranks and self.ranks % self.items:
            raise LayoutError(
                f"{where}: {self.items} items do not divide over {self.ranks} ranks; "
                f"use a tensor-parallel size that divides {self.items} or is a multiple of it"
            )


class Region(Struct, frozen=True, array_like=True):
    """One contiguous buffer that is registered with the transport. Sizes in bytes."""

    address: int
    length: int
    memory: MemoryKind = "DRAM"
    device: int = 0


class Plane(Struct, frozen=True, array_like=True):
    """One tensor of one layer in a pool: where its units, rows and items lie. All strides in bytes."""

    layer: int
    name: str
    region: int
    offset: int
    unit_stride: int
    row_stride: int
    item_stride: int
    item_bytes: int
    axis: Axis = Axis()


class Pool(Struct, frozen=True):
    """Buffers of one kind: ``units`` pages (or slots) that every plane has.

    Args:
        name: unique in a layout; pools pair by name.
        kind: one of :data:`PoolKind`.
        units: number of pages, or of slots where ``paged`` is false.
        rows: tokens per page (the page size), or rows of a slot.
        paged: pages are addressed by token position; slots by request.
        dtype: element type, compared at the handshake, never interpreted.
        window: tokens that a sliding-window pool keeps; 0 means all.
        packing: names an interior order that strides cannot express; compared, never interpreted.
        planes: the pool's tensors.
    """

    name: str
    kind: PoolKind
    units: int
    rows: int
    paged: bool
    dtype: str
    planes: tuple[Plane, ...]
    window: int = 0
    packing: str = ""

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.rows


class CacheLayout(Struct, frozen=True):
    """All pools of one rank. ``model`` fingerprints the weights: caches of two models never mix."""

    model: str
    regions: tuple[Region, ...]
    pools: tuple[Pool, ...]

    def pool(self, name: str) -> Pool:
        for pool in self.pools:
            if pool.name == name:
                return pool
        raise LayoutError(f"layout has no pool {name!r}; it has {', '.join(p.name for p in self.pools) or 'none'}")

    def digest(self) -> str:
        """Hex digest of the whole layout, addresses included: names one rank's memory exactly."""
        return hashlib.blake2b(msgspec.msgpack.encode(self), digest_size=16).hexdigest()

    def validate(self) -> None:
        """Raise :class:`LayoutError` where the layout contradicts itself or leaves its regions."""
        if len(self.pools) > MAX_POOLS or sum(len(p.planes) for p in self.pools) > MAX_PLANES:
            raise LayoutError(f"layout has more than {MAX_POOLS} pools or {MAX_PLANES} planes")
        names = [pool.name for pool in self.pools]
        if len(set(names)) != len(names):
            raise LayoutError(f"two pools share a name: {', '.join(sorted(names))}")
        for region in self.regions:
            if region.address < 0 or region.length < 1 or region.address + region.length > 1 << 63:
                raise LayoutError(f"region {region} is empty or not addressable")
        for pool in self.pools:
            _validate_pool(pool, self.regions)


def _validate_pool(pool: Pool, regions: Sequence[Region]) -> None:
    if not (0 < pool.units < MAX_UNITS and 0 < pool.rows < MAX_UNITS):
        raise LayoutError(f"pool {pool.name!r}: units={pool.units} and rows={pool.rows} must be positive")
    if not pool.planes:
        raise LayoutError(f"pool {pool.name!r} has no planes")
    if len({regions[plane.region].memory for plane in pool.planes if 0 <= plane.region < len(regions)}) > 1:
        raise LayoutError(f"pool {pool.name!r} lies in several kinds of memory; make it one pool per kind")
    seen = set()
    for plane in pool.planes:
        where = f"pool {pool.name!r} layer {plane.layer} plane {plane.name!r}"
        plane.axis.validate(where)
        if (plane.layer, plane.name) in seen:
            raise LayoutError(f"{where} appears twice")
        seen.add((plane.layer, plane.name))
        if plane.item_bytes < 1 or min(plane.unit_stride, plane.row_stride, plane.item_stride) < plane.item_bytes:
            raise LayoutError(f"{where}: every stride must be at least item_bytes={plane.item_bytes}")
        if max(plane.unit_stride, plane.row_stride, plane.item_stride, plane.offset) > MAX_STRIDE:
            raise LayoutError(f"{where}: a stride or offset exceeds {MAX_STRIDE} bytes")
        if not 0 <= plane.region < len(regions):
            raise LayoutError(f"{where}: region {plane.region} does not exist, the layout has {len(regions)}")
        interior = (pool.rows - 1) * plane.row_stride + (plane.axis.width - 1) * plane.item_stride + plane.item_bytes
        if interior > plane.unit_stride:
            raise LayoutError(f"{where}: a unit spans {interior} bytes but unit_stride is {plane.unit_stride}")
        _validate_interior(pool.rows, plane, where)
        end = plane.offset + (pool.units - 1) * plane.unit_stride + interior
        if plane.offset < 0 or end > regions[plane.region].length:
            raise LayoutError(
                f"{where}: bytes {plane.offset}..{end} leave region {plane.region} of {regions[plane.region].length}"
            )


def _validate_interior(rows: int, plane: Plane, where: str) -> None:
    """Rows and items of one unit must not share bytes: one of the two has to be the outer dimension."""
    width = plane.axis.width
    rows_outside = width == 1 or plane.row_stride >= (width - 1) * plane.item_stride + plane.item_bytes
    items_outside = rows == 1 or plane.item_stride >= (rows - 1) * plane.row_stride + plane.item_bytes
    if not (rows_outside or items_outside or rows == 1 or width == 1):
        raise LayoutError(
            f"{where}: rows (stride {plane.row_stride}) and items (stride {plane.item_stride}) overlap in memory"
        )


def kv_pool(
    layers: Iterable[int],
    *,
    pages: int,
    page_size: int,
    heads: int,
    head_bytes: int,
    dtype: str,
    order: InteriorOrder = "HND",
    tp_size: int = 1,
    tp_rank: int = 0,
    name: str = "kv",
    kind: PoolKind = "kv",
    region: int = 0,
    offset: int = 0,
    tensors: Sequence[str] = ("k", "v"),
    window: int = 0,
) -> Pool:
    """A paged MHA/GQA pool in one region, shaped ``[layers, tensors, pages, *interior]``.

    ``interior`` is ``[heads here, page_size, head_bytes]`` for HND and ``[page_size, heads here, head_bytes]``
    for NHD. ``heads`` is the model's total number of KV heads (never the per-rank number).
    """
    axis = Axis(heads, tp_size, tp_rank)
    axis.validate(f"pool {name!r}")
    if order == "HND":
        row_stride, item_stride = head_bytes, page_size * head_bytes
    elif order == "NHD":
        row_stride, item_stride = axis.width * head_bytes, head_bytes
    else:
        raise LayoutError(f"pool {name!r}: interior order {order!r} is unknown, use HND or NHD")
    unit_stride = axis.width * page_size * head_bytes
    planes = []
    for layer in layers:
        for tensor in tensors:
            planes.append(Plane(layer, tensor, region, offset, unit_stride, row_stride, item_stride, head_bytes, axis))
            offset += pages * unit_stride
    return Pool(name, kind, pages, page_size, True, dtype, tuple(planes), window)


def aux_pool(*, slots: int, slot_bytes: int, tp_size: int = 1, tp_rank: int = 0, region: int, offset: int = 0) -> Pool:
    """The pool of per-request metadata rows (first token and what comes with it): one item, replicated over TP."""
    plane = Plane(
        NO_LAYER, "row", region, offset, slot_bytes, slot_bytes, slot_bytes, slot_bytes, Axis(1, tp_size, tp_rank)
    )
    return Pool("aux", "aux", slots, 1, False, "bytes", (plane,))


def pool_bytes(pool: Pool) -> int:
    """Bytes that the planes of ``pool`` span, for pools built by :func:`kv_pool` and :func:`aux_pool`."""
    return sum(pool.units * plane.unit_stride for plane in pool.planes)

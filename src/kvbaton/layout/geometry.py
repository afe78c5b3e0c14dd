"""The geometry of cache memory: one formula for every kind of pool.

A layout travels in the handshake and is all that the plan ever sees of an engine: no tensor, no
model class, no shape to be interpreted. One geometry describes every kind of pool::

    byte address of (unit u, row r, item i) of a plane =
        region.address + offset + u * unit_stride + r * row_stride + i * item_stride   (item_bytes long)

A *unit* is a page (``page_size`` tokens) or a slot (one request). A *row* is a token of a page, or an outer dimension
of a state tensor; a plane of a paged pool may have one row for several tokens (a scale per page, pooled keys). An
*item* is what tensor parallelism shards: a KV head, an MLA latent (one item, replicated), a block of a state tensor.
NHD and HND are then only different strides, fused K/V are planes that interleave, and a tensor made of independently
sharded blocks (GDN conv = q|k|v) is several planes of one pool.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import msgspec
from msgspec import Struct

from kvbaton.errors import LayoutError

PoolKind = Literal["kv", "mla", "swa", "index", "state", "aux"]
MemoryKind = Literal["DRAM", "VRAM"]

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
    """One tensor of one layer in a pool: where its units, rows and items lie. All strides in bytes.

    ``rows``: rows of a unit; 0 means the pool's. In a paged pool a row then stands for ``pool.rows // rows`` tokens.
    """

    layer: int
    name: str
    region: int
    offset: int
    unit_stride: int
    row_stride: int
    item_stride: int
    item_bytes: int
    axis: Axis = Axis()
    rows: int = 0


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

    def rows_of(self, plane: Plane) -> int:
        """Rows that each unit of ``plane`` has."""
        return plane.rows or self.rows

    def row_tokens(self, plane: Plane) -> int:
        """Tokens that one row of ``plane`` stands for; 1 in slot pools."""
        return self.rows // self.rows_of(plane) if self.paged else 1


class Staging(Struct, frozen=True, array_like=True):
    """Memory for gathered data: ``slots`` slots of ``slot_bytes`` bytes, side by side from the start of a region."""

    region: int
    slot_bytes: int
    slots: int


class CacheLayout(Struct, frozen=True):
    """All pools of one rank. ``model`` identifies weights and configuration: caches of two models never mix (any text;
    a JSON object lets a verdict name the field that differs, see ``plan.identity``).

    ``staging`` is memory through which small pieces may travel together (see ``staging``); none: always directly.
    """

    model: str
    regions: tuple[Region, ...]
    pools: tuple[Pool, ...]
    staging: Staging | None = None

    def pool(self, name: str) -> Pool:
        for pool in self.pools:
            if pool.name == name:
                return pool
        raise LayoutError(f"layout has no pool {name!r}; it has {', '.join(p.name for p in self.pools) or 'none'}")

    @property
    def page_region(self) -> Region | None:
        """Where pages lie, those of the first pool that has any; None where none has."""
        return next((self.regions[pool.planes[0].region] for pool in self.pools if pool.paged), None)

    def digest(self) -> str:
        """Hex digest of the whole layout, addresses included: names one rank's memory exactly."""
        return hashlib.blake2b(msgspec.msgpack.encode(self), digest_size=16).hexdigest()

    def validate(self) -> None:
        """Raise :class:`LayoutError` where the layout contradicts itself or leaves its regions."""
        from kvbaton.layout.validation import check_layout  # it needs the types of this file

        check_layout(self)

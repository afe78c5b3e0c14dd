"""A simulated rank's memory: small layouts of every kind, bytes that name their place, and who owns which unit.

The content of an item is a function of (request, pool, layer, plane, token, item): sources fill with it, targets are
compared with it, item by item as a layout is defined; the plan is not asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from kvbaton.layout import Axis, CacheLayout, Plane, Pool, Region, Staging, aux_pool, kv_pool
from kvbaton.protocol.messages import Units
from kvbaton.testing.sim.scenario import SimGroup, SimModel

Bytes = NDArray[np.uint8]
Offsets = NDArray[np.int64]

#: What a unit holds that nobody has filled; content may equal it by chance, but not over a whole unit.
POISON = 0xEE
#: Between two regions, so that no run spans them.
GAP = 16


def make_pools(model: SimModel, group: SimGroup, number: int, *, source: bool) -> tuple[Pool, ...]:
    """The pools of one rank of a group, each in a region of its own."""
    stage, rank = divmod(number, group.tp)
    owned = range(model.layers * stage // group.pp, model.layers * (stage + 1) // group.pp)
    pools: list[Pool] = [_kv(model, group, owned, rank)]
    if model.index:
        pools.append(_paged(group, owned, rank, "index", "index", 1, model.item_bytes))
    if model.window:
        pools.append(_paged(group, owned, rank, "swa", "swa", model.heads, model.item_bytes, window=model.window))
    if model.state_items:
        pools.append(_state(model, group, owned, rank))
    if not source or stage == group.pp - 1:
        pools.append(aux_pool(slots=group.slots, slot_bytes=6, tp_size=group.tp, tp_rank=rank, region=0))
    return tuple(replace(p, planes=tuple(replace(x, region=i) for x in p.planes)) for i, p in enumerate(pools))


def _kv(model: SimModel, group: SimGroup, layers: range, rank: int) -> Pool:
    heads, tensors = (1, ("latent",)) if model.latent else (model.heads, ("k", "v"))
    if group.order == "fused" and not model.latent:
        return _fused(group, layers, rank, heads, model.item_bytes)
    name = "mla" if model.latent else "kv"
    pool = _paged(group, layers, rank, name, name, heads, model.item_bytes, tensors)
    return _stacked(pool) if group.order == "stacked" else pool


def _paged(
    group: SimGroup,
    layers: range,
    rank: int,
    name: str,
    kind: str,
    heads: int,
    item_bytes: int,
    tensors: Sequence[str] = ("x",),
    window: int = 0,
) -> Pool:
    return kv_pool(
        layers,
        pages=group.pages,
        page_size=group.page_size,
        heads=heads,
        head_bytes=item_bytes,
        dtype="f1" if group.misfit else "u1",
        order="HND" if group.order in ("HND", "stacked") else "NHD",
        tp_size=group.tp,
        tp_rank=rank,
        name=name,
        kind=kind,  # type: ignore[arg-type]
        tensors=tensors,
        window=window,
    )


def _stacked(pool: Pool) -> Pool:
    """All layers of a page side by side, so that they may be one lane."""
    unit = pool.planes[0].unit_stride
    planes = [replace(p, offset=i * unit, unit_stride=len(pool.planes) * unit) for i, p in enumerate(pool.planes)]
    return replace(pool, planes=tuple(planes))


def _fused(group: SimGroup, layers: range, rank: int, heads: int, item_bytes: int) -> Pool:
    """K and V interleaved: per token and head [k|v]."""
    axis = Axis(heads, group.tp, rank)
    row = axis.width * 2 * item_bytes
    unit = group.page_size * row
    planes = []
    for number, layer in enumerate(layers):
        for half, name in enumerate(("k", "v")):
            offset = number * unit * group.pages + half * item_bytes
            planes.append(Plane(layer, name, 0, offset, unit, row, 2 * item_bytes, item_bytes, axis))
    return Pool("kv", "kv", group.pages, group.page_size, True, "f1" if group.misfit else "u1", tuple(planes))


def _state(model: SimModel, group: SimGroup, layers: range, rank: int) -> Pool:
    """Slots of independently sharded blocks [q|k|v]; k has twice the items."""
    planes, offset = [], 0
    for layer in layers:
        for name, items in (("q", model.state_items), ("k", 2 * model.state_items), ("v", model.state_items)):
            axis = Axis(items, group.tp, rank)
            unit = axis.width * 3
            planes.append(Plane(layer, name, 0, offset, unit, unit, 3, 3, axis))
            offset += unit * group.slots
    return Pool("state", "state", group.slots, 1, False, "u1", tuple(planes))


@dataclass(eq=False, slots=True)
class PoolBytes:
    """Where a pool's bytes lie: ``index[unit, row]`` are the offsets of all its items, plane by plane; ``layer`` says
    whose they are."""

    pool: Pool
    index: Offsets
    salt: NDArray[np.uint32]
    layer: NDArray[np.int64]

    def content(self, seed: int, tokens: NDArray[np.int64]) -> Bytes:
        """Bytes of tokens (rows), as ``index`` orders them."""
        x = tokens.astype(np.uint32)[:, None] * np.uint32(0x9E3779B1) + self.salt[None, :]
        x += np.uint32((seed * 0x165667B1) & 0xFFFFFFFF)
        x ^= x >> np.uint32(15)
        x *= np.uint32(0x85EBCA77)
        x ^= x >> np.uint32(13)
        return x.astype(np.uint8)


class RankMemory:
    """All bytes of one rank in one buffer, and for each byte the unit that it belongs to.

    Units are numbered over all pools; after them come the slots of the staging memory. Addresses are real ones, because
    a driver's own gather and scatter work on them; nothing that a run does depends on which they are.
    """

    def __init__(self, model: SimModel, group: SimGroup, number: int, *, source: bool) -> None:
        pools = make_pools(model, group, number, source=source)
        lengths = [max(plane.offset + pool.units * plane.unit_stride for plane in pool.planes) for pool in pools]
        if group.staging_slots:
            lengths.append(group.staging_slots * group.staging_slot_bytes)
        bases = [int(base) for base in np.cumsum([0, *(length + GAP for length in lengths)])]
        self.bytes: Bytes = np.full(bases[-1], POISON, dtype=np.uint8)
        self._address = int(self.bytes.ctypes.data)
        regions = tuple(Region(self._address + base, length) for base, length in zip(bases, lengths, strict=False))
        staging = Staging(len(pools), group.staging_slot_bytes, group.staging_slots) if group.staging_slots else None
        self.layout = CacheLayout("m", regions, pools, staging)
        self.unit_of = np.full(bases[-1], -1, dtype=np.int32)
        self.pools: dict[str, PoolBytes] = {}
        self.first_unit: dict[str, int] = {}
        units = 0
        for pool in pools:
            self.pools[pool.name] = _pool_bytes(pool, bases)
            self.first_unit[pool.name] = units
            numbers = np.arange(units, units + pool.units, dtype=np.int32)
            self.unit_of[self.pools[pool.name].index] = numbers[:, None, None]
            units += pool.units
        if group.staging_slots:
            slots = np.arange(units, units + group.staging_slots, dtype=np.int32)
            self.unit_of[bases[-2] : bases[-2] + lengths[-1]] = np.repeat(slots, group.staging_slot_bytes)
        self.owners: list[object | None] = [None] * units
        self.written_for = np.zeros(bases[-1], dtype=np.int64)  # by byte: whose write was posted to it last

    def at(self, address: int) -> int:
        """Offset in ``bytes`` of an address."""
        if not self._address <= address < self._address + len(self.bytes):
            raise IndexError(f"address {address} is in no region")
        return address - self._address

    def unit_name(self, number: int) -> str:
        if number >= len(self.owners):
            return f"staging[{number - len(self.owners)}]"
        for name, first in reversed(self.first_unit.items()):
            if number >= first:
                return f"{name}[{number - first}]"
        return f"nothing[{number}]"

    def fill(
        self,
        pool: str,
        seed: int,
        start: int,
        stop: int,
        units: Units,
        first_page: int,
        layers: Iterable[int] | None = None,
    ) -> None:
        """Write the content of tokens ``[start, stop)`` into the pages that hold them (slot pools: token 0); of all
        layers, or of some."""
        where, rows = self._place(pool, start, stop, units, first_page)
        content = self.pools[pool].content(seed, rows)
        if layers is None:
            self.bytes[where] = content
        else:
            chosen = np.isin(self.pools[pool].layer, list(layers))
            self.bytes[where[:, chosen]] = content[:, chosen]

    def wrong(self, pool: str, seeds: Sequence[int], start: int, stop: int, units: Units, first_page: int) -> list[int]:
        """Tokens of ``[start, stop)`` with a byte that is none of these requests' content."""
        where, rows = self._place(pool, start, stop, units, first_page)
        found, content = self.bytes[where], self.pools[pool].content
        differs = np.logical_and.reduce([found != content(seed, rows) for seed in seeds])
        return [int(token) for token in rows[differs.any(axis=1)]]

    def poison(self, pool: str, units: Iterable[int]) -> None:
        self.bytes[self.pools[pool].index[list(units)]] = POISON

    def _place(
        self, name: str, start: int, stop: int, units: Units, first_page: int
    ) -> tuple[Offsets, NDArray[np.int64]]:
        place = self.pools[name]
        if not place.pool.paged:
            return place.index[units[0], :1], np.zeros(1, dtype=np.int64)
        tokens = np.arange(start, stop, dtype=np.int64)
        pages, rows = np.divmod(tokens, place.pool.rows)
        return place.index[np.asarray(units, dtype=np.int64)[pages - first_page], rows], tokens


def _pool_bytes(pool: Pool, bases: list[int]) -> PoolBytes:
    units = np.arange(pool.units, dtype=np.int64)[:, None, None]
    rows = np.arange(pool.rows, dtype=np.int64)[None, :, None]
    columns, salts, layers = [], [], []
    for plane in pool.planes:
        name = sum(ord(letter) << (8 * i) for i, letter in enumerate(f"{pool.name[0]}{plane.name[0]}"))
        items = np.arange(plane.axis.width, dtype=np.int64)
        within = np.arange(plane.item_bytes, dtype=np.int64)
        inner = (items[:, None] * plane.item_stride + within[None, :]).ravel()
        columns.append(
            bases[plane.region] + plane.offset + units * plane.unit_stride + rows * plane.row_stride + inner[None, None]
        )
        salt = (items + plane.axis.first)[:, None] * 0xC2B2AE3D + within[None, :] * 0x27D4EB2F
        layers.append(np.full(len(inner), plane.layer, dtype=np.int64))
        salts.append((salt.ravel() + (plane.layer + 2) * 0x2545F491 + name * 0x1B873593) & 0xFFFFFFFF)
    index, salt_of_all = np.concatenate(columns, axis=2), np.concatenate(salts).astype(np.uint32)
    return PoolBytes(pool, index, salt_of_all, np.concatenate(layers))

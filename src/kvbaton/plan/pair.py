"""The plan: who writes which part of a transfer, with byte geometry. One pure function for every topology.

For a shard axis of H items over P source and D target ranks, source rank p holds ``[h0p, h0p + np)`` and target rank
d ``[h0d, h0d + nd)``; p writes the overlap. Where several source ranks hold the same item, the elected one is
``p % rep_p == (d % rep_d) * rep_p // rep_d``: every target item is written exactly once, for all P, D and H.
Layers pair by absolute layer id, so pipeline stages fall out; tokens pair by absolute position, so page sizes may
differ. A source rank without an overlap has no part: it is a bystander.

Both ends compute :func:`pair_plan` from the same two layouts and compare its digest before the first byte. The
target also checks with :func:`make_plan` that its sources together cover every plane once.

Geometry. A part is moved in *blocks* of ``block_rows`` tokens (the greatest common divisor of both page sizes; whole
slots for slot pools). Within a block, what is contiguous on both sides is one *lane*: (plane, piece of the interior),
or several of them that lie side by side on both sides, as fused K and V do.
A lane is one strided row of a descriptor table per block position in a page, so that (lane, page) is one table entry
and a chunk of pages is two index arrays, computed by :func:`PartPlan.entries`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from kvbaton.errors import IncompatibleError, LayoutError
from kvbaton.layout import Axis, CacheLayout, Plane, Pool, Region
from kvbaton.plan.lanes import Lanes, lanes_of
from kvbaton.plan.table import Table

#: Most rows of one table: bounds what a peer's layout can make us allocate.
MAX_ROWS = 1 << 20
#: Entries of one table are numbered with 32-bit integers.
MAX_ENTRIES = (1 << 31) - 1

_EVERY_LANE, _FIRST_LANE = slice(None), slice(1)

#: Most items that a message lists by number.
MOST_ITEMS_SHOWN = 64

Int64s = NDArray[np.int64]
Int32s = NDArray[np.int32]


class PartId(Struct, frozen=True, array_like=True, order=True, gc=False):
    """(pool, layer range, shard range): the unit of the manifest. Ranges are half open."""

    pool: str
    layer_start: int
    layer_stop: int
    item_start: int
    item_stop: int

    def __str__(self) -> str:
        layers = "" if self.layer_stop <= 0 else f" layers {self.layer_start}..{self.layer_stop - 1}"
        return f"{self.pool}{layers} items {self.item_start}..{self.item_stop - 1}"


@dataclass(frozen=True, kw_only=True)
class PairSide:
    """One side of a part: its descriptor table and how units subdivide into blocks."""

    table: Table
    units: int
    unit_rows: int
    blocks_per_unit: int

    @cached_property
    def first_entries(self) -> Int32s:
        """The first entry of each lane, as a column."""
        stride = self.blocks_per_unit * self.units
        return np.arange(0, len(self.table.rows) // self.blocks_per_unit * stride, stride).astype(np.int32)[:, None]

    def lanes(self, lane_bytes: Int64s) -> Lanes:
        """What gather and scatter need of this side."""
        return lanes_of(self.table, lane_bytes, self.units, self.blocks_per_unit)


@dataclass(frozen=True, kw_only=True)
class PartPlan:
    """One part of a pairing. ``lane_bytes[i]`` is the length of lane i; a block is one entry of every lane and takes
    ``block_bytes``. ``layers`` are those that the part has, ascending; lane i holds bytes of ``layers[f]`` to
    ``layers[l]``, where ``lane_layers[i]`` is (f, l): of one layer, or of several that are neighbours on both sides."""

    id: PartId
    paged: bool
    block_rows: int
    lane_bytes: Int64s
    layers: Int64s
    lane_layers: Int64s
    source: PairSide
    target: PairSide
    block_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_bytes", int(self.lane_bytes.sum()))

    def blocks(self, token_start: int, token_stop: int) -> range:
        """Numbers of the blocks that hold tokens ``[token_start, token_stop)``; block 0 alone for slot pools.

        The last block is moved whole even where the prompt ends inside it: its rows belong to the same page.
        """
        if not self.paged:
            return range(1)
        if token_start >= token_stop:
            return range(0)
        if token_start % self.block_rows:
            raise LayoutError(
                f"part {self.id}: token {token_start} is no multiple of {self.block_rows}, the common page granularity"
            )
        return range(token_start // self.block_rows, -(-token_stop // self.block_rows))

    def bytes(self, token_start: int, token_stop: int) -> int:
        """Bytes that this part moves for a token range."""
        return len(self.blocks(token_start, token_stop)) * self.block_bytes

    def entries(
        self,
        blocks: range,
        source_units: Int64s,
        source_first: int,
        target_units: Int64s,
        target_first: int,
        lanes: Int64s | None = None,
    ) -> tuple[Int32s, Int32s]:
        """Table entries (source, target) of the given blocks, lane by lane in token order; of all lanes or of some.

        ``source_units[i]`` is the page that holds absolute page ``source_first + i``; likewise for the target.
        """
        return (
            self.source_entries(blocks, source_units, source_first, lanes),
            self.target_entries(blocks, target_units, target_first, lanes),
        )

    def source_entries(self, blocks: range, units: Int64s, first: int, lanes: Int64s | None = None) -> Int32s:
        """The source's half of :meth:`entries`; of some ``lanes`` only, where they are given."""
        return _entries(self.source, _EVERY_LANE if lanes is None else lanes, blocks, units, first)

    def target_entries(self, blocks: range, units: Int64s, first: int, lanes: Int64s | None = None) -> Int32s:
        """The target's half of :meth:`entries`, likewise."""
        return _entries(self.target, _EVERY_LANE if lanes is None else lanes, blocks, units, first)

    def source_blocks(self, blocks: range, units: Int64s, first: int) -> Int32s:
        """Of :meth:`source_entries` those of the first lane: enough for whoever copies whole blocks."""
        return _entries(self.source, _FIRST_LANE, blocks, units, first)

    def target_blocks(self, blocks: range, units: Int64s, first: int) -> Int32s:
        """Of :meth:`target_entries` those of the first lane."""
        return _entries(self.target, _FIRST_LANE, blocks, units, first)

    @cached_property
    def source_lanes(self) -> Lanes:
        """The source's memory of a block, for gather."""
        return self.source.lanes(self.lane_bytes)

    @cached_property
    def target_lanes(self) -> Lanes:
        """The target's memory of a block, for scatter."""
        return self.target.lanes(self.lane_bytes)


def _entries(side: PairSide, lanes: Int64s | slice, blocks: range, units: Int64s, first: int) -> Int32s:
    if side.blocks_per_unit == 1:
        within_lane = units[blocks.start - first : blocks.stop - first]
    else:
        page, position = np.divmod(np.arange(blocks.start, blocks.stop, dtype=np.int64), side.blocks_per_unit)
        within_lane = position * side.units + units[page - first]
    entries: Int32s = (side.first_entries[lanes] + within_lane.astype(np.int32)).ravel()
    return entries


@dataclass(frozen=True, kw_only=True, slots=True)
class PairPlan:
    """All parts that one source rank writes for one target rank; empty for a bystander."""

    parts: tuple[PartPlan, ...]
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The pairings of one target with every rank of its source group, in the order of the sources."""

    pairs: tuple[PairPlan, ...]

    @property
    def writers(self) -> tuple[int, ...]:
        """Indices of the sources that have at least one part."""
        return tuple(i for i, pair in enumerate(self.pairs) if pair.parts)


def overlap(source: Axis, target: Axis) -> range:
    """Items (absolute) that this source rank writes for this target rank."""
    elected = source.rank % source.replicas == (target.rank % target.replicas) * source.replicas // target.replicas
    start = max(source.first, target.first)
    stop = min(source.first + source.width, target.first + target.width)
    return range(start, stop) if elected and stop > start else range(0)


def pair_plan(source: CacheLayout, target: CacheLayout) -> PairPlan:
    """What ``source`` writes for ``target``. The layouts must be compatible (see ``compatibility``)."""
    offered = {pool.name: pool for pool in source.pools}
    parts = []
    digest = hashlib.blake2b(digest_size=16)
    for pool in target.pools:
        if pool.name in offered:
            part = _part(offered[pool.name], source.regions, pool, target.regions)
            if part is not None:
                parts.append(part)
                digest.update(repr(part.id).encode())
                digest.update(part.source.table.rows.tobytes())
                digest.update(part.target.table.rows.tobytes())
    return PairPlan(parts=tuple(parts), digest=digest.hexdigest())


def make_plan(sources: Sequence[CacheLayout], target: CacheLayout) -> Plan:
    """Pair ``target`` with every source and check that each of its items is written exactly once.

    Raises IncompatibleError naming the pool, layer and items that nobody writes, or that two ranks write.
    """
    plan = Plan(pairs=tuple(pair_plan(source, target) for source in sources))
    check_coverage(sources, target)
    return plan


def check_coverage(sources: Sequence[CacheLayout], target: CacheLayout) -> None:
    """Raise IncompatibleError unless ``sources`` write every item of every plane of ``target`` exactly once."""
    for gap in coverage_gaps(sources, target):
        raise gap


def coverage_gaps(sources: Sequence[CacheLayout], target: CacheLayout) -> Iterator[IncompatibleError]:
    """Everything in ``target`` that ``sources`` do not write exactly once; alike planes of a pool are told once."""
    for pool in target.pools:
        offers: dict[tuple[int, str], list[Axis]] = {}
        for source in sources:
            for offered in source.pools:
                if offered.name == pool.name:
                    for plane in offered.planes:
                        offers.setdefault((plane.layer, plane.name), []).append(plane.axis)
        checked: set[tuple[Axis, tuple[Axis, ...]]] = set()
        for plane in pool.planes:
            axes = tuple(offers.get((plane.layer, plane.name), ()))
            if (plane.axis, axes) in checked:
                continue
            checked.add((plane.axis, axes))
            written = sorted((r.start, r.stop) for axis in axes if (r := overlap(axis, plane.axis)))
            wanted = (plane.axis.first, plane.axis.first + plane.axis.width)
            if not _tiles(written, wanted):
                ours, theirs = _items([wanted]), _items(written)
                yield IncompatibleError(
                    f"pool {pool.name!r} layer {plane.layer} plane {plane.name!r}: the target needs items "
                    f"{ours} once each, the prefill ranks write {theirs}; is every prefill rank registered?",
                    field=f"{pool.name}.{plane.layer}.{plane.name}",
                    ours=ours,
                    theirs=theirs,
                    hint="every item must come from exactly one prefill rank: give each rank of one group, once",
                )


def _tiles(written: Sequence[tuple[int, int]], wanted: tuple[int, int]) -> bool:
    """Whether the ranges, sorted, cover ``wanted`` once each item and nothing else."""
    begin, end = wanted
    for start, stop in written:
        if start != begin:
            return False
        begin = stop
    return begin == end


def _items(ranges: Sequence[tuple[int, int]]) -> str:
    """Items for people: each by number, or ranges where there are many."""
    if sum(stop - start for start, stop in ranges) <= MOST_ITEMS_SHOWN:
        return str([item for start, stop in ranges for item in range(start, stop)])
    return f"[{', '.join(f'{start}..{stop - 1}' for start, stop in ranges[:MOST_ITEMS_SHOWN])}]"


@dataclass(frozen=True, slots=True)
class _Geometry:
    """What planes that go through the plan together have in common on one side. ``rows``: of a whole unit."""

    rows: int
    row_stride: int
    item_stride: int
    item_bytes: int
    axis: Axis


def _geometry(pool: Pool, plane: Plane) -> _Geometry:
    return _Geometry(pool.rows_of(plane), plane.row_stride, plane.item_stride, plane.item_bytes, plane.axis)


#: Columns of a side's lanes: address and length of the piece in the first block of unit 0, the stride from block to
#: block in a unit, the stride from unit to unit, device, region.
_ADDRESS, _LENGTH, _BLOCK_STRIDE, _UNIT_STRIDE, _DEVICE, _REGION = range(6)


def _part(
    source: Pool, source_regions: Sequence[Region], target: Pool, target_regions: Sequence[Region]
) -> PartPlan | None:
    """The part of one pool: paired planes grouped by equal geometry, so that numpy does the work per group."""
    theirs = {(plane.layer, plane.name): plane for plane in target.planes}
    groups: dict[tuple[_Geometry, _Geometry], list[tuple[Plane, Plane]]] = {}
    for plane in source.planes:
        twin = theirs.get((plane.layer, plane.name))
        if twin is not None:
            groups.setdefault((_geometry(source, plane), _geometry(target, twin)), []).append((plane, twin))
    block_rows = math.gcd(source.rows, target.rows) if source.paged else source.rows
    blocks = (source.rows // block_rows, target.rows // block_rows)
    lanes: tuple[list[Int64s], list[Int64s]] = ([], [])
    of_lanes: list[Int64s] = []
    items: list[tuple[int, range]] = []
    for (mine, other), pairs in groups.items():
        shared = overlap(mine.axis, other.axis)
        if not shared:
            continue
        length, s_offsets, t_offsets = _pieces(mine, other, shared, _rows_in_block(source, mine, target, other, blocks))
        if len(pairs) * len(s_offsets) * max(blocks) > MAX_ROWS:
            raise LayoutError(
                f"pool {source.name!r}: the pairing needs more than {MAX_ROWS} table rows; "
                "use page sizes with a larger common factor, or the same interior order on both sides"
            )
        lanes[0].append(_lanes([pair[0] for pair in pairs], source_regions, mine, s_offsets, length, blocks[0]))
        lanes[1].append(_lanes([pair[1] for pair in pairs], target_regions, other, t_offsets, length, blocks[1]))
        of_lanes.append(np.repeat(np.array([pair[0].layer for pair in pairs], dtype=np.int64), len(s_offsets)))
        items.append((mine.axis.items, shared))
    if not of_lanes:
        return None
    layers, numbers = np.unique(np.concatenate(of_lanes), return_inverse=True)
    widest = max(count for count, _ in items)  # tensors of a state divide by themselves: the finest one names the part
    shares = [shared for count, shared in items if count == widest]
    first, last = min(shared.start for shared in shares), max(shared.stop for shared in shares)
    s_lanes, t_lanes, lane_layers = _fused(np.concatenate(lanes[0]), np.concatenate(lanes[1]), numbers)
    return PartPlan(
        id=PartId(source.name, int(layers[0]), int(layers[-1]) + 1, first, last),
        paged=source.paged,
        block_rows=block_rows,
        lane_bytes=s_lanes[:, _LENGTH].copy(),
        layers=layers,
        lane_layers=lane_layers,
        source=_side(source, source_regions, s_lanes, blocks[0]),
        target=_side(target, target_regions, t_lanes, blocks[1]),
    )


def _rows_in_block(source: Pool, mine: _Geometry, target: Pool, other: _Geometry, blocks: tuple[int, int]) -> int:
    """Rows of a block, the same on both sides."""
    rows = mine.rows // blocks[0]
    if mine.rows % blocks[0] or other.rows % blocks[1] or rows != other.rows // blocks[1]:
        raise LayoutError(
            f"pool {source.name!r}: pages of {source.rows} tokens in {mine.rows} rows and of {target.rows} in "
            f"{other.rows} do not pair; use the same page size on both sides"
        )
    return rows


def _side(pool: Pool, regions: Sequence[Region], lanes: Int64s, blocks: int) -> PairSide:
    """A descriptor table: lane by lane, and within a lane one row per block position in a unit."""
    positions = np.arange(blocks, dtype=np.int64)
    rows = np.empty((len(lanes) * blocks, 5), dtype=np.int64)
    rows[:, 0] = (lanes[:, _ADDRESS, None] + positions * lanes[:, _BLOCK_STRIDE, None]).ravel()
    for column, of_lane in ((1, _LENGTH), (2, _DEVICE), (3, _UNIT_STRIDE)):
        rows[:, column] = np.repeat(lanes[:, of_lane], blocks)
    rows[:, 4] = pool.units
    if len(rows) * pool.units > MAX_ENTRIES:
        raise LayoutError(
            f"pool {pool.name!r}: more than {MAX_ENTRIES} table entries; use larger pages or a smaller pool"
        )
    table = Table(rows=rows, memory=regions[pool.planes[0].region].memory)
    return PairSide(table=table, units=pool.units, unit_rows=pool.rows, blocks_per_unit=blocks)


def _pieces(source: _Geometry, target: _Geometry, items: range, block_rows: int) -> tuple[int, Int64s, Int64s]:
    """Length of each contiguous piece of a block, and the pieces' offsets from the unit on both sides.

    A dimension (rows, items) disappears into the piece when it is dense on both sides.
    """
    length = source.item_bytes
    dimensions = [
        (block_rows, source.row_stride, target.row_stride),
        (len(items), source.item_stride, target.item_stride),
    ]
    dimensions = [d for d in dimensions if d[0] > 1]
    while dense := [d for d in dimensions if d[1] == length and d[2] == length]:
        length *= dense[0][0]
        dimensions.remove(dense[0])
    if math.prod(d[0] for d in dimensions) > MAX_ROWS:
        raise LayoutError(f"a block falls into more than {MAX_ROWS} pieces; use the same interior order on both sides")
    s_offsets = np.array([(items.start - source.axis.first) * source.item_stride], dtype=np.int64)
    t_offsets = np.array([(items.start - target.axis.first) * target.item_stride], dtype=np.int64)
    for count, s_stride, t_stride in reversed(dimensions):
        steps = np.arange(count, dtype=np.int64)
        s_offsets = (s_offsets[:, None] + steps * s_stride).ravel()
        t_offsets = (t_offsets[:, None] + steps * t_stride).ravel()
    return length, s_offsets, t_offsets


def _lanes(
    planes: Sequence[Plane], regions: Sequence[Region], geometry: _Geometry, offsets: Int64s, length: int, blocks: int
) -> Int64s:
    """Lanes of a group of planes on one side, plane by plane."""
    lanes = np.empty((len(planes), len(offsets), 6), dtype=np.int64)
    bases = np.array([regions[plane.region].address + plane.offset for plane in planes], dtype=np.int64)
    lanes[:, :, _ADDRESS] = bases[:, None] + offsets[None, :]
    lanes[:, :, _LENGTH] = length
    lanes[:, :, _BLOCK_STRIDE] = geometry.rows // blocks * geometry.row_stride if blocks > 1 else 0
    lanes[:, :, _UNIT_STRIDE] = np.array([plane.unit_stride for plane in planes])[:, None]
    lanes[:, :, _DEVICE] = np.array([regions[plane.region].device for plane in planes])[:, None]
    lanes[:, :, _REGION] = np.array([plane.region for plane in planes])[:, None]
    return lanes.reshape(-1, 6)


def _fused(source: Int64s, target: Int64s, numbers: Int64s) -> tuple[Int64s, Int64s, Int64s]:
    """Lanes that follow each other in memory on both sides become one: K and V of a page, latent and rope of a row.
    ``numbers``: the number of each lane's layer; comes back as the first and the last of each fused lane."""
    order = np.argsort(source[:, _ADDRESS], kind="stable")
    source, target, numbers = source[order], target[order], numbers[order]
    joined = np.ones(len(source) - 1, dtype=bool)
    for lanes in (source, target):
        joined &= lanes[1:, _ADDRESS] == lanes[:-1, _ADDRESS] + lanes[:-1, _LENGTH]
        joined &= (lanes[1:, _BLOCK_STRIDE:] == lanes[:-1, _BLOCK_STRIDE:]).all(axis=1)
    starts = np.flatnonzero(np.concatenate(([True], ~joined)))
    lengths = np.add.reduceat(source[:, _LENGTH], starts)
    source, target = source[starts], target[starts]
    source[:, _LENGTH] = target[:, _LENGTH] = lengths
    of_lanes = (np.minimum.reduceat(numbers, starts), np.maximum.reduceat(numbers, starts))
    return source, target, np.stack(of_lanes, axis=1)

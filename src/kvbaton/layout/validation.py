"""What a layout must not contradict: bounds, strides, axes, and two tensors in the same bytes.

A layout may come from a file or a peer: everything is checked by arithmetic on the numbers it names, in time and
memory that the number of planes bounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvbaton.errors import LayoutError
from kvbaton.layout.geometry import MAX_PLANES, MAX_POOLS, MAX_STRIDE, MAX_UNITS, CacheLayout, Plane, Pool, Region


def check_layout(layout: CacheLayout) -> None:
    """Raise LayoutError where ``layout`` contradicts itself or leaves its regions."""
    if len(layout.pools) > MAX_POOLS or sum(len(p.planes) for p in layout.pools) > MAX_PLANES:
        raise LayoutError(f"layout has more than {MAX_POOLS} pools or {MAX_PLANES} planes")
    if len(layout.regions) > MAX_PLANES:
        raise LayoutError(f"layout has more than {MAX_PLANES} regions")
    names = [pool.name for pool in layout.pools]
    if len(set(names)) != len(names):
        raise LayoutError(f"two pools share a name: {', '.join(sorted(names))}")
    for region in layout.regions:
        if region.address < 0 or region.length < 1 or region.address + region.length > 1 << 63:
            raise LayoutError(f"region {region} is empty or not addressable")
        if not 0 <= region.device < 1 << 31:
            raise LayoutError(f"region {region}: there is no device {region.device}")
    for pool in layout.pools:
        _check_pool(pool, layout.regions)
    _check_staging(layout)


def _check_staging(layout: CacheLayout) -> None:
    staging = layout.staging
    if staging is None:
        return
    if not 0 <= staging.region < len(layout.regions):
        raise LayoutError(f"staging: region {staging.region} does not exist, the layout has {len(layout.regions)}")
    if staging.slots < 1 or not 0 < staging.slot_bytes <= MAX_STRIDE:
        raise LayoutError(f"staging: slots={staging.slots} and slot_bytes={staging.slot_bytes} must be positive")
    if staging.slots >= MAX_PLANES:
        raise LayoutError(f"staging: {staging.slots} slots are more than {MAX_PLANES - 1}; make them larger")
    if staging.slots * staging.slot_bytes > layout.regions[staging.region].length:
        raise LayoutError(f"staging: {staging.slots} slots of {staging.slot_bytes} bytes leave region {staging.region}")
    here = layout.regions[staging.region]
    for pool in (pool for pool in layout.pools if pool.paged):
        for region in (layout.regions[plane.region] for plane in pool.planes):
            if (region.memory, region.device) != (here.memory, here.device):
                raise LayoutError(
                    f"staging lies in {here.memory} {here.device}, pool {pool.name!r} in {region.memory} "
                    f"{region.device}: staging memory must be on the device of the pages"
                )


def _check_pool(pool: Pool, regions: Sequence[Region]) -> None:
    if not (0 < pool.units < MAX_UNITS and 0 < pool.rows < MAX_UNITS):
        raise LayoutError(f"pool {pool.name!r}: units={pool.units} and rows={pool.rows} must be positive")
    if pool.window < 0 or (pool.window and not pool.paged):
        raise LayoutError(f"pool {pool.name!r}: window={pool.window} must be positive, and only pages have one")
    if not pool.planes:
        raise LayoutError(f"pool {pool.name!r} has no planes")
    if len({regions[plane.region].memory for plane in pool.planes if 0 <= plane.region < len(regions)}) > 1:
        raise LayoutError(f"pool {pool.name!r} lies in several kinds of memory; make it one pool per kind")
    seen = set()
    for plane in pool.planes:
        where = _where(pool, plane)
        if (plane.layer, plane.name) in seen:
            raise LayoutError(f"{where} appears twice")
        seen.add((plane.layer, plane.name))
        _check_plane(pool, plane, regions, where)
    _check_apart(pool)


def _where(pool: Pool, plane: Plane) -> str:
    return f"pool {pool.name!r} layer {plane.layer} plane {plane.name!r}"


def _check_plane(pool: Pool, plane: Plane, regions: Sequence[Region], where: str) -> None:
    plane.axis.validate(where)
    rows = pool.rows_of(plane)
    if rows < 1 or (pool.paged and pool.rows % rows):
        raise LayoutError(f"{where}: {rows} rows do not divide the page of {pool.rows} tokens")
    if plane.item_bytes < 1 or min(plane.unit_stride, plane.row_stride, plane.item_stride) < plane.item_bytes:
        raise LayoutError(f"{where}: every stride must be at least item_bytes={plane.item_bytes}")
    if max(plane.unit_stride, plane.row_stride, plane.item_stride, plane.offset) > MAX_STRIDE:
        raise LayoutError(f"{where}: a stride or offset exceeds {MAX_STRIDE} bytes")
    if not 0 <= plane.region < len(regions):
        raise LayoutError(f"{where}: region {plane.region} does not exist, the layout has {len(regions)}")
    interior = _interior(pool, plane)
    if interior > plane.unit_stride:
        raise LayoutError(f"{where}: a unit spans {interior} bytes but unit_stride is {plane.unit_stride}")
    _check_interior(rows, plane, where)
    end = plane.offset + (pool.units - 1) * plane.unit_stride + interior
    if plane.offset < 0 or end > regions[plane.region].length:
        raise LayoutError(
            f"{where}: bytes {plane.offset}..{end} leave region {plane.region} of {regions[plane.region].length}"
        )


def _interior(pool: Pool, plane: Plane) -> int:
    """Bytes from the first to the last byte of one unit."""
    rows = (pool.rows_of(plane) - 1) * plane.row_stride
    return rows + (plane.axis.width - 1) * plane.item_stride + plane.item_bytes


def _check_interior(rows: int, plane: Plane, where: str) -> None:
    """Rows and items of one unit must not share bytes: one of the two has to be the outer dimension."""
    width = plane.axis.width
    rows_outside = width == 1 or plane.row_stride >= (width - 1) * plane.item_stride + plane.item_bytes
    items_outside = rows == 1 or plane.item_stride >= (rows - 1) * plane.row_stride + plane.item_bytes
    if not (rows_outside or items_outside or rows == 1 or width == 1):
        raise LayoutError(
            f"{where}: rows (stride {plane.row_stride}) and items (stride {plane.item_stride}) overlap in memory"
        )


def _dimensions(pool: Pool, plane: Plane) -> list[tuple[int, int]]:
    """(stride, count) of the dimensions that repeat, outermost first."""
    inside = sorted([(plane.row_stride, pool.rows_of(plane)), (plane.item_stride, plane.axis.width)], reverse=True)
    return [(stride, count) for stride, count in ((plane.unit_stride, pool.units), *inside) if count > 1]


def _check_apart(pool: Pool) -> None:
    """Planes of a pool must not share bytes. (Pools may: an allocator can hand one buffer's units to several.)

    Planes that interleave must do so with equal strides: then a plane's place is its offset modulo the stride.
    """
    by_region: dict[int, list[Plane]] = {}
    for plane in pool.planes:
        by_region.setdefault(plane.region, []).append(plane)
    for planes in by_region.values():
        _apart(pool, [(plane.offset, plane) for plane in planes], 0)


def _apart(pool: Pool, placed: list[tuple[int, Plane]], level: int) -> None:
    """``placed``: planes and where they begin, within one step of the dimensions outside ``level``."""
    for cluster in _clusters(pool, placed, level):
        dimensions = [_dimensions(pool, plane)[level:] for _, plane in cluster]
        strides = {d[0][0] if d else 0 for d in dimensions}
        stride = next(iter(strides))
        origin = cluster[0][0]
        if len(strides) > 1 or not stride:
            first, second = cluster[0][1], cluster[1][1]
            raise LayoutError(f"{_where(pool, first)} and plane {second.name!r} of layer {second.layer} share bytes")
        inner = [((at - origin) % stride, plane) for at, plane in cluster]
        last_at, last = max(inner, key=lambda entry: entry[0] + _span(pool, entry[1], level + 1))
        if last_at + _span(pool, last, level + 1) > stride:
            raise LayoutError(f"{_where(pool, last)} runs into the next unit or row of plane {cluster[0][1].name!r}")
        _apart(pool, inner, level + 1)


def _clusters(pool: Pool, placed: list[tuple[int, Plane]], level: int) -> Iterator[list[tuple[int, Plane]]]:
    """Planes whose spans overlap, two or more at a time."""
    cluster: list[tuple[int, Plane]] = []
    reach = 0
    for at, plane in sorted(placed, key=lambda entry: entry[0]):
        if cluster and at >= reach:
            if len(cluster) > 1:
                yield cluster
            cluster = []
        reach = max(reach, at + _span(pool, plane, level)) if cluster else at + _span(pool, plane, level)
        cluster.append((at, plane))
    if len(cluster) > 1:
        yield cluster


def _span(pool: Pool, plane: Plane, level: int) -> int:
    """Bytes from the first to the last byte of ``plane`` within one step of the dimensions outside ``level``."""
    return sum((count - 1) * stride for stride, count in _dimensions(pool, plane)[level:]) + plane.item_bytes

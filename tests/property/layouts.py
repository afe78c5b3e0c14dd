"""Layouts of whole groups in any topology, and a reference reshard that shares nothing with the plan."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvbaton.layout import Axis, CacheLayout, Plane, Pool, Region, aux_pool, kv_pool, pool_bytes

SIDE_SPACING = 1 << 40


@dataclass(frozen=True, kw_only=True)
class Group:
    """Ranks of one side: their layouts, in pipeline-major order."""

    layouts: tuple[CacheLayout, ...]
    tp: int
    pp: int
    page_size: int
    pages: int


def make_group(
    *, side: int, heads: int, layers: int, head_bytes: int, page_size: int, tp: int, pp: int, order: str, pages: int = 0
) -> Group:
    pages = pages or 64 // page_size + 3
    cuts = [layers * stage // pp for stage in range(pp + 1)]
    layouts = []
    for stage in range(pp):
        for rank in range(tp):
            base = (1 + side * 64 + len(layouts)) * SIDE_SPACING
            owned = range(cuts[stage], cuts[stage + 1])
            pool = _kv(owned, heads, head_bytes, page_size, pages, tp, rank, order)
            regions = [Region(base, _span(pool))]
            pools = [pool]
            if side == 1 or stage == pp - 1:
                pools.append(aux_pool(slots=4, slot_bytes=24, tp_size=tp, tp_rank=rank, region=1))
                regions.append(Region(base + (1 << 32), 4 * 24))
            layout = CacheLayout("model", tuple(regions), tuple(pools))
            layout.validate()
            layouts.append(layout)
    return Group(layouts=tuple(layouts), tp=tp, pp=pp, page_size=page_size, pages=pages)


def _kv(layers: range, heads: int, head_bytes: int, page_size: int, pages: int, tp: int, rank: int, order: str) -> Pool:
    if order in ("HND", "NHD"):
        return kv_pool(
            layers,
            pages=pages,
            page_size=page_size,
            heads=heads,
            head_bytes=head_bytes,
            dtype="u1",
            order=order,  # type: ignore[arg-type]
            tp_size=tp,
            tp_rank=rank,
        )
    axis = Axis(heads, tp, rank)
    planes = []
    offset = 0
    unit = page_size * axis.width * 2 * head_bytes
    for layer in layers:  # per token [head][k|v]: K and V interleaved
        for i, name in enumerate(("k", "v")):
            planes.append(
                Plane(
                    layer,
                    name,
                    0,
                    offset + i * head_bytes,
                    unit,
                    axis.width * 2 * head_bytes,
                    2 * head_bytes,
                    head_bytes,
                    axis,
                )
            )
        offset += unit * pages
    return Pool("kv", "kv", pages, page_size, True, "u1", tuple(planes))


def _span(pool: Pool) -> int:
    names = {plane.name for plane in pool.planes}
    interleaved = pool.planes[0].item_stride == len(names) * pool.planes[0].item_bytes and len(names) > 1
    fused = interleaved and pool.planes[1].offset == pool.planes[0].item_bytes
    return pool_bytes(pool) // (len(names) if fused else 1)


class Memory:
    """Bytes of several ranks, addressed as their layouts say."""

    def __init__(self, layouts: tuple[CacheLayout, ...], rng: np.random.Generator | None = None) -> None:
        self._buffers: list[tuple[int, NDArray[np.uint8]]] = []
        for layout in layouts:
            for region in layout.regions:
                fill = rng.integers(1, 256, region.length, dtype=np.uint8) if rng else np.zeros(region.length, np.uint8)
                self._buffers.append((region.address, fill))

    def view(self, address: int, length: int) -> NDArray[np.uint8]:
        for base, buffer in self._buffers:
            if base <= address and address + length <= base + len(buffer):
                return buffer[address - base : address - base + length]
        raise AssertionError(f"{address}..{address + length} is nobody's memory")

    def everything(self) -> list[NDArray[np.uint8]]:
        return [buffer for _, buffer in self._buffers]

    def item(self, layout: CacheLayout, plane: Plane, unit: int, row: int, item: int) -> NDArray[np.uint8]:
        """One item of one row of one unit, straight from the definition of a layout. ``item`` is absolute."""
        address = (
            layout.regions[plane.region].address
            + plane.offset
            + unit * plane.unit_stride
            + row * plane.row_stride
            + (item - plane.axis.first) * plane.item_stride
        )
        return self.view(address, plane.item_bytes)

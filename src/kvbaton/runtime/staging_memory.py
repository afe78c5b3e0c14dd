"""Staging memory that a rank makes for itself: on the device of its pages, in slots for its largest page or state.

Rules: memory is made once, page-aligned, and never moves: peers hold its addresses. It is not zeroed: what is never
used costs a host nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from msgspec import structs

from kvbaton.errors import ConfigError
from kvbaton.layout import CacheLayout, MemoryKind, Pool, Region, Staging

#: Memory that is registered with a network card should start on a page of the machine.
ALIGNMENT_BYTES = 4096
#: Smallest slot: copying so much takes several times the fixed cost of a staged write, 0.3 ms in memory of the host and
#: 0.2 ms on a GPU, so larger ones gain little; and the pages of most models fit.
STAGING_SLOT_BYTES: dict[MemoryKind, int] = {"DRAM": 4 << 20, "VRAM": 16 << 20}
#: Staging memory where no size is asked for: a few rooms at once, small beside any real pool. Rooms that find no slot
#: go directly.
STAGING_BYTES: dict[MemoryKind, int] = {"DRAM": 64 << 20, "VRAM": 256 << 20}


@dataclass(frozen=True, slots=True)
class StagingSize:
    """Slots and the bytes of each."""

    slots: int
    slot_bytes: int

    @property
    def bytes(self) -> int:
        return self.slots * self.slot_bytes


def staging_size(
    pools: Sequence[Pool], staging_bytes: int | None, *, memory: MemoryKind = "DRAM", slot_bytes: int = 0
) -> StagingSize:
    """As many slots as fit ``staging_bytes``; None: :data:`STAGING_BYTES`, or a slot where that is more.

    Args:
        memory: that the pages are in.
        pools: all of the rank's: a slot holds whatever a peer can ask for at once, a page or a request's state.
        slot_bytes: of a slot, where it is not to follow from the pools.

    Raises ConfigError where the memory holds no slot.
    """
    largest = max((sum(_unit_bytes(pool)) for pool in pools), default=0)
    slot_bytes = slot_bytes or max(STAGING_SLOT_BYTES[memory], -(-largest // ALIGNMENT_BYTES) * ALIGNMENT_BYTES)
    size = max(STAGING_BYTES[memory], slot_bytes) if staging_bytes is None else staging_bytes
    if size < slot_bytes:
        raise ConfigError(
            f"staging memory of {size} bytes holds no slot of {slot_bytes} bytes; make it at least "
            f"{-(-slot_bytes >> 20)} MiB (staging_bytes, --staging-mib), or 0 for none"
        )
    return StagingSize(size // slot_bytes, slot_bytes)


def _unit_bytes(pool: Pool) -> list[int]:
    """Of each plane."""
    return [pool.rows_of(plane) * plane.axis.width * plane.item_bytes for plane in pool.planes]


def with_staging(layout: CacheLayout, staging_bytes: int | None, *, slot_bytes: int = 0) -> tuple[CacheLayout, object]:
    """The layout with staging memory, sized as :func:`staging_size` says, and what owns that memory.

    Raises ConfigError where it has staging memory already, has no pages, or the size holds no slot.
    """
    if layout.staging is not None:
        raise ConfigError("staging_bytes: the layout has staging memory of its own")
    pages = layout.page_region
    if pages is None:
        raise ConfigError("staging_bytes: the layout has no pages that could be staged")
    size = staging_size(layout.pools, staging_bytes, memory=pages.memory, slot_bytes=slot_bytes)
    owner, address = _on_host(size.bytes) if pages.memory == "DRAM" else _on_device(size.bytes, pages.device)
    region = Region(address, size.bytes, pages.memory, pages.device)
    staging = Staging(len(layout.regions), size.slot_bytes, size.slots)
    return structs.replace(layout, regions=(*layout.regions, region), staging=staging), owner


def _on_host(length: int) -> tuple[object, int]:
    buffer = np.empty(length + ALIGNMENT_BYTES, dtype=np.uint8)
    return buffer, _aligned(buffer.ctypes.data)


def _on_device(length: int, device: int) -> tuple[object, int]:
    try:
        from kvbaton.runtime.gather_torch import device_memory
    except ModuleNotFoundError:
        raise ConfigError("staging memory beside pages of a GPU needs torch") from None
    owner, address = device_memory(length + ALIGNMENT_BYTES, device)
    return owner, _aligned(address)


def _aligned(address: int) -> int:
    return -(-address // ALIGNMENT_BYTES) * ALIGNMENT_BYTES

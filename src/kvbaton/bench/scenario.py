"""What a transfer benchmark moves: the shape of rooms, pools and groups, and the memory that this needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kvbaton.errors import ConfigError
from kvbaton.layout import CacheLayout, InteriorOrder, Region, Staging, kv_pool, pool_bytes
from kvbaton.plan.staging import StagingPolicy

PageOrder = Literal["contiguous", "shuffled"]
HEADS = 8
#: Least size of a staging slot in scenarios that have some; a page of all layers fits in any case.
SLOT_BYTES = 8 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchScenario:
    """One benchmark. A room is ``pages`` pages in each of ``layers`` layers, K and V, ``item_bytes`` bytes apiece.

    ``item_bytes`` is what one page of one layer's K (or V) takes over all tensor-parallel ranks together.
    ``concurrency`` rooms are open at a time.
    """

    name: str = "custom"
    layers: int = 8
    pages: int = 64
    item_bytes: int = 32 << 10
    order: PageOrder = "shuffled"
    rooms: int = 64
    concurrency: int = 64
    source_tp: int = 1
    target_tp: int = 1
    page_size: int = 16
    interior: InteriorOrder = "HND"
    staging: StagingPolicy = "never"
    rounds: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("layers", "pages", "rooms", "concurrency", "source_tp", "target_tp", "rounds"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field}={getattr(self, field)} must be at least 1")
        smallest = HEADS * self.page_size
        if self.item_bytes < 1 or self.item_bytes % smallest:
            raise ConfigError(
                f"item_bytes={self.item_bytes} must be a multiple of {smallest} "
                f"({HEADS} heads of {self.page_size} tokens)"
            )
        if self.order not in ("contiguous", "shuffled"):
            raise ConfigError(f"order={self.order!r} must be contiguous or shuffled")

    @property
    def tokens(self) -> int:
        return self.pages * self.page_size

    @property
    def room_bytes(self) -> int:
        """Bytes that arrive on all target ranks together for one room."""
        replicas = max(1, self.target_tp // HEADS)
        return self.layers * 2 * self.pages * self.item_bytes * replicas

    @property
    def run_bytes(self) -> int:
        """Bytes of the pieces that rooms fall into where the tensor-parallel sizes differ and tokens are outermost."""
        return self.item_bytes // self.page_size // max(self.source_tp, self.target_tp)

    @property
    def slot_bytes(self) -> int:
        return max(SLOT_BYTES, self.layers * 2 * self.item_bytes)

    def staging_slots(self) -> int:
        """Slots of one rank: for every room that is open at a time, from every other rank."""
        if self.staging == "never":
            return 0
        room_slots = -(-self.layers * 2 * self.pages * self.item_bytes // self.slot_bytes) + 1
        return room_slots * min(self.concurrency, self.rooms) + max(self.source_tp, self.target_tp)

    def memory_bytes(self, tp_size: int, tp_rank: int) -> int:
        """Bytes that one rank needs: its pool and its staging memory."""
        return pool_bytes(self.layout(0, tp_size, tp_rank).pools[0]) + self.staging_slots() * self.slot_bytes

    def layout(self, address: int, tp_size: int, tp_rank: int) -> CacheLayout:
        """The layout of one rank whose memory begins at ``address``: the pool, then staging memory."""
        pool = kv_pool(
            range(self.layers),
            pages=self.rooms * self.pages,
            page_size=self.page_size,
            heads=HEADS,
            head_bytes=self.item_bytes // (HEADS * self.page_size),
            dtype="bytes",
            order=self.interior,
            tp_size=tp_size,
            tp_rank=tp_rank,
        )
        size, slots = pool_bytes(pool), self.staging_slots()
        if not slots:
            return CacheLayout("bench", (Region(address, size),), (pool,))
        regions = (Region(address, size), Region(address + size, slots * self.slot_bytes))
        return CacheLayout("bench", regions, (pool,), Staging(1, self.slot_bytes, slots))

    def pages_of(self, side: Literal["source", "target"]) -> list[NDArray[np.int64]]:
        """Page ids of every room on one side; the same for all ranks of the side."""
        ids = np.arange(self.rooms * self.pages, dtype=np.int64)
        if self.order == "shuffled":
            np.random.default_rng([self.seed, side == "target"]).shuffle(ids)
        return list(ids.reshape(self.rooms, self.pages))


def buffer(length: int, *, seed: int | None) -> NDArray[np.uint8]:
    """Touched memory: random bytes with a seed, zeros without."""
    if seed is None:
        empty = np.empty(length, dtype=np.uint8)
        empty.fill(0)
        return empty
    words = np.random.default_rng(seed).integers(0, 1 << 63, -(-length // 8), dtype=np.int64)
    return words.view(np.uint8)[:length]

"""What a transfer benchmark moves: the shape of rooms, pools and groups, and the memory that this needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kvbaton.errors import ConfigError
from kvbaton.layout import CacheLayout, InteriorOrder, Pool, Region, Staging, kv_pool, mla_pool, pool_bytes
from kvbaton.plan.staging import StagingPolicy

PageOrder = Literal["contiguous", "shuffled"]
CacheKind = Literal["kv", "mla"]
Plane = Literal["shared", "tcp"]
HEADS = 8
ORDERS: tuple[InteriorOrder, ...] = ("NHD", "HND")
#: Least size of a staging slot in scenarios that have some; a page of all layers fits in any case.
SLOT_BYTES = 8 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchScenario:
    """One benchmark. A room is ``pages`` pages in each of ``layers`` layers, K and V, ``item_bytes`` bytes apiece.

    ``item_bytes`` is what one page of one layer's K (or V) takes over all tensor-parallel ranks together; of ``mla``
    one page of one layer. ``concurrency`` rooms are open at a time, each is submitted in ``chunks``. ``plane``: what
    UCX may use, the fastest there is on one host, or TCP alone. ``open_rooms``: most rooms that may wait meanwhile.
    """

    name: str = "custom"
    layers: int = 8
    pages: int = 64
    item_bytes: int = 32 << 10
    order: PageOrder = "shuffled"
    rooms: int = 64
    concurrency: int = 64
    chunks: int = 1
    open_rooms: int = 0
    source_tp: int = 1
    target_tp: int = 1
    page_size: int = 16
    interior: InteriorOrder = "HND"
    kind: CacheKind = "kv"
    plane: Plane = "shared"
    staging: StagingPolicy = "never"
    rounds: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("layers", "pages", "rooms", "concurrency", "chunks", "source_tp", "target_tp", "rounds"):
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
        if self.chunks > self.pages:
            raise ConfigError(f"chunks={self.chunks} must be at most the pages of a room, {self.pages}")

    @property
    def tokens(self) -> int:
        return self.pages * self.page_size

    @property
    def tensors(self) -> int:
        """Tensors of a layer."""
        return 1 if self.kind == "mla" else 2

    @property
    def room_bytes(self) -> int:
        """Bytes that arrive on all target ranks together for one room."""
        replicas = self.target_tp if self.kind == "mla" else max(1, self.target_tp // HEADS)
        return self.layers * self.tensors * self.pages * self.item_bytes * replicas

    @property
    def gathers(self) -> bool:
        """Whether the leanest loop copies a room together before it writes it: pieces of a token are small."""
        unequal = self.kind == "kv" and self.source_tp != self.target_tp
        return unequal and self.interior == "NHD" and self.rooms == 1

    def page_ranges(self) -> list[range]:
        """Pages of each chunk."""
        return [range(*ends) for ends in pairwise(np.linspace(0, self.pages, self.chunks + 1).astype(int).tolist())]

    @property
    def run_bytes(self) -> int:
        """Bytes of the pieces that rooms fall into where the tensor-parallel sizes differ and tokens are outermost."""
        return self.item_bytes // self.page_size // max(self.source_tp, self.target_tp)

    @property
    def slot_bytes(self) -> int:
        return max(SLOT_BYTES, self.layers * self.tensors * self.item_bytes)

    def staging_slots(self) -> int:
        """Slots of one rank: for every room that is open at a time, from every other rank."""
        if self.staging == "never":
            return 0
        room_slots = -(-self.layers * self.tensors * self.pages * self.item_bytes // self.slot_bytes) + 1
        return room_slots * min(self.concurrency, self.rooms) + max(self.source_tp, self.target_tp)

    def memory_bytes(self, tp_size: int, tp_rank: int) -> int:
        """Bytes that one rank needs: its pool and its staging memory."""
        return pool_bytes(self.layout(0, tp_size, tp_rank).pools[0]) + self.staging_slots() * self.slot_bytes

    def layout(self, address: int, tp_size: int, tp_rank: int) -> CacheLayout:
        """The layout of one rank whose memory begins at ``address``: the pool, then staging memory."""
        pool = self._pool(tp_size, tp_rank)
        size, slots = pool_bytes(pool), self.staging_slots()
        if not slots:
            return CacheLayout("bench", (Region(address, size),), (pool,))
        regions = (Region(address, size), Region(address + size, slots * self.slot_bytes))
        return CacheLayout("bench", regions, (pool,), Staging(1, self.slot_bytes, slots))

    def _pool(self, tp_size: int, tp_rank: int) -> Pool:
        pages = self.rooms * self.pages
        if self.kind == "mla":
            row = self.item_bytes // self.page_size
            return mla_pool(
                range(self.layers),
                pages=pages,
                page_size=self.page_size,
                latent_bytes=row - row // 9,
                rope_bytes=row // 9,
                dtype="bytes",
                tp_size=tp_size,
                tp_rank=tp_rank,
                name="kv",
            )
        return kv_pool(
            range(self.layers),
            pages=pages,
            page_size=self.page_size,
            heads=HEADS,
            head_bytes=self.item_bytes // (HEADS * self.page_size),
            dtype="bytes",
            order=self.interior,
            tp_size=tp_size,
            tp_rank=tp_rank,
        )

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


def suite(rounds: int, seed: int) -> list[BenchScenario]:
    """The standard scenarios: 28 layers of 8 heads of 128 bytes unless a name says otherwise, pages of 16 tokens."""
    room = BenchScenario(
        layers=28, item_bytes=16 << 10, pages=16, rooms=1, concurrency=1, rounds=max(rounds, 15), seed=seed
    )
    small = replace(room, layers=2, pages=1, item_bytes=32 << 10)
    large = replace(room, pages=256, rounds=rounds)
    scenarios = [
        replace(small, name="131 kB", rounds=max(rounds, 50)),
        replace(room, name="14.7 MB"),
        replace(room, name="58.7 MB", pages=64),
        replace(room, name="58.7 MB, contiguous", pages=64, order="contiguous"),
        replace(large, name="235 MB"),
        replace(large, name="235 MB in 4 chunks", chunks=4),
        replace(room, name="4 x 58.7 MB at once", pages=64, rooms=4, concurrency=4, rounds=rounds),
        replace(room, name="8 x 14.7 MB at once", rooms=8, concurrency=8, rounds=rounds),
        replace(small, name="64 x 131 kB at once", rooms=64, concurrency=64),
        replace(room, name="page size 1, 512 pages", page_size=1, pages=512, item_bytes=1 << 10, rounds=rounds),
        replace(room, name="MLA, 16.5 MB", kind="mla", pages=32, item_bytes=16 * 1152),
        replace(room, name="TCP, 14.7 MB", plane="tcp"),
    ]
    for source, target in ((2, 1), (1, 2), (2, 2)):
        for interior in ORDERS:
            name = f"TP {source} to {target}, {interior}, 14.7 MB"
            unequal = replace(room, name=name, source_tp=source, target_tp=target, interior=interior, staging="auto")
            scenarios.append(unequal)
    return scenarios

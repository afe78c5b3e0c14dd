"""What a soak does, and the memory that its rooms need."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from kvbaton.errors import ConfigError
from kvbaton.layout import CacheLayout, Region, kv_pool, pool_bytes

Side = Literal["source", "target"]
SIDES: tuple[Side, Side] = ("source", "target")
PAGE_SIZE = 16
PAGES = 2
TOKENS = PAGES * PAGE_SIZE
LAYERS = 2
HEAD_BYTES = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class SoakConfig:
    """Half of the rooms run with a source that lives all along and targets that are killed, half the other way round.

    ``aborts`` is the share of rooms that one side gives up, half of them each; ``sample_rooms`` the pause between two
    samples; the first ``warmup`` of each half is not judged.
    """

    rooms: int = 50_000
    aborts: float = 0.05
    restart_seconds: float = 60.0
    concurrency: int = 32
    sample_rooms: int = 500
    warmup: float = 0.5
    seed: int = 0
    transport: str = "nixl"

    def __post_init__(self) -> None:
        if self.rooms < 4 * self.sample_rooms or self.sample_rooms < 1:
            raise ConfigError(f"rooms={self.rooms} must be at least four times sample_rooms={self.sample_rooms}")
        if not 0 <= self.aborts <= 1 or not 0 <= self.warmup < 1:
            raise ConfigError("aborts and warmup are shares: 0 to 1")
        if self.concurrency < 1 or not self.restart_seconds > 0:
            raise ConfigError("concurrency and restart_seconds must be positive")

    @property
    def slots(self) -> int:
        """Rooms that a pool holds: some may still be leased while their successors begin."""
        return 4 * self.concurrency

    def layout(self, address: int) -> CacheLayout:
        pool = kv_pool(
            range(LAYERS),
            pages=self.slots * PAGES,
            page_size=PAGE_SIZE,
            heads=1,
            head_bytes=HEAD_BYTES,
            dtype="bytes",
            fusion="page",
        )
        return CacheLayout("soak", (Region(address, pool_bytes(pool)),), (pool,))

    def who_aborts(self, room: int) -> Side | None:
        """Which side gives a room up; the same answer in every process."""
        draw = random.Random(self.seed * 1_000_003 + room).random()
        if draw >= self.aborts:
            return None
        return "source" if draw < self.aborts / 2 else "target"

"""What moving bytes costs, as far as choosing a way needs to know. Measured by ``kvbaton bench calibrate``.

    direct = descriptors * descriptor_seconds + bytes * wire_byte_seconds
    staged = staged_seconds + bytes * (wire_byte_seconds + copy_byte_seconds) + pieces * piece_seconds

Layers are worth a post of their own, ahead of the rest of their chunk, when that hides several times what a post costs:
no more is hidden than moving them takes, and no more than computing the layers that are left takes.

A descriptor is a run that is contiguous on both sides; a piece is what gather and scatter copy at once, the same run in
memory. The defaults are ratios more than truths, and a few lines of ``calibrate`` replace them. They go by where the
pages are, since that decides which of the two is dear. In memory of the host a copied byte costs as much as a moved
one. Between the GPUs of one machine a copied byte costs next to nothing, and a descriptor is a copy of its own that has
to be launched and waited for (CUDA IPC): it costs as much as 200 KiB copied.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Literal

from msgspec import Struct

from kvbaton.layout import MemoryKind
from kvbaton.plan.pair import PairPlan, PartId, PartPlan

LayersPolicy = Literal["auto", "always", "never"]

#: So many times what a post costs must be hidden by posting layers ahead.
HIDDEN_POSTS = 4


class Costs(Struct, frozen=True, kw_only=True):
    """Seconds. ``copy_byte_seconds`` is gather and scatter together, for large pieces; ``post_seconds`` a chunk's way
    from the engine to the transport, without its descriptors and bytes."""

    descriptor_seconds: float = 1.5e-6
    wire_byte_seconds: float = 1.2e-10
    copy_byte_seconds: float = 2.5e-10
    piece_seconds: float = 2.0e-8
    staged_seconds: float = 1.0e-4
    post_seconds: float = 1.5e-4

    def direct(self, part: PartPlan, blocks: int) -> float:
        """Predicted seconds to write ``blocks`` blocks of ``part`` one descriptor for each lane and block."""
        return blocks * len(part.lane_bytes) * self.descriptor_seconds + self._wire(part, blocks)

    def staged(self, part: PartPlan, blocks: int) -> float:
        """Predicted seconds to gather, write once and scatter."""
        copied = blocks * part.block_bytes * self.copy_byte_seconds
        pieces = blocks * len(part.lane_bytes) * self.piece_seconds
        return self.staged_seconds + copied + pieces + self._wire(part, blocks)

    def prefers_staging(self, part: PartPlan, blocks: int) -> bool:
        return self.staged(part, blocks) < self.direct(part, blocks)

    def token_seconds(self, pair: PairPlan, staged: Container[PartId]) -> float:
        """Predicted seconds to write one token of all parts that do not travel wholly through staging."""
        return sum(
            self.direct(part, 1) / part.block_rows for part in pair.parts if part.paged and part.id not in staged
        )

    def worth_a_post(self, moving: float, computing: float) -> bool:
        """Whether layers go ahead of their chunk: moving them takes ``moving`` seconds, computing what is left
        ``computing``."""
        return min(moving, computing) >= HIDDEN_POSTS * self.post_seconds

    def _wire(self, part: PartPlan, blocks: int) -> float:
        return blocks * part.block_bytes * self.wire_byte_seconds


#: Measured over shared memory on a two-core machine; between GPUs of two machines as well, until it is measured.
HOST_COSTS = Costs()
#: Measured on an H200 between two processes over CUDA IPC, in slots of 16 MiB; the byte of the wire is NVLink's.
DEVICE_COSTS = Costs(
    descriptor_seconds=6.0e-6,
    wire_byte_seconds=2.5e-12,
    copy_byte_seconds=3.0e-11,
    piece_seconds=0.0,
    staged_seconds=5.0e-4,
)


def default_costs(memory: MemoryKind, *, near: bool) -> Costs:
    """For pages in such memory; ``near``: both ranks are on one machine."""
    return DEVICE_COSTS if memory == "VRAM" and near else HOST_COSTS

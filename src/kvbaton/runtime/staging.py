"""This rank's staging memory at work: slots for what is being sent, gather before a write, scatter after arrival.

The slots of one rank serve both directions if it has both roles, out of one pool: the core leases slots to the sources
of its transfers; the slots here that hold gathered data are the driver's, from gather until the write has settled or
its peer was fenced.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvbaton.protocol.effects import PostWrite, Scatter
from kvbaton.protocol.events import WriteId
from kvbaton.runtime.gather import gather, memory, scatter
from kvbaton.staging import StagedPart, StagingPool
from kvbaton.table import Table

Entries = NDArray[np.int32]


class StagingDesk:
    """See the module. Owned by the driver's thread."""

    def __init__(self, pool: StagingPool) -> None:
        self._pool = pool
        self._taken: dict[WriteId, int] = {}

    def __len__(self) -> int:
        return len(self._taken)

    def reader(self, slot: int) -> WriteId | None:
        """The write that a slot holds the data of."""
        return next((write for write, taken in self._taken.items() if taken == slot), None)

    def may_post(self, write: PostWrite) -> bool:
        """Whether the write needs no slot of ours, or one is free."""
        return write.staged is None or bool(self._pool)

    def gather(self, write: PostWrite) -> tuple[Entries, Entries]:
        """Take a slot, gather the write's source entries into it; the entries of both staging tables to write."""
        run = write.staged
        if run is None:
            return write.source_entries, write.target_entries
        slot = self._pool.take()
        self._taken[write.write] = slot
        staged = run.staged
        blocks = _blocks(staged.source, staged, slot, run.count)
        gather(staged.part.source.table, staged.part.lane_bytes, write.source_entries, blocks)
        steps = np.arange(run.count, dtype=np.int32)
        base = staged.blocks_per_slot
        return steps + np.int32(slot * base), steps + np.int32(run.slot * base + run.first)

    def settled(self, write: PostWrite) -> None:
        """The write is done, or its peer fenced: nothing reads its slot any more."""
        slot = self._taken.pop(write.write, None)
        if slot is not None:
            self._pool.release((slot,))

    def scatter(self, effect: Scatter) -> None:
        staged = effect.staged
        blocks = _blocks(staged.target, staged, effect.slot, effect.count)
        scatter(staged.part.target.table, staged.part.lane_bytes, effect.target_entries, blocks)


def _blocks(table: Table, staged: StagedPart, slot: int, count: int) -> NDArray[np.uint8]:
    """The first ``count`` blocks of a slot, shaped ``(count, block_bytes)``."""
    size = staged.part.block_bytes
    return memory(int(table.rows[slot, 0]), count * size).reshape(count, size)

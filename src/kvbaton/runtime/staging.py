"""This rank's staging memory at work: slots for what is being sent, gather before a write, scatter after arrival.

The slots of one rank serve both directions if it has both roles, out of one pool: the core leases slots to the sources
of its transfers; the slots here that hold gathered data are the driver's, from gather until the write has settled or
its peer was fenced.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvbaton.plan.staging import StagingPool
from kvbaton.protocol.effects import PostWrite, Scatter
from kvbaton.protocol.events import WriteId
from kvbaton.runtime.gather import gather, scatter

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

    def slot_free(self) -> bool:
        """Whether a staged write could be gathered now."""
        return bool(self._pool)

    def gather(self, write: PostWrite) -> tuple[Entries, Entries]:
        """Take a slot, gather the write's source entries into it; the entries of both staging tables to write.

        Raises TransportError; the slot is then taken until the write's peer is fenced.
        """
        run = write.staged
        if run is None:
            return write.source_entries, write.target_entries
        slot = self._pool.take()
        self._taken[write.write] = slot
        staged = run.staged
        address = int(staged.source.rows[slot, 0])
        gather(staged.part.source_lanes, write.source_entries, address)
        steps = np.arange(run.count, dtype=np.int32)
        base = staged.blocks_per_slot
        return steps + np.int32(slot * base), steps + np.int32(run.slot * base + run.first)

    def settled(self, write: PostWrite) -> None:
        """The write is done, or its peer fenced: nothing reads its slot any more."""
        slot = self._taken.pop(write.write, None)
        if slot is not None:
            self._pool.release((slot,))

    def scatter(self, effect: Scatter) -> None:
        """From a slot to its blocks' pages. Raises TransportError."""
        staged = effect.staged
        address = int(staged.target.rows[effect.slot, 0])
        scatter(staged.part.target_lanes, effect.target_entries, address)

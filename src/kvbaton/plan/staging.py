"""Staging: many small pieces travel as one write, through a buffer on each side.

Where a part falls into pieces of a few hundred bytes (unequal tensor parallelism with tokens outermost), one descriptor
for each costs far more than copying. Instead the source gathers blocks into a slot of its own staging memory, writes
the slot in one run into a slot that the target leased for this transfer, and the target scatters it into its pages once
everything has arrived. A block lies in a slot as ``block_bytes`` contiguous bytes, lane after lane, so that any range
of blocks is one run.

The target decides (it leases the slots, see ``StagingPool``), the source follows what ``Open`` says. The slots of a
part are filled in order: the k-th holds blocks ``[k * blocks_per_slot, …)`` counted from the first block granted.
Where fewer slots are free than a part needs, they hold its first blocks, and the others are written directly.
Slots are leased exactly like pages: until the transfer has closed on proof. Parts whose pools lie in another memory
than the staging (aux rows of the host beside pages of a GPU) are never staged. Pure arithmetic; no memory is touched
here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kvbaton.errors import IncompatibleError, LayoutError
from kvbaton.layout import CacheLayout
from kvbaton.plan.costs import Costs
from kvbaton.plan.pair import PairPlan, PartPlan, pair_plan
from kvbaton.plan.table import Table

StagingPolicy = Literal["auto", "always", "never"]

#: Most blocks in a slot, however small they are: each is an entry of the tables that the transport prepares.
MAX_BLOCKS_PER_SLOT = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class StagedPart:
    """How a part travels through staging: tables of whole blocks in the slots of both sides."""

    part: PartPlan
    blocks_per_slot: int
    source: Table
    target: Table

    def slots_for(self, blocks: int) -> int:
        """Target slots that ``blocks`` blocks need."""
        return -(-blocks // self.blocks_per_slot)

    def runs(self, blocks: range, first: int) -> Iterator[tuple[int, int, range]]:
        """(number of the slot, first block within it, blocks) for each slot that ``blocks`` touch.

        ``first`` is the first block granted: block ``first`` begins slot 0.
        """
        at = blocks.start
        while at < blocks.stop:
            slot, within = divmod(at - first, self.blocks_per_slot)
            stop = min(blocks.stop, at + self.blocks_per_slot - within)
            yield slot, within, range(at, stop)
            at = stop


def stage(pair: PairPlan, source: CacheLayout, target: CacheLayout) -> tuple[StagedPart | None, ...]:
    """For each part how it can be staged; None where a side has no staging memory that it could go through.

    Raises IncompatibleError (``ours`` is the source's), naming the size to set, where a slot cannot hold one block.
    """
    if source.staging is None or target.staging is None:
        return (None,) * len(pair.parts)
    slot_bytes = min(source.staging.slot_bytes, target.staging.slot_bytes)
    near = [_is_near(part.source.table, source) and _is_near(part.target.table, target) for part in pair.parts]
    largest = max((part for part, here in zip(pair.parts, near, strict=True) if here), key=_block_bytes, default=None)
    if largest is not None and largest.block_bytes > slot_bytes:
        hint = f"set --staging-slot-bytes to at least {largest.block_bytes} on both sides"
        raise IncompatibleError(
            f"part {largest.id}: a block of {largest.block_bytes} bytes does not fit a staging slot of {slot_bytes}; "
            f"{hint}",
            field="staging.slot_bytes",
            ours=str(source.staging.slot_bytes),
            theirs=str(target.staging.slot_bytes),
            hint=hint,
        )
    return tuple(
        _staged(part, slot_bytes, source, target) if here else None for part, here in zip(pair.parts, near, strict=True)
    )


def slots_too_small(sources: Sequence[CacheLayout], targets: Sequence[CacheLayout]) -> list[IncompatibleError]:
    """Why ranks of two groups that fit otherwise would refuse each other for their staging slots, each once."""
    found: dict[tuple[str, str], IncompatibleError] = {}
    for source in sources:
        for target in targets:
            try:
                stage(pair_plan(source, target), source, target)
            except IncompatibleError as error:
                found.setdefault((error.ours, error.theirs), error)
    return list(found.values())


def _block_bytes(part: PartPlan) -> int:
    return part.block_bytes


def _is_near(table: Table, layout: CacheLayout) -> bool:
    """Whether a part's memory is of the kind and device of the staging memory, so that one copy joins them."""
    if layout.staging is None:
        return False
    region = layout.regions[layout.staging.region]
    return table.memory == region.memory and bool((table.rows[:, 2] == region.device).all())


def _staged(part: PartPlan, slot_bytes: int, source: CacheLayout, target: CacheLayout) -> StagedPart:
    per_slot = min(slot_bytes // part.block_bytes, MAX_BLOCKS_PER_SLOT) if part.paged else 1
    return StagedPart(
        part=part,
        blocks_per_slot=per_slot,
        source=_table(source, part.block_bytes, per_slot),
        target=_table(target, part.block_bytes, per_slot),
    )


def _table(layout: CacheLayout, block_bytes: int, blocks_per_slot: int) -> Table:
    """One row per slot: its blocks, side by side."""
    staging = layout.staging
    if staging is None:
        raise LayoutError("this layout has no staging memory")
    region = layout.regions[staging.region]
    rows = np.empty((staging.slots, 5), dtype=np.int64)
    rows[:, 0] = region.address + np.arange(staging.slots, dtype=np.int64) * staging.slot_bytes
    rows[:, 1] = rows[:, 3] = block_bytes
    rows[:, 2] = region.device
    rows[:, 4] = blocks_per_slot
    return Table(rows=rows, memory=region.memory)


class StagingPool:
    """A rank's slots: who may have them, and which are free. Never overcommits; what is not free is not staged.

    A rank in both roles leases slots to its sources and takes slots for what it sends itself: from one list, and once
    it has somebody to send to (``sends``) one slot is kept for that, so that two ranks never wait for each other.
    """

    def __init__(self, layout: CacheLayout, policy: StagingPolicy) -> None:
        self.sends = False
        self.slots = layout.staging.slots if layout.staging is not None else 0
        self._free = list(range(self.slots))
        self._policy = policy

    def __len__(self) -> int:
        """Free slots. May be read from any thread."""
        return len(self._free)

    def lease(self, staged: StagedPart | None, blocks: int, costs: Costs) -> tuple[int, ...]:
        """Slots for the first of ``blocks`` blocks of a part, as far as there are free ones; none where direct writes
        are cheaper."""
        if staged is None or self._policy == "never" or not blocks:
            return ()
        count = min(staged.slots_for(blocks), len(self._free) - self.sends)
        held = min(blocks, count * staged.blocks_per_slot)
        if count < 1 or (self._policy == "auto" and not costs.prefers_staging(staged.part, held)):
            return ()
        taken = tuple(self._free[-count:])
        del self._free[-count:]
        return taken

    def take(self) -> int:
        """One slot to send from. There must be a free one."""
        return self._free.pop()

    def release(self, slots: tuple[int, ...]) -> None:
        self._free.extend(slots)

"""Staging: gathered, written once and scattered equals written directly; slots are leased like pages."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvbaton.costs import Costs
from kvbaton.errors import AbortedError, LayoutError
from kvbaton.layout import CacheLayout, Region, Staging, kv_pool, pool_bytes
from kvbaton.messages import Coordinates, Grant, Open
from kvbaton.plan import PairPlan, pair_plan
from kvbaton.protocol.effects import KVPoll
from kvbaton.protocol.events import AbortRequested, Chunk, ChunkSubmitted, GrantsPublished, ReceiverOpened, SenderOpened
from kvbaton.protocol.settings import Settings
from kvbaton.runs import merge
from kvbaton.runtime.gather import gather, memory, scatter
from kvbaton.staging import StagingPool, stage
from kvbaton.testing.world import Rank, World

Bytes = NDArray[np.uint8]
PAGES = 12
ALWAYS = Settings(staging="always")


def real_layout(tp: int, rank: int, order: str, page_size: int) -> tuple[Bytes, CacheLayout]:
    """A layout over memory of this process, filled with what the rank's number seeds."""
    pool = kv_pool(
        range(2),
        pages=PAGES,
        page_size=page_size,
        heads=4,
        head_bytes=8,
        dtype="u1",
        order=order,  # type: ignore[arg-type]
        tp_size=tp,
        tp_rank=rank,
    )
    buffer = np.random.default_rng(rank).integers(1, 256, pool_bytes(pool), dtype=np.uint8)
    return buffer, CacheLayout("m", (Region(buffer.ctypes.data, len(buffer)),), (pool,))


@given(
    shape=st.tuples(*[st.sampled_from((1, 2, 4)), st.sampled_from(("HND", "NHD")), st.sampled_from((2, 4, 8))] * 2),
    tokens=st.integers(1, 16),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_gather_and_scatter_equal_direct_runs(
    shape: tuple[int, str, int, int, str, int], tokens: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    source_memory, source = real_layout(shape[0], 0, shape[1], shape[2])
    staged_memory, target = real_layout(shape[3], 0, shape[4], shape[5])
    staged_memory[:] = 0
    direct = staged_memory.copy()
    for part in pair_plan(source, target).parts:
        blocks = part.blocks(0, tokens)
        entries = part.entries(blocks, rng.permutation(PAGES), 0, rng.permutation(PAGES), 0)
        through = np.zeros((len(blocks), part.block_bytes), dtype=np.uint8)
        gather(part.source.table, part.lane_bytes, entries[0], through)
        scatter(part.target.table, part.lane_bytes, entries[1], through)
        runs = merge(part.source.table, entries[0], part.target.table, entries[1])
        for s, t, n in zip(runs.source, runs.target, runs.length, strict=True):
            at = int(t) - target.regions[0].address
            direct[at : at + n] = memory(int(s), int(n))
    np.testing.assert_array_equal(staged_memory, direct)
    assert source_memory.any()


def world_layout(base: int, tp: int, rank: int, *, slot_bytes: int = 256, slots: int = 8) -> CacheLayout:
    """NHD, so that unequal tensor parallelism falls into pieces of one head."""
    pool = kv_pool(
        range(2),
        pages=PAGES,
        page_size=4,
        heads=4,
        head_bytes=8,
        dtype="u1",
        order="NHD",
        tp_size=tp,
        tp_rank=rank,
    )
    regions = (Region(base, pool_bytes(pool)), Region(base + (1 << 30), slots * slot_bytes))
    return CacheLayout("m", regions, (pool,), Staging(1, slot_bytes, slots))


class Pair:
    """Two sources and a target, all with staging memory; room 1 of 22 tokens."""

    def __init__(self, settings: Settings = ALWAYS, *, slots: int = 8, slot_bytes: int = 256) -> None:
        self.world = World(settings)
        sizes = {"slots": slots, "slot_bytes": slot_bytes}
        self.sources = [
            self.world.add(
                f"p{rank}",
                world_layout((rank + 1) << 40, 2, rank, **sizes),
                group="p",
                group_size=2,
                coordinates=Coordinates(tp=rank),
            )
            for rank in range(2)
        ]
        self.target = self.world.add("d", world_layout(9 << 40, 1, 0, **sizes))
        rng = np.random.default_rng(3)
        for source in self.sources:
            for buffer in source.memory.values():
                buffer[:] = rng.integers(1, 256, len(buffer), dtype=np.uint8)

    def open(self, room: int = 1, units: tuple[int, ...] = (5, 3, 9, 1, 7, 0)) -> None:
        for source in self.sources:
            source.do(SenderOpened(room))
        self.target.do(ReceiverOpened(room, tuple(source.address for source in self.sources)))
        self.target.do(GrantsPublished(room, (Grant("kv", 0, 22, units),), 22))
        self.world.run()

    def submit(self, room: int = 1, *, cut: int = 12) -> None:
        for source in self.sources:
            for start, stop, units in ((0, cut, (2, 4, 6)), (cut, 22, (8, 10, 11))):
                chunk = Chunk(spans=(Grant("kv", start, stop, units),), last=stop == 22)
                source.do(ChunkSubmitted(room, chunk))
        self.world.run()

    def expect_bytes(self, units: tuple[int, ...] = (5, 3, 9, 1, 7, 0)) -> None:
        """Token by token, head by head: what the target holds is what the owner of the head holds."""
        for layer in range(2):
            for tensor in range(2):
                for token in range(22):
                    for head in range(4):
                        owner = self.sources[head // 2]
                        ours = item(self.target, 4, layer, tensor, units[token // 4], token % 4, head)
                        page = (2, 4, 6, 8, 10, 11)[token // 4]
                        theirs = item(owner, 2, layer, tensor, page, token % 4, head % 2)
                        np.testing.assert_array_equal(ours, theirs)

    def slots_granted(self) -> int:
        opens = [message for *_, message in self.world.trace if isinstance(message, Open)]
        return sum(len(grant.slots) for message in opens for grant in message.staging)


def item(rank: Rank, heads: int, layer: int, tensor: int, page: int, row: int, head: int) -> Bytes:
    unit = 4 * heads * 8
    offset = ((layer * 2 + tensor) * PAGES + page) * unit + row * heads * 8 + head * 8
    return rank.view(rank.layout.regions[0].address + offset, 8)


def test_a_staged_room_arrives_byte_for_byte_in_chunks() -> None:
    pair = Pair(slots=12)
    pair.open()
    assert pair.slots_granted() == 2 * 6  # a block is 4 tokens of 2 heads in 2 layers, K and V: one fills a slot
    pair.submit()
    assert pair.target.status("target", 1).poll is KVPoll.Success
    pair.expect_bytes()
    for rank in (*pair.sources, pair.target):
        rank.core.check_invariants()


def test_slots_come_back_and_rooms_that_find_none_go_directly() -> None:
    pair = Pair(slots=12)
    pair.open(1)
    pair.open(2, units=(2, 4, 6, 8, 10, 11))
    assert pair.slots_granted() == 12
    for room in (1, 2):
        pair.submit(room)
        assert pair.target.status("target", room).poll is KVPoll.Success
    pair.expect_bytes()
    pair.open(3)
    assert pair.slots_granted() == 24


def test_a_slot_is_leased_until_the_source_has_drained() -> None:
    pair = Pair(slots=12)
    pair.open(1)
    for source in pair.sources:
        source.hold_writes = True
    pair.submit(1)
    pair.target.do(AbortRequested(1, "target", AbortedError("gone")))
    pair.world.run()
    assert pair.target.status("target", 1).leased
    before = pair.slots_granted()
    pair.open(2)
    assert pair.slots_granted() == before, "slots that may still be written were given to another room"
    for source in pair.sources:
        source.release_writes()
        source.hold_writes = False
    pair.world.run()
    assert not pair.target.status("target", 1).leased
    pair.open(3)
    assert pair.slots_granted() == before + 12


def test_a_slot_too_small_for_a_block_is_refused_at_the_handshake_with_the_size_to_set() -> None:
    pair = Pair(slot_bytes=128)
    pair.open()
    error = pair.target.status("target", 1).error
    assert error is not None
    assert "--staging-slot-bytes to at least 256" in str(error)


def test_without_staging_memory_on_both_sides_nothing_is_staged() -> None:
    _, source = real_layout(2, 0, "NHD", 4)
    _, target = real_layout(1, 0, "NHD", 4)
    assert stage(pair_plan(source, target), source, target) == (None,)


def test_the_cost_model_stages_small_pieces_only() -> None:
    pool = StagingPool(world_layout(1 << 40, 1, 0, slots=64), "auto", Costs(staged_seconds=0.0))
    source, target = world_layout(1 << 40, 2, 0, slots=64), world_layout(2 << 40, 1, 0, slots=64)
    small = stage(pair_plan(source, target), source, target)[0]
    assert small is not None
    assert pool.lease(small, 4)
    large = world_layout(1 << 40, 1, 0, slot_bytes=512)
    equal: PairPlan = pair_plan(large, large)
    assert not StagingPool(large, "auto", Costs()).lease(stage(equal, large, large)[0], 1)


@pytest.mark.parametrize("staging", [Staging(2, 256, 8), Staging(1, 256, 9), Staging(1, 0, 8), Staging(1, 256, 0)])
def test_staging_that_leaves_its_region_is_refused(staging: Staging) -> None:
    good = world_layout(1 << 40, 1, 0)
    with pytest.raises(LayoutError, match="staging"):
        CacheLayout(good.model, good.regions, good.pools, staging).validate()

"""Staging: gathered, written once and scattered equals written directly; slots are leased like pages."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvbaton.errors import AbortedError, IncompatibleError, LayoutError, TransportError
from kvbaton.layout import CacheLayout, Coordinates, MemoryKind, Region, Staging, aux_pool, kv_pool, pool_bytes
from kvbaton.plan import lanes
from kvbaton.plan.costs import Costs
from kvbaton.plan.pair import PairPlan, pair_plan
from kvbaton.plan.runs import merge
from kvbaton.plan.staging import MAX_BLOCKS_PER_SLOT, StagingPool, slots_too_small, stage
from kvbaton.protocol.effects import KVPoll
from kvbaton.protocol.events import AbortRequested, Chunk, ChunkSubmitted, GrantsPublished, ReceiverOpened, SenderOpened
from kvbaton.protocol.messages import Grant, Open, Verdict
from kvbaton.protocol.settings import Settings
from kvbaton.runtime.gather import gather, memory, scatter
from kvbaton.testing.rank import Rank
from kvbaton.testing.world import World

Bytes = NDArray[np.uint8]
PAGES = 12
ALWAYS = Settings(staging="always")
#: (memory of the pages, a letter for each rank's machine, whether they are gathered)
WAYS: list[tuple[MemoryKind, str, bool]] = [
    ("VRAM", "aa", True),
    ("VRAM", "ab", False),
    ("VRAM", "  ", False),
    ("DRAM", "aa", False),
]


def real_layout(
    tp: int, rank: int, order: str, page_size: int, *, head_bytes: int = 8, fusion: str = "none"
) -> tuple[Bytes, CacheLayout]:
    """A layout over memory of this process, filled with what the rank's number seeds."""
    pool = kv_pool(
        range(2),
        pages=PAGES,
        page_size=page_size,
        heads=4,
        head_bytes=head_bytes,
        dtype="u1",
        order=order,  # type: ignore[arg-type]
        fusion=fusion,  # type: ignore[arg-type]
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
        theirs, ours = rng.permutation(PAGES), rng.permutation(PAGES)
        entries = part.entries(blocks, theirs, 0, ours, 0)
        through = np.zeros((len(blocks), part.block_bytes), dtype=np.uint8)
        gather(part.source_lanes, part.source_blocks(blocks, theirs, 0), through.ctypes.data)
        scatter(part.target_lanes, part.target_blocks(blocks, ours, 0), through.ctypes.data)
        runs = merge(part.source.table, entries[0], part.target.table, entries[1])
        for s, t, n in zip(runs.source, runs.target, runs.length, strict=True):
            at = int(t) - target.regions[0].address
            direct[at : at + n] = memory(int(s), int(n))
    np.testing.assert_array_equal(staged_memory, direct)
    assert source_memory.any()


@pytest.mark.parametrize(
    ("at", "grids"),
    [
        ([0], [(0, (), ())]),
        ([0, 8, 16], [(0, (3,), (8,))]),
        ([0, 8, 100, 108, 200, 208], [(0, (3, 2), (100, 8))]),
        ([0, 8, 100, 108, 1000, 1008, 1100, 1108], [(0, (2, 2, 2), (1000, 100, 8))]),
        ([0, 8, 16, 100, 108], [(0, (3,), (8,)), (3, (1,), (1,)), (4, (1,), (1,))]),
        ([16, 8, 0], [(0, (1,), (1,)), (1, (1,), (1,)), (2, (1,), (1,))]),
    ],
)
def test_addresses_are_as_few_grids_as_they_nest_in(at: list[int], grids: list[object]) -> None:
    assert list(lanes._nests(np.array(at, dtype=np.int64))) == grids


def test_however_many_layers_and_tokens_a_block_is_one_grid() -> None:
    for order in ("HND", "NHD"):
        source, target = (real_layout(tp, 0, order, 8)[1] for tp in (2, 1))
        (part,) = pair_plan(source, target).parts
        assert (len(part.source_lanes.grids), len(part.target_lanes.grids)) == (1, 1)


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
        pages = (2, 4, 6, 8, 10, 11)
        for source in self.sources:
            for start, stop, units in ((0, cut, pages[: cut // 4]), (cut, 22, pages[cut // 4 :])):
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


def test_a_staged_write_says_how_many_bytes_it_moves() -> None:
    pair = Pair(slots=12)
    pair.open()
    for source in pair.sources:
        source.hold_writes = True
    pair.submit()
    for source in pair.sources:
        assert [write.bytes for write in source.held] == [256] * 6
        assert source.status("source", 1).bytes == 6 * 256


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


@pytest.mark.parametrize("cut", [4, 12, 16])
@pytest.mark.parametrize("slots", range(1, 12))
def test_what_a_part_needs_beyond_the_slots_that_are_free_goes_directly(slots: int, cut: int) -> None:
    """As a long prompt does that is larger than the staging memory: without this none of it would be gathered."""
    pair = Pair(slots=slots)
    pair.open()
    assert pair.slots_granted() == slots
    for source in pair.sources:
        source.hold_writes = True
    pair.submit(cut=cut)
    posted = [write for source in pair.sources for write in source.held]
    staged = [write for write in posted if write.staged is not None]
    assert len(staged) == slots
    assert sum(write.bytes for write in posted) == 2 * 6 * 256
    for source in pair.sources:
        source.release_writes()
    pair.world.run()
    assert pair.target.status("target", 1).poll is KVPoll.Success
    pair.expect_bytes()
    for rank in (*pair.sources, pair.target):
        rank.core.check_invariants()


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
    assert isinstance(error, IncompatibleError)
    assert "--staging-slot-bytes to at least 256" in str(error)
    assert (error.field, error.ours, error.theirs) == ("staging.slot_bytes", "128", "128")
    refused = [m for _, _, receiver, m in pair.world.trace if isinstance(m, Verdict) and receiver in ("p0", "d")]
    assert refused
    assert not any(message.compatible for message in refused)
    assert all("--staging-slot-bytes to at least 256" in message.reason for message in refused)


def test_each_side_sees_its_own_slot_in_the_refusal() -> None:
    small, large = world_layout(1 << 40, 2, 0, slot_bytes=128), world_layout(2 << 40, 1, 0, slot_bytes=512)
    with pytest.raises(IncompatibleError) as refusal:
        stage(pair_plan(small, large), small, large)
    assert (refusal.value.ours, refusal.value.theirs) == ("128", "512")
    (told,) = slots_too_small([small, small], [large])
    assert told.hint == "set --staging-slot-bytes to at least 256 on both sides"
    assert slots_too_small([large], [large]) == []


def test_each_side_is_told_its_own_slot_first_at_the_handshake() -> None:
    world = World(ALWAYS)
    source = world.add("p", world_layout(1 << 40, 1, 0, slot_bytes=128))
    target = world.add("d", world_layout(2 << 40, 1, 0, slot_bytes=1024))
    target.do(ReceiverOpened(1, (source.address,)))
    world.run()
    error = target.status("target", 1).error
    assert isinstance(error, IncompatibleError)
    assert (error.ours, error.theirs) == ("1024", "128")
    verdicts = {m.sender: (m.ours, m.theirs) for *_, m in world.trace if isinstance(m, Verdict)}
    assert verdicts == {"i-p": ("128", "1024"), "i-d": ("1024", "128")}


def test_small_blocks_do_not_make_large_tables() -> None:
    """A slot of 4 MiB holds 65,536 aux rows of 64 bytes; each would be a descriptor that NIXL prepares."""
    pool = kv_pool(range(1), pages=4, page_size=1, heads=1, head_bytes=1, dtype="u1")
    regions = tuple(Region((i + 1) << 40, 1 << 24) for i in range(3))
    pools = (pool, aux_pool(slots=4, slot_bytes=64, region=1))
    layout = CacheLayout("m", regions, pools, Staging(2, 4 << 20, 2))
    kv, aux = stage(pair_plan(layout, layout), layout, layout)
    assert kv is not None
    assert aux is not None
    assert (kv.blocks_per_slot, aux.blocks_per_slot) == (MAX_BLOCKS_PER_SLOT, 1)


def test_what_lies_on_another_device_than_the_slots_goes_directly() -> None:
    """Aux rows are in host memory, pages and slots on the GPU."""
    kv = kv_pool(range(1), pages=4, page_size=4, heads=1, head_bytes=8, dtype="u1")
    aux = aux_pool(slots=4, slot_bytes=64, region=1)
    regions = Region(1 << 40, 4096, "VRAM", 1), Region(2 << 40, 4096), Region(3 << 40, 4096, "VRAM", 1)
    layout = CacheLayout("m", regions, (kv, aux), Staging(2, 256, 2))
    layout.validate()
    staged = stage(pair_plan(layout, layout), layout, layout)
    assert [part is not None for part in staged] == [True, False]
    for elsewhere in (Region(3 << 40, 4096), Region(3 << 40, 4096, "VRAM", 0)):
        wrong = msgspec.structs.replace(layout, regions=(*regions[:2], elsewhere))
        with pytest.raises(LayoutError, match="staging memory must be on the device of the pages"):
            wrong.validate()


@given(
    shape=st.tuples(*[st.sampled_from((1, 2, 4)), st.sampled_from(("HND", "NHD")), st.sampled_from((2, 4, 8))] * 2),
    head_bytes=st.sampled_from((1, 2, 3, 4, 8, 12, 16)),
    fusion=st.sampled_from(("none", "page", "item")),
    tokens=st.integers(1, 16),
    skew=st.integers(0, 9),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_torch_copies_what_numpy_copies(
    shape: tuple[int, str, int, int, str, int], head_bytes: int, fusion: str, tokens: int, skew: int, seed: int
) -> None:
    """On tensors of host memory: the same code, but for the pointers and the stream."""
    gather_torch = pytest.importorskip("kvbaton.runtime.gather_torch")
    rng = np.random.default_rng(seed)
    sizes = {"head_bytes": head_bytes, "fusion": fusion}
    _source_memory, source = real_layout(shape[0], 0, shape[1], shape[2], **sizes)
    target_memory, target = real_layout(shape[3], 0, shape[4], shape[5], **sizes)
    before = target_memory.copy()
    for part in pair_plan(source, target).parts:
        blocks = part.blocks(0, tokens)
        read = part.source_blocks(blocks, rng.permutation(PAGES), 0)
        written = part.target_blocks(blocks, rng.permutation(PAGES), 0)
        size, found = len(blocks) * part.block_bytes, []
        for gathers, scatters in ((gather, scatter), (gather_torch.gather, gather_torch.scatter)):
            target_memory[:] = before
            slot = np.full(skew + size + 8, 7, dtype=np.uint8)
            gathers(part.source_lanes, read, slot.ctypes.data + skew)
            scatters(part.target_lanes, written, slot.ctypes.data + skew)
            found.append((slot, target_memory.copy()))
        for numpys, torchs in zip(*found, strict=True):
            np.testing.assert_array_equal(torchs, numpys)


def test_without_staging_memory_on_both_sides_nothing_is_staged() -> None:
    _, source = real_layout(2, 0, "NHD", 4)
    _, target = real_layout(1, 0, "NHD", 4)
    assert stage(pair_plan(source, target), source, target) == (None,)


def test_the_cost_model_stages_small_pieces_only() -> None:
    pool = StagingPool(world_layout(1 << 40, 1, 0, slots=64), "auto")
    source, target = world_layout(1 << 40, 2, 0, slots=64), world_layout(2 << 40, 1, 0, slots=64)
    small = stage(pair_plan(source, target), source, target)[0]
    assert small is not None
    assert pool.lease(small, 4, Costs(staged_seconds=0.0))
    large = world_layout(1 << 40, 1, 0, slot_bytes=512)
    equal: PairPlan = pair_plan(large, large)
    assert not StagingPool(large, "auto").lease(stage(equal, large, large)[0], 1, Costs())


@pytest.mark.parametrize(("memory", "machines", "staged"), WAYS)
def test_between_gpus_of_one_machine_pages_are_gathered(memory: MemoryKind, machines: str, staged: bool) -> None:
    """Pages of 32 KiB, of which each would be a copy of its own."""
    world = World(Settings())
    ranks = []
    for side, machine in enumerate(machines):
        pool = kv_pool(range(1), pages=128, page_size=4, heads=4, head_bytes=2048, dtype="u1")
        base = (side + 1) << 40
        regions = Region(base, pool_bytes(pool), memory), Region(base + (1 << 30), 16 << 20, memory)
        layout = CacheLayout("m", regions, (pool,), Staging(1, 1 << 20, 16))
        ranks.append(world.add(f"r{side}", layout, machine=machine.strip()))
    source, target = ranks
    target.do(ReceiverOpened(1, (source.address,)))
    source.do(SenderOpened(1))
    target.do(GrantsPublished(1, (Grant("kv", 0, 512, tuple(range(128))),), token_count=512))
    world.run()
    (opened,) = [message for *_, message in world.trace if isinstance(message, Open)]
    assert bool(opened.staging) == staged


@pytest.mark.parametrize("staging", [Staging(2, 256, 8), Staging(1, 256, 9), Staging(1, 0, 8), Staging(1, 256, 0)])
def test_staging_that_leaves_its_region_is_refused(staging: Staging) -> None:
    good = world_layout(1 << 40, 1, 0)
    with pytest.raises(LayoutError, match="staging"):
        CacheLayout(good.model, good.regions, good.pools, staging).validate()


@pytest.mark.gpu
def test_memory_of_a_gpu_is_copied_as_memory_of_the_host_is() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    rng = np.random.default_rng(5)
    host, layout = real_layout(1, 0, "NHD", 4)
    _half, target = real_layout(2, 0, "NHD", 4)
    device = torch.from_numpy(host.copy()).to("cuda:0")
    there = msgspec.structs.replace(layout, regions=(Region(device.data_ptr(), len(host), "VRAM"),))
    pages = rng.permutation(PAGES)
    slots = []
    for source, where in ((layout, "cpu"), (there, "cuda:0")):
        part = pair_plan(source, target).parts[0]
        blocks = part.blocks(0, 16)
        slot = torch.zeros(len(blocks) * part.block_bytes, dtype=torch.uint8, device=where)
        gather(part.source_lanes, part.source_blocks(blocks, pages, 0), slot.data_ptr())
        scatter(part.source_lanes, part.source_blocks(blocks, pages[::-1].copy(), 0), slot.data_ptr())
        slots.append(slot.cpu())
    assert torch.equal(*slots)
    assert slots[0].any()
    np.testing.assert_array_equal(device.cpu().numpy(), host)


def test_a_device_that_is_not_there_is_an_error_of_the_transport() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    _host, layout = real_layout(1, 0, "NHD", 4)
    region = msgspec.structs.replace(layout.regions[0], memory="VRAM")
    part = pair_plan(msgspec.structs.replace(layout, regions=(region,)), layout).parts[0]
    blocks = part.source_blocks(part.blocks(0, 4), np.arange(PAGES), 0)
    with pytest.raises(TransportError, match="cuda:0 cannot copy between pages and staging"):
        gather(part.source_lanes, blocks, 1 << 40)

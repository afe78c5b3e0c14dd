"""Pools, allocators, the aux row: what is handed out, where it lies, what comes back."""

from __future__ import annotations

import ctypes
import math
import struct
import zlib
from dataclasses import replace

import pytest
import torch
from engine_kit import LoadedModels, make_pools
from hypothesis import given
from hypothesis import strategies as st

from kvbaton.errors import (
    CapacityError,
    ConfigError,
    InternalError,
    LayoutError,
    LocalProtocolError,
    RemoteProtocolError,
)
from kvbaton.layout import CacheLayout, Plane, Staging
from kvbaton.manager import Span
from kvbaton.plan.pair import pair_plan
from kvbaton.plan.staging import stage
from kvbaton.runtime.staging_memory import ALIGNMENT_BYTES, STAGING_BYTES, STAGING_SLOT_BYTES
from kvbaton.serving.engine import aux_row
from kvbaton.serving.engine.allocator import Allocator
from kvbaton.serving.engine.geometry import Geometry, Holds, PagedGeometry, PagedTensor
from kvbaton.serving.engine.memory import PoolConfig
from kvbaton.serving.engine.model import LoadedModel
from kvbaton.serving.engine.pool import Pools
from kvbaton.serving.engine.request import MAX_CHOICES, MAX_TOP_LOGPROBS
from kvbaton.serving.engine.shard import RankShard

TENSORS = tuple(PagedTensor(layer, name, 3, 4) for layer in range(2) for name in "kv")
GEOMETRY = Geometry(
    holds=(Holds("full"),) * 2,
    paged=(PagedGeometry(name="kv", kind="kv", tensors=TENSORS),),
    max_positions=64,
    vocab_size=10,
    dtype="float32",
)


def test_allocator_gives_all_or_nothing() -> None:
    pages = Allocator(5, "page")
    first = pages.allocate(3)
    assert first is not None
    assert pages.allocate(3) is None
    assert (pages.available, pages.used) == (2, 3)
    pages.free(first)
    assert (pages.available, pages.used) == (5, 0)
    assert sorted(pages.allocate(5) or ()) == [0, 1, 2, 3, 4]
    assert pages.allocate(0) == ()


def test_allocator_refuses_what_never_fits_and_what_is_not_out() -> None:
    pages = Allocator(4, "page")
    with pytest.raises(CapacityError, match="never fit"):
        pages.allocate(5)
    taken = pages.allocate(2) or ()
    for wrong in ((3,), (taken[0], taken[0]), (taken[0], 99), (-1,)):
        with pytest.raises(InternalError, match="not out"):
            pages.free(wrong)
        assert pages.used == 2
    pages.free(taken)
    with pytest.raises(InternalError):
        pages.free(taken)
    with pytest.raises(ConfigError):
        Allocator(0, "slot")


@given(st.lists(st.one_of(st.integers(0, 6), st.just(-1)), max_size=40))
def test_allocator_never_gives_a_unit_twice(script: list[int]) -> None:
    pages, held = Allocator(9, "page"), []
    for count in script:
        if count < 0 and held:
            pages.free(held.pop(0))
        elif count >= 0 and (taken := pages.allocate(count)) is not None:
            held.append(taken)
        out = [unit for units in held for unit in units]
        assert len(set(out)) == len(out) == pages.used == 9 - pages.available


@pytest.mark.parametrize("order", ["HND", "NHD"])
def test_layout_addresses_are_where_the_tensors_are(order: str, each_family: LoadedModel) -> None:
    pools = make_pools(each_family, pages=4, order=order, aux_slots=4, chunk_tokens=1)
    layout = pools.layout
    assert layout.model == each_family.fingerprint
    assert all(region.address % ALIGNMENT_BYTES == 0 for region in layout.regions)
    for memory in pools.paged.values():
        pool = layout.pool(memory.geometry.name)
        for value, plane in enumerate(pool.planes):
            tensor = memory.tensors[plane.layer, plane.name]
            tensor.copy_(torch.arange(tensor.numel(), dtype=torch.float32).view(tensor.shape) + value)
        for plane in pool.planes:
            tensor = memory.tensors[plane.layer, plane.name]
            for page, head, row in ((0, 0, 0), (3, plane.axis.width - 1, 5), (2, 0, 15)):
                inner = (head, row) if order == "HND" else (row, head)
                offset = plane.offset + page * plane.unit_stride + row * plane.row_stride + head * plane.item_stride
                assert floats(layout, plane, offset, tensor.shape[-1]) == tensor[page][inner].tolist()
    if pools.states is not None:
        for plane in layout.pool("state").planes:
            tensor = pools.states.tensors[plane.layer, plane.name]
            tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape))
            found = floats(layout, plane, plane.offset + 3 * plane.unit_stride, tensor[0].numel())
            assert found == tensor[3].flatten().tolist()
    pools.row(2)[:3] = b"abc"
    assert ctypes.string_at(layout.regions[-1].address + 2 * aux_row.ROW_BYTES, 3) == b"abc"


def floats(layout: CacheLayout, plane: Plane, offset: int, count: int) -> list[float]:
    return list((ctypes.c_float * count).from_address(layout.regions[plane.region].address + offset))


def test_a_holding_is_all_or_nothing(each_family: LoadedModel) -> None:
    pools = make_pools(each_family, pages=6, aux_slots=3, chunk_tokens=1)
    allocators = [a for a in (pools.pages, pools.rings, pools.state_slots) if a is not None]
    held = []
    while (block_table := pools.allocate(33)) is not None:
        held.append(block_table)
    assert 0 < len(held) <= 3
    used = [allocator.used for allocator in allocators]
    assert pools.allocate(33) is None
    assert [allocator.used for allocator in allocators] == used
    for block_table in held:
        pools.free(block_table)
    assert [allocator.used for allocator in allocators] == [0] * len(allocators)


def test_spans_of_a_window_follow_its_ring(loaded_models: LoadedModels) -> None:
    pools = make_pools(loaded_models["gpt_oss"], pages=20, chunk_tokens=16)
    block_table = pools.allocate(200)
    assert block_table is not None
    assert (len(block_table.pages), len(block_table.ring)) == (
        13,
        4,
    )  # 31 tokens of the window, 16 of a chunk, unaligned
    full, window = pools.spans(block_table, 16, 100)
    assert full == Span("kv", 16, 100, block_table.pages[1:7])
    assert window == Span("swa", 16, 100, tuple(block_table.ring[page % 4] for page in range(1, 7)))
    full, window = pools.wanted(block_table, 64, 100)
    assert full == Span("kv", 64, 100, block_table.pages[4:7])
    assert window == Span("swa", 64, 100, tuple(block_table.ring[page % 4] for page in range(4, 7)))
    assert pools.spans(block_table, 16, 16) == []


def test_an_aux_row_is_zeroed_when_it_is_given_out(model: LoadedModel) -> None:
    pools = make_pools(model, pages=3, aux_slots=1)
    slot = pools.take_slot()
    assert slot == 0
    pools.row(slot)[:] = b"x" * aux_row.ROW_BYTES
    assert pools.take_slot() is None
    pools.slots.free([slot])
    assert bytes(pools.row(pools.take_slot() or 0)) == bytes(aux_row.ROW_BYTES)


def test_a_pool_of_a_wrong_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match="page_size"):
        Pools(GEOMETRY, PoolConfig(page_size=0), model="m")
    with pytest.raises(ConfigError, match="HND or NHD"):
        Pools(GEOMETRY, PoolConfig(order="DHN"), model="m")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="3 layers"):
        RankShard(pp_size=4).layers(3)
    with pytest.raises(LayoutError, match="3 items do not divide over 2 ranks"):
        Pools(GEOMETRY, PoolConfig(), model="m", shard=RankShard(tp_size=2))


@pytest.mark.parametrize("order", ["HND", "NHD"])
def test_staging_memory_is_the_last_region_and_holds_any_block(order: str, each_family: LoadedModel) -> None:
    pools = make_pools(each_family, pages=4, order=order, aux_slots=4, chunk_tokens=1, staging_bytes=None)
    layout, staging = pools.layout, pools.layout.staging
    assert staging == Staging(
        len(layout.regions) - 1, STAGING_SLOT_BYTES["DRAM"], STAGING_BYTES["DRAM"] // STAGING_SLOT_BYTES["DRAM"]
    )
    assert layout.regions[-1].address % ALIGNMENT_BYTES == 0
    assert all(part is not None for part in stage(pair_plan(layout, layout), layout, layout))


def test_slots_are_as_large_as_the_largest_page_and_the_default_memory_holds_one(model: LoadedModel) -> None:
    pools = make_pools(model, pages=1, page_size=(1 << 15) + 16, staging_bytes=None)
    page = pools.layout.regions[0].length
    assert page > STAGING_BYTES["DRAM"]
    assert pools.layout.staging == Staging(len(pools.layout.regions) - 1, page, 1)


def test_staging_memory_without_a_slot_is_refused_with_the_size_to_set(model: LoadedModel) -> None:
    with pytest.raises(ConfigError, match=r"at least 4 MiB .*, or 0 for none"):
        make_pools(model, staging_bytes=1 << 20)
    with pytest.raises(ConfigError, match=r"at least 2 MiB .*, or 0 for none"):
        make_pools(model, staging_bytes=1 << 20, staging_slot_bytes=(1 << 20) + 1)
    pools = make_pools(model, staging_bytes=1 << 20, staging_slot_bytes=1 << 19)
    assert pools.layout.staging == Staging(len(pools.layout.regions) - 1, 1 << 19, 2)
    assert make_pools(model).layout.staging is None


PROMPT = (5, 6, 7)
ROW = aux_row.AuxRow(
    room=2**63 - 1,
    prompt_digest=aux_row.prompt_digest(PROMPT),
    prompt_tokens=3,
    firsts=((151_935, -0.25), (7, -1.5)),
    top=((151_935, -0.25), (1, -0.5), (0, -9999.0)),
    seed=2**64 - 1,
)


def test_aux_row_goes_there_and_back() -> None:
    data = aux_row.encode(ROW)
    assert len(data) == aux_row.ROW_BYTES
    assert data[:64].hex() == (
        "4b56424103000000ffffffffffffff7f"
        + ROW.prompt_digest.to_bytes(8, "little").hex()
        + "ffffffffffffffff0300000002000300"
        + "000000000000d0bf7f510200"
        + "000000000000f8bf07000000"
    )
    assert data[232:268].hex() == ("000000000000d0bf7f510200" + "000000000000e0bf01000000" + "000000008087c3c000000000")
    assert not any(data[64:232])
    assert not any(data[268:508])
    assert aux_row.decode(memoryview(data), room=ROW.room, prompt=PROMPT) == ROW


@pytest.mark.parametrize(
    ("room", "prompt", "says"),
    [(7, PROMPT, "belongs to room"), (ROW.room, (5, 6), "decode has 2"), (ROW.room, (5, 6, 8), "different prompts")],
)
def test_a_row_of_something_else_is_refused(room: int, prompt: tuple[int, ...], says: str) -> None:
    with pytest.raises(RemoteProtocolError, match=says):
        aux_row.decode(aux_row.encode(ROW), room=room, prompt=prompt)


def test_a_row_has_room_for_as_much_as_may_be_asked() -> None:
    most = tuple((2**32 - 1 - i, -i / 3) for i in range(MAX_TOP_LOGPROBS))
    full = replace(ROW, firsts=most[:MAX_CHOICES], top=most)
    assert aux_row.decode(aux_row.encode(full), room=ROW.room, prompt=PROMPT) == full
    least = replace(ROW, firsts=most[:1], top=())
    assert aux_row.decode(aux_row.encode(least), room=ROW.room, prompt=PROMPT) == least


@pytest.mark.parametrize("fields", [{"firsts": ()}, {"firsts": ((1, -1.0),) * 17}, {"top": ((1, -1.0),) * 21}])
def test_more_than_a_row_has_room_for_is_not_written(fields: dict) -> None:
    with pytest.raises(LocalProtocolError, match="has room for"):
        aux_row.encode(replace(ROW, **fields))


@pytest.mark.parametrize(
    ("at", "value", "says"),
    [
        (36, b"\x00\x00", "0 first tokens"),
        (36, b"\x11\x00", "17 first tokens"),
        (38, b"\xff\xff", "65535 alternatives"),
        (40, struct.pack("<d", math.nan), "nan for a logarithm"),
        (232, struct.pack("<d", -math.inf), "-inf for a logarithm"),
        (4, b"\x02\x00", "version 2, ours is 3"),
    ],
)
def test_a_whole_row_that_says_what_no_row_may_is_refused(at: int, value: bytes, says: str) -> None:
    data = bytearray(aux_row.encode(ROW))
    data[at : at + len(value)] = value
    data[508:] = struct.pack("<I", zlib.crc32(data[:508]))
    with pytest.raises(RemoteProtocolError, match=says):
        aux_row.decode(bytes(data), room=ROW.room, prompt=PROMPT)


@pytest.mark.parametrize("length", [0, 64, 511, 513])
def test_a_row_of_another_size_is_refused(length: int) -> None:
    with pytest.raises(RemoteProtocolError, match=f"has {length} bytes"):
        aux_row.decode(aux_row.encode(ROW).ljust(513, b"x")[:length], room=ROW.room, prompt=PROMPT)


@given(st.integers(0, aux_row.ROW_BYTES * 8 - 1))
def test_a_row_with_any_bit_changed_is_refused(bit: int) -> None:
    data = bytearray(aux_row.encode(ROW))
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(RemoteProtocolError):
        aux_row.decode(bytes(data), room=ROW.room, prompt=PROMPT)


def test_a_row_that_was_never_written_says_so() -> None:
    with pytest.raises(RemoteProtocolError, match="never written"):
        aux_row.decode(bytes(aux_row.ROW_BYTES), room=1, prompt=PROMPT)

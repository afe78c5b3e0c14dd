"""Pools, allocators, the aux row: what is handed out, where it lies, what comes back."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from engine_kit import make_pools
from hypothesis import given
from hypothesis import strategies as st

from kvbaton.engine import aux_row
from kvbaton.engine.model import Geometry, LoadedModel
from kvbaton.engine.pool import ALIGNMENT_BYTES, Allocator, KVMemory, PoolConfig
from kvbaton.errors import CapacityError, ConfigError, InternalError, RemoteProtocolError
from kvbaton.layout import pool_bytes

GEOMETRY = Geometry(layers=2, kv_heads=3, head_dim=4, max_positions=64, vocab_size=10, dtype="float32")


def test_allocator_gives_all_or_nothing() -> None:
    pages = Allocator(5, "page")
    first = pages.take(3)
    assert first is not None
    assert pages.take(3) is None
    assert (pages.free, pages.used) == (2, 3)
    pages.give_back(first)
    assert (pages.free, pages.used) == (5, 0)
    assert sorted(pages.take(5) or ()) == [0, 1, 2, 3, 4]
    assert pages.take(0) == ()


def test_allocator_refuses_what_never_fits_and_what_is_not_out() -> None:
    pages = Allocator(4, "page")
    with pytest.raises(CapacityError, match="never fit"):
        pages.take(5)
    taken = pages.take(2) or ()
    for wrong in ((3,), (taken[0], taken[0]), (taken[0], 99), (-1,)):
        with pytest.raises(InternalError, match="not out"):
            pages.give_back(wrong)
        assert pages.used == 2
    pages.give_back(taken)
    with pytest.raises(InternalError):
        pages.give_back(taken)
    with pytest.raises(ConfigError):
        Allocator(0, "slot")


@given(st.lists(st.one_of(st.integers(0, 6), st.just(-1)), max_size=40))
def test_allocator_never_gives_a_unit_twice(script: list[int]) -> None:
    pages, held = Allocator(9, "page"), []
    for count in script:
        if count < 0 and held:
            pages.give_back(held.pop(0))
        elif count >= 0 and (taken := pages.take(count)) is not None:
            held.append(taken)
        out = [unit for units in held for unit in units]
        assert len(set(out)) == len(out) == pages.used == 9 - pages.free


@pytest.mark.parametrize("order", ["HND", "NHD"])
def test_layout_addresses_are_where_the_tensor_is(order: str, model: LoadedModel) -> None:
    pools = make_pools(model, pages=4, order=order)
    layout, tensor = pools.layout, pools.kv.tensor
    assert layout.model == model.fingerprint
    pool = layout.pool("kv")
    assert pool_bytes(pool) == layout.regions[0].length == tensor.numel() * 4
    tensor.copy_(torch.arange(tensor.numel(), dtype=torch.float32).view(tensor.shape))
    for index, plane in enumerate(pool.planes):
        layer, kind = divmod(index, 2)
        for page, head, row in ((0, 0, 0), (3, 1, 5), (2, 0, 15)):
            offset = plane.offset + page * plane.unit_stride + row * plane.row_stride + head * plane.item_stride
            address = layout.regions[plane.region].address + offset
            found = (ctypes.c_float * 16).from_address(address)
            inner = (head, row) if order == "HND" else (row, head)
            assert list(found) == tensor[layer, kind, page][inner].tolist()
    pools.row(2)[:3] = b"abc"
    assert ctypes.string_at(layout.regions[1].address + 2 * aux_row.ROW_BYTES, 3) == b"abc"
    assert all(region.address % ALIGNMENT_BYTES == 0 for region in layout.regions)


def test_units_are_zeroed_when_they_are_given_out(model: LoadedModel) -> None:
    pools = make_pools(model, pages=3, aux_slots=1)
    pools.kv.tensor.fill_(math.nan)
    pages = pools.take_pages(17)
    assert pages is not None
    assert len(pages) == 2
    assert pools.kv.tensor.nan_to_num(1.0).sum() == pools.kv.tensor[:, :, 0].numel()
    slot = pools.take_slot()
    assert slot == 0
    pools.row(slot)[:] = b"x" * aux_row.ROW_BYTES
    assert pools.take_slot() is None
    pools.slots.give_back([slot])
    assert bytes(pools.row(pools.take_slot() or 0)) == bytes(aux_row.ROW_BYTES)


def test_a_pool_of_a_wrong_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match="page_size"):
        KVMemory(GEOMETRY, PoolConfig(page_size=0))
    with pytest.raises(ConfigError, match="HND or NHD"):
        KVMemory(GEOMETRY, PoolConfig(order="DHN"))  # type: ignore[arg-type]


PROMPT = (5, 6, 7)
ROW = aux_row.AuxRow(
    room=2**63 - 1,
    prompt_digest=aux_row.prompt_digest(PROMPT),
    prompt_tokens=3,
    first_token=151_935,
    logprob=-0.25,
    seed=2**64 - 1,
)


def test_aux_row_goes_there_and_back() -> None:
    data = aux_row.encode(ROW)
    assert len(data) == aux_row.ROW_BYTES
    assert data.hex() == (
        "4b564241010000"
        "00ffffffffffffff7f"
        + ROW.prompt_digest.to_bytes(8, "little").hex()
        + "ffffffffffffffff000000000000d0bf03000000"
        + "7f510200"
        + data[48:52].hex()
        + "00" * 12
    )
    assert aux_row.decode(memoryview(data), room=ROW.room, prompt=PROMPT) == ROW


@pytest.mark.parametrize(
    ("room", "prompt", "says"),
    [(7, PROMPT, "belongs to room"), (ROW.room, (5, 6), "decode has 2"), (ROW.room, (5, 6, 8), "different prompts")],
)
def test_a_row_of_something_else_is_refused(room: int, prompt: tuple[int, ...], says: str) -> None:
    with pytest.raises(RemoteProtocolError, match=says):
        aux_row.decode(aux_row.encode(ROW), room=room, prompt=prompt)


@given(st.integers(0, 52 * 8 - 1))
def test_a_row_with_any_bit_changed_is_refused(bit: int) -> None:
    data = bytearray(aux_row.encode(ROW))
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(RemoteProtocolError):
        aux_row.decode(bytes(data), room=ROW.room, prompt=PROMPT)


def test_a_row_that_was_never_written_says_so() -> None:
    with pytest.raises(RemoteProtocolError, match="never written"):
        aux_row.decode(bytes(aux_row.ROW_BYTES), room=1, prompt=PROMPT)

"""Coalescing, and what the memory transport refuses at the door."""

from __future__ import annotations

import itertools

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbaton.errors import DisconnectedError, TransportError
from kvbaton.layout import Region
from kvbaton.transports.address_space import coalesce
from kvbaton.transports.memory import MemoryTransport, _Metadata

pairs = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(1, 3)), min_size=1, max_size=40)


@given(pairs)
def test_coalesced_pieces_copy_the_same_bytes_in_the_same_order(pieces: list[tuple[int, int, int]]) -> None:
    def copied(rows: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
        return [(source + i, target + i) for source, target, length in rows for i in range(length)]

    source, target, length = np.array(pieces, dtype=np.int64).T
    merged = list(zip(*(column.tolist() for column in coalesce(source, target, length)), strict=True))
    assert copied(merged) == copied(pieces)
    for before, after in itertools.pairwise(merged):
        assert (before[0] + before[2], before[1] + before[2]) != (after[0], after[1])


def test_neighbours_on_one_side_only_stay_apart() -> None:
    merged = coalesce(np.array([0, 8, 16]), np.array([0, 8, 64]), np.array([8, 8, 8]))
    assert [column.tolist() for column in merged] == [[0, 16], [0, 64], [16, 8]]


@pytest.mark.parametrize("region", [Region(4096, 64, "VRAM"), Region(0, 64), Region(4096, 0), Region(1 << 62, 1 << 62)])
def test_regions_that_are_no_host_memory_are_refused(region: Region) -> None:
    with MemoryTransport("here") as transport, pytest.raises(TransportError):
        transport.register([region])


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"host": "another"}, TransportError),
        ({"pid": 1 << 40}, DisconnectedError),
        ({"pid": -1}, DisconnectedError),
        ({"pid": 1, "started": -7}, DisconnectedError),
        ({"nonce": b"another process"}, DisconnectedError),
    ],
)
def test_metadata_of_another_process_is_refused(changes: dict[str, object], error: type[TransportError]) -> None:
    with MemoryTransport("here") as here, MemoryTransport("there") as there:
        metadata = msgspec.msgpack.decode(there.metadata(), type=_Metadata)
        here.connect("there", msgspec.msgpack.encode(metadata))
        with pytest.raises(error) as caught:
            here.connect("there", msgspec.msgpack.encode(msgspec.structs.replace(metadata, **changes)))
        assert type(caught.value) is error

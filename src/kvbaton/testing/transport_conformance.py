"""What every transport must do: a suite of tests to subclass.

::

    class TestMine(TransportConformance):
        transport_name = "mine"          # what make_transport knows; or override make() and make_target_process()

Needs pytest and Hypothesis. Register the module with ``pytest.register_assert_rewrite`` to see values in failures.
"""
# ruff: noqa: S101 - assertions are what a test says

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvbaton.errors import DisconnectedError, TransportError
from kvbaton.layout import Region
from kvbaton.testing.target_process import TargetProcess, digest
from kvbaton.transports import make_transport
from kvbaton.transports.base import Handle, Table, TableId, Transport, WriteState

#: Longest time that anything in this suite may take.
DEADLINE_SECONDS = 10.0

Bytes = NDArray[np.uint8]


def table(address: int, *rows: tuple[int, int, int, int]) -> Table:
    """A table of rows (offset, length, stride, count) in a buffer at ``address``."""
    columns = [(address + offset, length, 0, stride, count) for offset, length, stride, count in rows]
    return Table(rows=np.array(columns, dtype=np.int64))


def indices(*entries: int) -> NDArray[np.int32]:
    """Entries of a table."""
    return np.array(entries, dtype=np.int32)


class PlaneRank:
    """A transport with one registered buffer."""

    def __init__(self, transport: Transport, size: int, fill: int | None = None) -> None:
        self.transport = transport
        pattern = np.random.default_rng(size).integers(1, 255, size, dtype=np.uint8)
        self.memory: Bytes = pattern if fill is None else np.full(size, fill, dtype=np.uint8)
        transport.register([Region(self.address, size)])

    @property
    def address(self) -> int:
        return int(self.memory.ctypes.data)

    def table(self, *rows: tuple[int, int, int, int]) -> Table:
        return table(self.address, *rows)


def settled(source: Transport, handle: Handle, *targets: Transport) -> WriteState:
    """Poll both sides until a write is settled."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while (state := source.poll(handle)) is WriteState.PENDING:
        assert time.monotonic() < deadline, "the write does not settle"
        for target in targets:
            target.progress()
    return state


def write(source: Transport, target: TableId, entries: Sequence[int], into: Sequence[int], *polled: Transport) -> None:
    """Write entries and wait until they are there."""
    handle = source.post(target, indices(*entries), indices(*into))
    assert settled(source, handle, *polled) is WriteState.DONE
    source.release(handle)


def open_files() -> int:
    """File descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


class TransportConformance:
    """The suite. Every test makes its own transports, so that one that breaks leaves the others alone."""

    transport_name: str = ""

    def make(self, instance: str) -> Transport:
        return make_transport(self.transport_name, instance)

    def make_target_process(self, instance: str, size: int) -> TargetProcess:
        return TargetProcess(self.transport_name, instance, size)

    @pytest.fixture
    def rank(self) -> Iterator[Callable[..., PlaneRank]]:
        """Makes ranks: ``rank(instance, size, fill=None)``; closes them afterwards."""
        with ExitStack() as stack:
            yield lambda instance, size, fill=None: PlaneRank(stack.enter_context(self.make(instance)), size, fill)

    def test_capabilities_name_the_transport(self, rank: Callable[..., PlaneRank]) -> None:
        assert rank("source", 64).transport.capabilities.name == self.transport_name

    def test_strided_shuffled_entries_land_where_they_belong(self, rank: Callable[..., PlaneRank]) -> None:
        source, target = rank("source", 64 * 1024), rank("target", 128 * 1024, 0)
        source.transport.connect("target", target.transport.metadata())
        blocks = source.table((0, 512, 1024, 32), (40_000, 512, 512, 8))
        pages = target.table((100, 512, 2048, 30), (70_000, 512, 600, 10))
        prepared = source.transport.prepare("target", blocks, pages)
        order = np.random.default_rng(7).permutation(40).astype(np.int32)
        expected = np.zeros_like(target.memory)
        for entry, into in enumerate(order):
            start = int(blocks.addresses(indices(entry))[0]) - source.address
            at = int(pages.addresses(indices(into))[0]) - target.address
            expected[at : at + 512] = source.memory[start : start + 512]
        write(source.transport, prepared, range(40), order.tolist(), target.transport)
        np.testing.assert_array_equal(target.memory, expected)

    def test_contiguous_entries_arrive_whole(self, rank: Callable[..., PlaneRank]) -> None:
        source, target = rank("source", 1 << 22), rank("target", 1 << 22, 0)
        source.transport.connect("target", target.transport.metadata())
        prepared = source.transport.prepare(
            "target", source.table((0, 1024, 1024, 4096)), target.table((0, 1024, 1024, 4096))
        )
        write(source.transport, prepared, range(4096), range(4096), target.transport)
        np.testing.assert_array_equal(target.memory, source.memory)

    def test_the_stride_of_a_single_block_means_nothing(self, rank: Callable[..., PlaneRank]) -> None:
        source, target = rank("source", 4096), rank("target", 4096, 0)
        source.transport.connect("target", target.transport.metadata())
        prepared = source.transport.prepare(
            "target", source.table((0, 64, 0, 1), (4032, 64, 1, 1)), target.table((4032, 64, 1 << 40, 1), (0, 64, 0, 1))
        )
        write(source.transport, prepared, [0, 1], [0, 1], target.transport)
        np.testing.assert_array_equal(target.memory[4032:], source.memory[:64])
        np.testing.assert_array_equal(target.memory[:64], source.memory[4032:])

    def test_random_entries_match_a_model(self, rank: Callable[..., PlaneRank]) -> None:
        source, target = rank("source", 64 * 96), rank("target", 64 * 160, 0)
        source.transport.connect("target", target.transport.metadata())
        prepared = source.transport.prepare("target", source.table((0, 64, 64, 96)), target.table((0, 64, 64, 160)))
        permutation = st.permutations(range(160))

        @settings(max_examples=25, deadline=None)
        @given(st.lists(st.integers(0, 95), min_size=1, max_size=96), permutation)
        def check(entries: list[int], into: list[int]) -> None:
            target.memory[:] = 0
            expected = np.zeros((160, 64), dtype=np.uint8)
            expected[into[: len(entries)]] = source.memory.reshape(96, 64)[entries]
            write(source.transport, prepared, entries, into[: len(entries)], target.transport)
            np.testing.assert_array_equal(target.memory.reshape(160, 64), expected)

        check()

    def test_several_writes_in_flight(self, rank: Callable[..., PlaneRank]) -> None:
        source, target = rank("source", 1 << 20), rank("target", 1 << 20, 0)
        source.transport.connect("target", target.transport.metadata())
        prepared = source.transport.prepare(
            "target", source.table((0, 4096, 4096, 256)), target.table((0, 4096, 4096, 256))
        )
        handles = [source.transport.post(prepared, indices(entry), indices(entry)) for entry in range(256)]
        assert len(set(handles)) == 256
        assert {settled(source.transport, handle, target.transport) for handle in handles} == {WriteState.DONE}
        np.testing.assert_array_equal(target.memory, source.memory)

    def test_memory_that_is_not_registered_is_refused(self, rank: Callable[..., PlaneRank]) -> None:
        source, target = rank("source", 4096), rank("target", 4096)
        source.transport.connect("target", target.transport.metadata())
        stranger = np.zeros(4096, dtype=np.uint8)
        inside = (0, 1024, 1024, 4)
        for bad in ((0, 1024, 1024, 5), (3073, 1024, 1024, 1), (0, 4097, 0, 1), (0, 512, 1025, 5)):
            with pytest.raises(TransportError):
                source.transport.prepare("target", source.table(bad), target.table(inside))
            with pytest.raises(TransportError):
                source.transport.prepare("target", source.table(inside), target.table(bad))
        with pytest.raises(TransportError):
            source.transport.prepare("target", table(stranger.ctypes.data, inside), target.table(inside))

    @pytest.mark.parametrize(
        "rows",
        [
            np.zeros((0, 5), dtype=np.int64),
            np.zeros((1, 3), dtype=np.int64),
            np.array([[4096, 0, 0, 0, 1]]),
            np.array([[4096, 64, 0, 32, 2]]),
            np.array([[4096, 64, 0, 64, 0]]),
            np.array([[4096, 64, 0, 1 << 62, 1 << 30]]),
            np.array([[-64, 64, 0, 64, 1]]),
        ],
    )
    def test_rows_that_are_no_table_are_refused(self, rank: Callable[..., PlaneRank], rows: NDArray[np.int64]) -> None:
        source = rank("source", 4096)
        source.transport.connect("target", rank("target", 4096).transport.metadata())
        with pytest.raises(TransportError):
            source.transport.prepare("target", Table(rows=rows), Table(rows=rows))

    def test_entries_that_are_no_write_are_refused(self, rank: Callable[..., PlaneRank]) -> None:
        source, target = rank("source", 4096), rank("target", 4096, 0)
        source.transport.connect("target", target.transport.metadata())
        prepared = source.transport.prepare(
            "target", source.table((0, 512, 512, 4), (2048, 64, 64, 1)), target.table((0, 512, 512, 8))
        )
        bad: list[tuple[Any, Any]] = [
            (indices(), indices()),
            (indices(0, 1), indices(0)),
            (indices(5), indices(0)),
            (indices(0), indices(8)),
            (indices(-1), indices(0)),
            (indices(4), indices(0)),  # 64 bytes into 512
            (np.array([0]), np.array([0])),  # int64
        ]
        for entries, into in bad:
            with pytest.raises(TransportError):
                source.transport.post(prepared, entries, into)
        assert not target.memory.any()
        write(source.transport, prepared, [0], [0], target.transport)

    def test_unknown_names(self, rank: Callable[..., PlaneRank]) -> None:
        source = rank("source", 4096)
        with pytest.raises(TransportError):
            source.transport.prepare("nobody", source.table((0, 64, 64, 1)), source.table((0, 64, 64, 1)))
        with pytest.raises(TransportError):
            source.transport.post(TableId(99), indices(0), indices(0))
        assert source.transport.poll(Handle(99)) is WriteState.BROKEN
        assert source.transport.evidence("nobody") == ""
        source.transport.release(Handle(99))
        source.transport.fence("nobody")
        source.transport.progress()

    @pytest.mark.parametrize("metadata", [b"", b"\x00", b"nonsense" * 9])
    def test_metadata_that_is_not_usable_is_refused(self, rank: Callable[..., PlaneRank], metadata: bytes) -> None:
        source, target = rank("source", 4096), rank("target", 4096)
        with pytest.raises(TransportError):
            source.transport.connect("target", metadata)
        with pytest.raises(TransportError):
            source.transport.connect("target", target.transport.metadata()[:-5])
        source.transport.connect("target", target.transport.metadata())

    def test_connecting_again_reaches_the_new_process(self, rank: Callable[..., PlaneRank]) -> None:
        source, old, new = rank("source", 4096), rank("target", 4096, 0), rank("target", 4096, 0)
        source.transport.connect("target", old.transport.metadata())
        first = source.transport.prepare("target", source.table((0, 512, 512, 8)), old.table((0, 512, 512, 8)))
        write(source.transport, first, [0], [0], old.transport)
        old.transport.close()
        source.transport.connect("target", new.transport.metadata())
        with pytest.raises(TransportError):
            source.transport.post(first, indices(1), indices(1))
        second = source.transport.prepare("target", source.table((0, 512, 512, 8)), new.table((0, 512, 512, 8)))
        write(source.transport, second, range(8), range(8), new.transport)
        np.testing.assert_array_equal(new.memory, source.memory)
        assert not old.memory[512:].any()

    def test_memory_may_go_and_come_back(self, rank: Callable[..., PlaneRank]) -> None:
        source, target = rank("source", 4096), rank("target", 4096, 0)
        blocks, there = source.table((0, 512, 512, 8)), target.table((0, 512, 512, 8))
        source.transport.connect("target", target.transport.metadata())
        prepared = source.transport.prepare("target", blocks, there)
        write(source.transport, prepared, [0], [0], target.transport)
        try:
            source.transport.deregister()
        except TransportError as error:
            pytest.skip(str(error))
        for refused in (
            lambda: source.transport.post(prepared, indices(1), indices(1)),
            lambda: source.transport.prepare("target", blocks, there),
        ):
            with pytest.raises(TransportError):
                refused()
        source.transport.progress()
        source.transport.register([Region(source.address, 4096)])
        write(source.transport, prepared, [1], [1], target.transport)
        target.transport.deregister()
        target.transport.progress()
        target.transport.register([Region(target.address, 4096)])
        source.transport.connect("target", target.transport.metadata())
        write(source.transport, source.transport.prepare("target", blocks, there), [2], [2], target.transport)
        np.testing.assert_array_equal(target.memory[:1536], source.memory[:1536])

    def test_a_fenced_peer_can_be_connected_again(self, rank: Callable[..., PlaneRank]) -> None:
        source, target, other = rank("source", 4096), rank("target", 4096, 0), rank("other", 4096, 0)
        blocks, metadata = source.table((0, 512, 512, 8)), target.transport.metadata()
        source.transport.connect("other", other.transport.metadata())
        spared = source.transport.prepare("other", blocks, other.table((0, 512, 512, 8)))
        for into in range(3):
            source.transport.connect("target", metadata)
            prepared = source.transport.prepare("target", blocks, target.table((0, 512, 512, 8)))
            write(source.transport, prepared, [into], [into], target.transport)
            pending = source.transport.post(prepared, indices(into), indices(into))
            source.transport.fence("target")
            source.transport.fence("target")
            assert source.transport.poll(pending) is WriteState.BROKEN
            source.transport.release(pending)
            assert source.transport.evidence("target") == ""
            with pytest.raises(TransportError):
                source.transport.post(prepared, indices(7), indices(7))
            write(source.transport, spared, [into], [into], other.transport)
        np.testing.assert_array_equal(target.memory[:1536], source.memory[:1536])
        np.testing.assert_array_equal(other.memory[:1536], source.memory[:1536])
        assert not target.memory[1536:].any()

    def test_a_fence_with_pending_writes_spares_other_peers(self, rank: Callable[..., PlaneRank]) -> None:
        source, target, other = rank("source", 4096), rank("target", 4096, 0), rank("other", 4096, 0)
        blocks = source.table((0, 512, 512, 8))
        prepared = {}
        for name, peer in (("target", target), ("other", other)):
            source.transport.connect(name, peer.transport.metadata())
            prepared[name] = source.transport.prepare(name, blocks, peer.table((0, 512, 512, 8)))
        source.transport.post(prepared["target"], indices(0), indices(0))  # pending where the target must help
        source.transport.fence("target")
        write(source.transport, prepared["other"], range(8), range(8), other.transport)
        np.testing.assert_array_equal(other.memory, source.memory)

    def test_loopback(self, rank: Callable[..., PlaneRank]) -> None:
        here = rank("here", 4096)
        here.transport.connect("here", here.transport.metadata())
        prepared = here.transport.prepare("here", here.table((0, 512, 512, 4)), here.table((2048, 512, 512, 4)))
        write(here.transport, prepared, range(4), range(4), here.transport)
        np.testing.assert_array_equal(here.memory[2048:], here.memory[:2048])

    def test_release_and_close_are_idempotent(self, rank: Callable[..., PlaneRank]) -> None:
        source, target = rank("source", 4096), rank("target", 4096, 0)
        source.transport.connect("target", target.transport.metadata())
        prepared = source.transport.prepare("target", source.table((0, 64, 64, 8)), target.table((0, 64, 64, 8)))
        handle = source.transport.post(prepared, indices(1), indices(1))
        assert settled(source.transport, handle, target.transport) is WriteState.DONE
        for _ in range(2):
            source.transport.release(handle)
            source.transport.close()
        assert source.transport.poll(handle) is WriteState.BROKEN
        for call in (
            lambda: source.transport.post(prepared, indices(1), indices(1)),
            lambda: source.transport.prepare("target", source.table((0, 64, 64, 8)), target.table((0, 64, 64, 8))),
            lambda: source.transport.connect("target", b""),
            lambda: source.transport.register([Region(source.address, 64)]),
            source.transport.metadata,
        ):
            with pytest.raises(TransportError):
                call()

    def test_a_peer_that_closed_is_never_a_crash(self, rank: Callable[..., PlaneRank]) -> None:
        source, target = rank("source", 4096), rank("target", 4096, 0)
        source.transport.connect("target", target.transport.metadata())
        prepared = source.transport.prepare("target", source.table((0, 64, 64, 8)), target.table((0, 64, 64, 8)))
        write(source.transport, prepared, [0], [0], target.transport)
        target.transport.close()
        try:
            handle = source.transport.post(prepared, indices(1), indices(1))
        except TransportError:
            return  # the best answer
        settled(source.transport, handle)  # its memory is still mapped, so this may also succeed

    def test_nothing_leaks(self, rank: Callable[..., PlaneRank]) -> None:
        def use() -> None:
            with self.make("source") as source, self.make("target") as target:
                memory = np.zeros(4096, dtype=np.uint8)
                for transport in (source, target):
                    transport.register([Region(memory.ctypes.data, 4096)])
                source.connect("target", target.metadata())
                prepared = source.prepare(
                    "target", table(memory.ctypes.data, (0, 64, 64, 8)), table(memory.ctypes.data, (2048, 64, 64, 8))
                )
                write(source, prepared, [0], [0], target)

        rank("warm-up", 64)  # what a library opens once for the whole process is no leak
        use()
        files, threads = open_files(), threading.active_count()
        use()
        assert (open_files(), threading.active_count()) == (files, threads)

    def test_writes_into_another_process(self, rank: Callable[..., PlaneRank]) -> None:
        source = rank("source", 1 << 20)
        with self.make_target_process("target", 1 << 20) as target:
            source.transport.connect("target", target.metadata)
            assert source.transport.evidence("target") == ""
            prepared = source.transport.prepare(
                "target", source.table((0, 512, 512, 2048)), table(target.address, (0, 512, 512, 2048))
            )
            order = np.random.default_rng(3).permutation(2048)
            write(source.transport, prepared, range(2048), order.tolist())
            expected = np.zeros((2048, 512), dtype=np.uint8)
            expected[order] = source.memory.reshape(2048, 512)
            assert target.ask("digest") == digest(expected.reshape(-1))
            assert source.transport.evidence("target")

    def test_a_killed_process_is_disconnected(self, rank: Callable[..., PlaneRank]) -> None:
        source = rank("source", 4096)
        with self.make_target_process("target", 4096) as target:
            source.transport.connect("target", target.metadata)
            rows = source.table((0, 512, 512, 8)), table(target.address, (0, 512, 512, 8))
            prepared = source.transport.prepare("target", *rows)
            write(source.transport, prepared, [0], [0])
            target.kill()
            self._post_until_disconnected(source.transport, prepared)
        source.transport.fence("target")
        with self.make_target_process("target", 4096) as target:
            source.transport.connect("target", target.metadata)
            rows = source.table((0, 512, 512, 8)), table(target.address, (0, 512, 512, 8))
            write(source.transport, source.transport.prepare("target", *rows), range(8), range(8))
            assert target.ask("digest") == digest(source.memory)

    def test_a_process_killed_before_the_first_write_is_disconnected(self, rank: Callable[..., PlaneRank]) -> None:
        source = rank("source", 4096)
        with self.make_target_process("target", 4096) as target:
            source.transport.connect("target", target.metadata)
            rows = source.table((0, 512, 512, 8)), table(target.address, (0, 512, 512, 8))
            prepared = source.transport.prepare("target", *rows)
            target.kill()
            self._post_until_disconnected(source.transport, prepared)

    @staticmethod
    def _post_until_disconnected(source: Transport, prepared: TableId) -> None:
        """One post may still be accepted; it must break, and then the next says so."""
        try:
            handle = source.post(prepared, indices(1), indices(1))
        except DisconnectedError:
            return
        assert settled(source, handle) is WriteState.BROKEN
        with pytest.raises(DisconnectedError):
            source.post(prepared, indices(1), indices(1))

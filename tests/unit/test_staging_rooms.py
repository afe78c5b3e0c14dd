"""Rooms that compete for a few staging slots, between real managers over memory and over real NIXL."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from kvbaton.control.memory import Network
from kvbaton.layout import CacheLayout, Coordinates, Region, Staging, kv_pool, pool_bytes
from kvbaton.manager import ALWAYS_READY, KVManager, KVPoll, KVReceiver, KVSender, Span, new_instance
from kvbaton.protocol.settings import Settings
from kvbaton.serving.server.local_replica import handoffs_of
from kvbaton.serving.server.rank import ServerRank
from kvbaton.serving.server.replica import gauges_of
from kvbaton.transports import make_transport

LAYERS, PAGES, PAGE, HEADS, HEAD_BYTES = 2, 64, 16, 4, 32
SOURCES = 4
#: Of one room, in two chunks: a part is three blocks of 2 KiB, which one slot holds.
TOKENS, CUT = 40, 16
ROOM_PAGES = 3
SLOT_BYTES = 8192
#: What no room may leave behind.
BUSY = ("sides", "rooms", "transfers", "writes", "writes_in_flight", "fenced_chunks", "staging_slots_taken")
BUSY = (*BUSY, "staging_slots_busy")


class Rank:
    """A manager over a pool with tokens outermost and a ring of ``slots`` staging slots."""

    def __init__(self, network: Network, transport: str, tp: int, rank: int, slots: int, seed: int | None) -> None:
        shape = {"pages": PAGES, "page_size": PAGE, "heads": HEADS, "head_bytes": HEAD_BYTES, "dtype": "u1"}
        pool = kv_pool(range(LAYERS), order="NHD", tp_size=tp, tp_rank=rank, **shape)  # type: ignore[arg-type]
        self.kv = np.zeros(pool_bytes(pool), np.uint8)
        if seed is not None:
            self.kv[:] = np.random.default_rng(seed).integers(1, 256, len(self.kv), dtype=np.uint8)
        self._ring = np.zeros(slots * SLOT_BYTES, np.uint8)
        regions = tuple(Region(memory.ctypes.data, len(memory)) for memory in (self.kv, self._ring))
        instance = new_instance()
        self.manager = KVManager(
            CacheLayout("m", regions, (pool,), Staging(1, SLOT_BYTES, slots)),
            make_transport(transport, instance),
            network.listen(),
            instance=instance,
            group="prefill" if tp > 1 else "decode",
            group_size=tp,
            coordinates=Coordinates(tp=rank),
            settings=Settings(staging="always"),
        )
        self.manager.start()

    def tokens(self, pages: NDArray[np.int64]) -> NDArray[np.uint8]:
        """``[layers, K and V, tokens, heads here, bytes]`` of a room in these pages."""
        whole = self.kv.reshape(LAYERS, 2, PAGES, PAGE, -1, HEAD_BYTES)[:, :, pages]
        return whole.reshape(LAYERS, 2, len(pages) * PAGE, -1, HEAD_BYTES)[:, :, :TOKENS]

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        for _ in range(300):
            self.manager.wakeup.clear()
            if condition():
                return
            self.manager.wakeup.wait(0.1)
        raise AssertionError(f"never: {what}; {self.manager.counters()}")


class Room:
    """Pages of its own on both sides, so that every room's bytes are its own."""

    def __init__(self, ring: Ring, number: int) -> None:
        pages = np.arange(number * ROOM_PAGES, (number + 1) * ROOM_PAGES, dtype=np.int64)
        self._ring = ring
        self.number = number
        self.source_pages, self.target_pages = pages[::-1].copy(), (pages + 7) % PAGES
        self.senders: list[KVSender] = [rank.manager.sender(number) for rank in ring.sources]
        addresses = [rank.manager.address for rank in ring.sources]
        self.receiver: KVReceiver = ring.target.manager.receiver(number, addresses)
        self.receiver.publish([Span("kv", 0, TOKENS, tuple(self.target_pages.tolist()))], token_count=TOKENS)

    def submit(self, fence: Callable[[], bool] = ALWAYS_READY) -> None:
        units = self.source_pages.tolist()
        for sender in self.senders:
            sender.submit([Span("kv", 0, CUT, tuple(units[:1]))], last=False, ready=fence)
            sender.submit([Span("kv", CUT, TOKENS, tuple(units[1:]))], last=True, ready=fence)

    def expect_success(self) -> None:
        ring = self._ring
        for rank, side in ((ring.target, self.receiver), *zip(ring.sources, self.senders, strict=True)):
            rank.wait_until(lambda side=side: side.released, f"the end of {side}")  # type: ignore[misc]
            assert side.poll() is KVPoll.Success, (side, side.error)
        wanted = np.concatenate([rank.tokens(self.source_pages) for rank in ring.sources], axis=3)
        np.testing.assert_array_equal(ring.target.tokens(self.target_pages), wanted)


class Ring:
    """TP 4 to 1, in this process."""

    def __init__(self, transport: str, *, source_slots: int, target_slots: int) -> None:
        network = Network()
        self.sources = [Rank(network, transport, SOURCES, i, source_slots, seed=i) for i in range(SOURCES)]
        self.target = Rank(network, transport, 1, 0, target_slots, seed=None)

    def close(self) -> None:
        for rank in (*self.sources, self.target):
            rank.manager.close()

    def posted(self) -> tuple[int, int]:
        """Writes posted by all sources: staged ones, and all."""
        counters = [rank.manager.counters() for rank in self.sources]
        return sum(c.get("writes_staged", 0) for c in counters), sum(c.get("writes_posted", 0) for c in counters)

    def expect_nothing_held(self) -> None:
        for rank in (*self.sources, self.target):
            manager, staging = rank.manager, rank.manager.layout.staging
            assert staging is not None
            sizes = manager.sizes()
            assert {name: sizes[name] for name in BUSY} == dict.fromkeys(BUSY, 0)
            assert manager.staging_slots_free == staging.slots


@pytest.fixture
def make_ring(transport: str) -> Iterator[Callable[..., Ring]]:
    made: list[Ring] = []

    def make(**slots: int) -> Ring:
        made.append(Ring(transport, **slots))
        return made[-1]

    yield make
    for ring in made:
        ring.close()


@pytest.mark.parametrize(("source_slots", "target_slots"), [(1, 1), (1, 2), (2, 2), (1, 16)])
def test_sglang_31217_staging_deferred_under_a_full_ring_while_other_rooms_go_on(
    make_ring: Callable[..., Ring], source_slots: int, target_slots: int
) -> None:
    """There the ring wedged: what found no place waited for a watermark that never came. Here a part that finds no slot
    at the target goes directly, and one that finds none at its source waits for a write of its own side to settle."""
    ring = make_ring(source_slots=source_slots, target_slots=target_slots)
    rooms = [Room(ring, number) for number in range(12)]
    for room in rooms:
        room.submit()
    for room in rooms:
        room.expect_success()
    staged, posted = ring.posted()
    assert staged > 0
    if target_slots < SOURCES:
        assert staged < posted, "what found no slot went directly"
    ring.expect_nothing_held()


def test_a_room_whose_fence_opens_late_holds_its_slots_and_nobody_else(make_ring: Callable[..., Ring]) -> None:
    ring = make_ring(source_slots=1, target_slots=2)
    ready = [False]
    late = Room(ring, 0)
    for rank, sender in zip(ring.sources, late.senders, strict=True):
        rank.wait_until(lambda sender=sender: sender.poll() is KVPoll.WaitingForInput, "all have met")  # type: ignore[misc]
    late.submit(lambda: ready[0])
    assert ring.target.manager.staging_slots_free == 0
    told = {gauge.name: gauge.value for gauge in gauges_of(handoffs_of(ring.target.manager, ServerRank(), "auto"))}
    assert (told["kvbaton_staging_slots"], told["kvbaton_staging_slots_used"]) == (2, 2)
    for number in range(1, 9):
        room = Room(ring, number)
        room.submit()
        room.expect_success()
    assert ring.posted()[0] == 0, "every slot is held by the room that waits for its fence"
    assert ring.target.manager.staging_slots_free == 0
    assert late.receiver.poll() not in (KVPoll.Success, KVPoll.Failed)
    ready[0] = True
    late.expect_success()
    staged, _ = ring.posted()
    assert staged == 4, "two parts in two chunks"
    again = Room(ring, 9)
    again.submit()
    again.expect_success()
    assert ring.posted()[0] == staged + 4
    ring.expect_nothing_held()


def test_a_staged_room_that_is_given_up_gives_its_slots_back(make_ring: Callable[..., Ring]) -> None:
    ring = make_ring(source_slots=1, target_slots=2)
    room = Room(ring, 0)
    room.submit(lambda: False)
    rank = ring.sources[0]
    rank.wait_until(lambda: room.senders[0].poll() is not KVPoll.Bootstrapping, "both sides have met")
    room.receiver.abort("not wanted any more")
    for one, side in ((ring.target, room.receiver), *zip(ring.sources, room.senders, strict=True)):
        one.wait_until(lambda side=side: side.released, f"the end of {side}")  # type: ignore[misc]
        assert side.poll() is KVPoll.Failed
    ring.expect_nothing_held()


def test_what_arrived_but_cannot_be_copied_is_never_served(
    make_ring: Callable[..., Ring], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A device that fails in the last step, after every byte has come: the room fails, others do not wait for it."""

    def fails(*_: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    ring = make_ring(source_slots=2, target_slots=16)
    with monkeypatch.context() as patch:
        patch.setattr("kvbaton.runtime.staging.scatter", fails)
        room = Room(ring, 1)
        room.submit()
        ring.target.wait_until(lambda: room.receiver.released, "the end")
        assert room.receiver.poll() is KVPoll.Failed
        assert "illegal memory access" in str(room.receiver.error)
    assert "illegal memory access" in caplog.text
    following = Room(ring, 2)
    following.submit()
    following.expect_success()
    ring.expect_nothing_held()

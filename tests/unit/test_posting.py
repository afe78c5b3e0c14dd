"""The posting queue: fair between peers, bounded for each, and nobody waits for a peer whose window is full."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbaton.errors import ConfigError
from kvbaton.protocol.effects import PostWrite, StagedRun
from kvbaton.protocol.events import WriteId
from kvbaton.runtime.posting import PostingQueue, Window, _Peer

#: The queue only asks whether there is one.
STAGED = cast(StagedRun, object())


def write(number: int, peer: str = "a", size: int = 10, entries: int = 1, *, staged: bool = False) -> PostWrite:
    table = np.zeros(entries, dtype=np.int32)
    return PostWrite(WriteId(number), peer, 0, table, table, size, STAGED if staged else None)


def take_all(queue: PostingQueue) -> list[int]:
    taken = []
    while (taking := queue.take()) is not None:
        taken.append(int(taking.write))
    return taken


def test_writes_of_a_peer_keep_their_order() -> None:
    queue = PostingQueue(Window())
    for number in (3, 1, 2):
        queue.offer(write(number))
    assert queue.waiting == 3
    assert take_all(queue) == [3, 1, 2]
    assert queue.waiting == 0
    assert queue.take() is None


def test_small_writes_go_along_with_the_first() -> None:
    queue = PostingQueue(Window())
    for number in range(6):
        queue.offer(write(number, "a", entries=1 + number % 2))
    queue.offer(write(10, "b"))
    first = queue.take()
    assert first is not None
    along = queue.take_along(first, lambda other: len(other.source_entries) == 1, Window(bytes=20))
    assert [one.write for one in (first, *along)] == [0, 2]
    assert take_all(queue) == [10, 1, 3, 4, 5]
    for number in (0, 2, 1, 3, 4, 5, 10):
        queue.settled(write(number, "b" if number == 10 else "a", entries=1 + number % 2))
    assert len(queue) == 0


def test_what_goes_along_fits_the_window() -> None:
    queue = PostingQueue(Window(bytes=25))
    for number in range(4):
        queue.offer(write(number, "a"))
    first = queue.take()
    assert first is not None
    assert [one.write for one in queue.take_along(first, lambda _: True, Window())] == [1]
    assert queue.take() is None
    queue.settled(first)
    assert take_all(queue) == [2]


def test_peers_take_turns() -> None:
    queue = PostingQueue(Window())
    for number in range(3):
        queue.offer(write(number, "a"))
    for number in range(10, 13):
        queue.offer(write(number, "b"))
    queue.offer(write(20, "c"))
    assert take_all(queue) == [0, 10, 20, 1, 11, 2, 12]


def test_a_full_window_stops_one_peer_and_no_other() -> None:
    queue = PostingQueue(Window(bytes=25))
    for number in range(4):
        queue.offer(write(number, "a"))
    queue.offer(write(10, "b"))
    assert take_all(queue) == [0, 10, 1]
    assert not queue.ready
    queue.settled(write(0, "a"))
    assert queue.ready
    assert take_all(queue) == [2]


def test_entries_bound_the_window_as_well_as_bytes() -> None:
    queue = PostingQueue(Window(entries=5))
    for number in range(3):
        queue.offer(write(number, entries=2))
    assert take_all(queue) == [0, 1]


def test_a_write_larger_than_the_window_goes_alone() -> None:
    queue = PostingQueue(Window(bytes=5))
    queue.offer(write(1, size=100))
    queue.offer(write(2, size=1))
    assert take_all(queue) == [1]
    queue.settled(write(1, size=100))
    assert take_all(queue) == [2]


def test_only_what_waits_is_cancelled() -> None:
    queue = PostingQueue(Window(bytes=15))
    for number in range(4):
        queue.offer(write(number))
    assert take_all(queue) == [0]
    assert queue.cancel(WriteId(n) for n in (0, 2, 3, 99)) == [2, 3]
    queue.settled(write(0))
    assert take_all(queue) == [1]


def test_a_peer_that_was_fenced_is_forgotten_and_late_reports_change_nothing() -> None:
    queue = PostingQueue(Window(bytes=15))
    for number in range(3):
        queue.offer(write(number))
    assert take_all(queue) == [0]
    queue.drop_peer("a")
    queue.drop_peer("nobody")
    assert len(queue) == 0
    queue.settled(write(0))
    queue.offer(write(7))
    queue.settled(write(0))
    assert take_all(queue) == [7]


def test_nothing_is_kept_of_peers_that_are_idle() -> None:
    queue = PostingQueue(Window())
    queue.offer(write(1, "a"))
    queue.offer(write(2, "b"))
    queue.offer(write(3, "c"))
    assert len(queue) == 3
    queue.cancel([WriteId(2)])
    assert take_all(queue) == [1, 3]
    queue.settled(write(1, "a"))
    queue.settled(write(1, "a"))
    assert len(queue) == 1
    queue.settled(write(3, "c"))
    assert len(queue) == 0


def test_what_needs_a_slot_waits_without_holding_up_others() -> None:
    free = False
    queue = PostingQueue(Window(), lambda: free)
    queue.offer(write(1, "a", staged=True))
    queue.offer(write(2, "b"))
    assert take_all(queue) == [2]
    assert not queue.ready
    free = True
    assert take_all(queue) == [1]


def test_what_needs_a_slot_is_overtaken_by_what_else_goes_to_its_peer() -> None:
    """A slot may be held by a write to another peer that hangs; what needs none must not wait for that."""
    free = False
    queue = PostingQueue(Window(bytes=25), lambda: free)
    queue.offer(write(1, staged=True))
    for number in (2, 3, 4):
        queue.offer(write(number))
    assert take_all(queue) == [2, 3]
    queue.settled(write(2))
    free = True
    assert queue.ready
    assert take_all(queue) == [1]
    queue.settled(write(3))
    assert take_all(queue) == [4]


@pytest.mark.parametrize("count", [10, 4_000])
def test_a_turn_costs_the_same_however_many_writes_wait(count: int) -> None:
    asked = 0

    def slot_free() -> bool:
        nonlocal asked
        asked += 1
        return False

    queue = PostingQueue(Window(), slot_free)
    for number in range(count):
        queue.offer(write(number, staged=True))
    assert not queue.ready
    assert queue.take() is None
    assert asked == 2


@pytest.mark.parametrize("staged", [False, True], ids=["full windows", "no slot"])
def test_a_turn_costs_the_same_however_many_peers_wait(monkeypatch: pytest.MonkeyPatch, staged: bool) -> None:
    peers, turns, looks = 1_000, 50, 0
    oldest = _Peer.oldest

    def counted(self: _Peer, *, slot_free: bool) -> PostWrite | None:
        nonlocal looks
        looks += 1
        return oldest(self, slot_free=slot_free)

    monkeypatch.setattr(_Peer, "oldest", counted)
    queue = PostingQueue(Window(bytes=10), lambda: not staged)
    for number in range(2 * peers):
        queue.offer(write(number, str(number % peers), staged=staged))
    taken = take_all(queue)
    assert taken == ([] if staged else list(range(peers)))
    assert not queue.ready
    looks = 0
    for _ in range(turns):
        queue.offer(write(10_000, "one more"))
        assert queue.ready
        assert take_all(queue) == [10_000]
        queue.settled(write(10_000, "one more"))
    assert looks == 2 * turns


def test_a_free_slot_goes_to_whoever_has_waited_for_one_for_longest() -> None:
    slots = 0
    queue = PostingQueue(Window(), lambda: slots > 0)
    for number, peer in enumerate("abc"):
        queue.offer(write(number, peer, staged=True))
    assert queue.take() is None
    queue.offer(write(3, "d"))
    queue.offer(write(4, "b"))
    order = []
    for slots in (1, 0, 1, 0, 1):  # noqa: B007 - the queue asks
        taken = queue.take()
        order.append(None if taken is None else int(taken.write))
    assert order == [0, 3, 2, 4, 1]


class Naive:
    """The rule, written down without any thought of cost."""

    def __init__(self, window: Window) -> None:
        self.window, self.waiting, self.flying = window, list[PostWrite](), list[PostWrite]()

    def may_be_taken(self, slot_free: bool) -> set[int]:
        found = set()
        for peer in {one.peer for one in self.waiting}:
            flying = [one for one in self.flying if one.peer == peer]
            oldest = next((w for w in self.waiting if w.peer == peer and (w.staged is None or slot_free)), None)
            if oldest is None:
                continue
            size = oldest.bytes + sum(one.bytes for one in flying)
            entries = len(oldest.source_entries) + sum(len(one.source_entries) for one in flying)
            if not flying or (size <= self.window.bytes and entries <= self.window.entries):
                found.add(int(oldest.write))
        return found


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("offer"), st.sampled_from("abc"), st.integers(1, 12), st.integers(1, 3), st.booleans()),
        st.tuples(st.just("take"), st.booleans()),
        st.tuples(st.just("settle"), st.integers(0, 9)),
        st.tuples(st.just("cancel"), st.integers(0, 9)),
        st.tuples(st.just("drop"), st.sampled_from("abc")),
    ),
    max_size=60,
)


@given(STEPS)
def test_the_queue_takes_what_the_rule_allows(steps: list[tuple[Any, ...]]) -> None:
    window, free = Window(bytes=20, entries=5), False
    queue, naive = PostingQueue(window, lambda: free), Naive(window)
    for number, (what, *details) in enumerate(steps):
        if what == "offer":
            peer, size, entries, staged = details
            offered = write(number, peer, size, entries, staged=staged)
            queue.offer(offered)
            naive.waiting.append(offered)
        elif what == "take":
            (free,) = details
            allowed = naive.may_be_taken(free)
            assert queue.ready == bool(allowed)
            taken = queue.take()
            assert (taken is not None) == bool(allowed)
            if taken is not None:
                assert int(taken.write) in allowed
                naive.waiting.remove(taken)
                naive.flying.append(taken)
        elif what == "settle" and naive.flying:
            queue.settled(naive.flying.pop(details[0] % len(naive.flying)))
        elif what == "cancel" and naive.waiting:
            gone = naive.waiting.pop(details[0] % len(naive.waiting))
            assert queue.cancel([gone.write]) == [gone.write]
        elif what == "drop":
            queue.drop_peer(details[0])
            naive.waiting = [one for one in naive.waiting if one.peer != details[0]]
            naive.flying = [one for one in naive.flying if one.peer != details[0]]
        assert queue.waiting == len(naive.waiting)
        assert len(queue) == len({one.peer for one in (*naive.waiting, *naive.flying)})


@pytest.mark.parametrize("window", [{"bytes": 0}, {"entries": 0}, {"bytes": -1}])
def test_a_window_of_nothing_is_refused(window: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="a posting window must be positive"):
        Window(**window)

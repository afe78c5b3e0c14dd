"""The posting queue: fair between peers, bounded for each, and nobody waits for a peer whose window is full."""

from __future__ import annotations

import numpy as np
import pytest

from kvbaton.errors import ConfigError
from kvbaton.protocol.effects import PostWrite
from kvbaton.protocol.events import WriteId
from kvbaton.runtime.posting import PostingQueue, Window


def write(number: int, peer: str = "a", size: int = 10, entries: int = 1) -> PostWrite:
    table = np.zeros(entries, dtype=np.int32)
    return PostWrite(WriteId(number), peer, 0, table, table, size)


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


def test_what_may_not_be_posted_yet_waits_without_holding_up_others() -> None:
    free = False
    queue = PostingQueue(Window(), lambda offered: free or offered.peer != "a")
    queue.offer(write(1, "a"))
    queue.offer(write(2, "b"))
    assert take_all(queue) == [2]
    assert not queue.ready
    free = True
    assert take_all(queue) == [1]


def test_what_may_not_be_posted_yet_is_overtaken_by_what_else_goes_to_its_peer() -> None:
    """A slot may be held by a write to another peer that hangs; what needs none must not wait for that."""
    free = False
    queue = PostingQueue(Window(bytes=25), lambda offered: free or offered.write != 1)
    for number in (1, 2, 3, 4):
        queue.offer(write(number))
    assert take_all(queue) == [2, 3]
    queue.settled(write(2))
    free = True
    assert queue.ready
    assert take_all(queue) == [1]
    queue.settled(write(3))
    assert take_all(queue) == [4]


@pytest.mark.parametrize("window", [{"bytes": 0}, {"entries": 0}, {"bytes": -1}])
def test_a_window_of_nothing_is_refused(window: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="a posting window must be positive"):
        Window(**window)

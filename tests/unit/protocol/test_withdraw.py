"""A source that is preempted: it takes its units back, what has settled stays, the rest is sent again."""

from __future__ import annotations

import pytest

from kvbaton.protocol.effects import KVPoll
from kvbaton.protocol.events import ChunksWithdrawn
from kvbaton.protocol.messages import Done
from kvbaton.testing.rank import Rank

from .scene import SHAPES, Scene, dropping, fill, holding


def withdraw(scene: Scene) -> None:
    for rank in scene.sources:
        rank.do(ChunksWithdrawn(scene.room, rank.status("source", scene.room).seen + 1))


def preempt(scene: Scene) -> None:
    """Withdraw; the units are somebody else's for a while, and then all is computed again."""
    withdraw(scene)
    for rank in scene.sources:
        rank.release_writes()
        assert not rank.status("source", scene.room).leased
        scribble(rank)
    scene.world.run()
    for rank in scene.sources:
        fill(rank)
        rank.hold_writes = False


def scribble(rank: Rank) -> None:
    for memory in rank.memory.values():
        memory[:] = 0


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("submitted", [1, 3], ids=["in the middle", "after the last chunk"])
def test_what_is_withdrawn_is_sent_again(name: str, submitted: int) -> None:
    scene = Scene(holding(SHAPES[name]))
    scene.start()
    for number in range(min(submitted, len(scene.shape.chunks))):
        scene.submit(number)
    preempt(scene)
    scene.submit_all()
    scene.expect_success()


def test_what_has_settled_is_not_sent_twice() -> None:
    scene = Scene(SHAPES["1→1"])
    scene.start()
    scene.submit(0)
    scene.world.run()
    first = scene.status("source")
    assert (first.poll, first.leased) == (KVPoll.Transferring, False), "between two chunks nothing is read"
    preempt(scene)
    assert scene.status("source").bytes == first.bytes
    scene.submit(0)
    scene.world.run()
    assert scene.status("source").bytes == first.bytes
    scene.submit(1)
    scene.world.run()
    scene.expect_success()


def test_a_chunk_may_end_elsewhere_the_second_time() -> None:
    scene = Scene(holding(SHAPES["pages"]))
    scene.start()
    scene.submit(0)
    scene.submit(1)
    preempt(scene)
    object.__setattr__(scene.shape, "chunks", (16, 22))
    scene.submit_all()
    scene.expect_success()


def test_a_target_that_opens_late_is_not_given_what_was_withdrawn() -> None:
    scene = Scene(SHAPES["1→1"])
    scene.open_senders()
    scene.submit(0)
    assert scene.status("source").leased, "a target may still open the room"
    withdraw(scene)
    assert not scene.status("source").leased
    scribble(scene.source)
    scene.open_receivers()
    scene.publish()
    scene.world.run()
    assert scene.status("source").bytes == 0
    fill(scene.source)
    scene.submit_all()
    scene.expect_success()


def test_a_room_that_has_arrived_wants_nothing_again() -> None:
    scene = Scene(SHAPES["1→2"])
    scene.start()
    scene.world.network = dropping(Done)
    scene.submit(0)
    scene.submit(1)
    scene.world.run()
    sent = scene.status("source").bytes
    preempt(scene)
    scene.world.network = lambda _from, _to, _message: 1
    scene.submit(0)
    scene.submit(1)
    scene.world.run()
    assert scene.status("source").bytes == sent
    scene.world.run(until=scene.world.now + 20.0)
    scene.expect_success()


def test_a_room_that_fails_while_it_is_withdrawn_ends() -> None:
    scene = Scene(holding(SHAPES["1→1"]))
    scene.start()
    scene.submit(0)
    withdraw(scene)
    scene.abort("target")
    scene.world.run()
    assert scene.status("source").leased == bool(scene.source.held)
    scene.source.release_writes()
    scene.world.run()
    withdraw(scene)
    scene.expect_failed()

"""Rooms before they are open: who has agreed, who gives up, who is declined, and who is told of it."""

from __future__ import annotations

import pytest

from kvbaton.errors import AbortedError, DeclinedError
from kvbaton.protocol.effects import KVPoll, PeerLost
from kvbaton.protocol.events import AbortRequested, GrantsPublished, ReceiverOpened, SenderOpened
from kvbaton.protocol.messages import Abort, Done
from kvbaton.testing.rank import Rank
from unit.protocol.scene import QUICK, SHAPES, Scene, add_group, dropping

SOME = pytest.mark.parametrize("shape", ["1→1", "2→1", "1→2"])


def decline(scene: Scene, rank: Rank) -> None:
    rank.do(ReceiverOpened(scene.room, scene.addresses))
    rank.do(AbortRequested(scene.room, "target", DeclinedError("all of it is cached")))


@SOME
def test_a_target_agrees_with_its_sources_before_it_publishes_anything(shape: str) -> None:
    """An engine may wait with its pages until it is known that they are not wanted in vain."""
    scene = Scene(SHAPES[shape])
    scene.open_receivers()
    assert not any(rank.status("target", scene.room).agreed for rank in scene.targets)
    scene.world.run()
    for rank in scene.targets:
        status = rank.status("target", scene.room)
        assert (status.agreed, status.poll, status.leased) == (True, KVPoll.Bootstrapping, False)
    scene.open_senders()
    scene.publish()
    scene.world.run()
    scene.submit_all()
    scene.expect_success()


def test_a_target_does_not_agree_with_half_a_group() -> None:
    scene = Scene(SHAPES["2→1"])
    scene.target.do(ReceiverOpened(scene.room, scene.addresses[:1]))
    scene.world.run()
    status = scene.status("target")
    assert (status.agreed, status.poll) == (False, KVPoll.Failed)
    assert "give the address of every rank" in str(status.error)
    scene.expect_over()


@SOME
def test_a_source_is_told_at_once_of_a_room_that_is_given_up_before_it_is_open(shape: str) -> None:
    """It waited for an Open that could not come, for as long as both sides may take to meet, with all its pages."""
    scene = Scene(SHAPES[shape])
    scene.open_senders()
    scene.submit(0)
    scene.open_receivers()
    scene.world.run()
    scene.abort("target", "the client has gone")
    scene.world.run()
    scene.expect_failed()
    for rank in scene.sources:
        error = rank.status("source", scene.room).error
        assert isinstance(error, AbortedError)
        assert error.message == "the client has gone"
    assert scene.world.now < 1.0


def test_one_rank_of_a_group_that_gives_up_ends_the_room_for_the_ranks_that_have_opened_it() -> None:
    scene = Scene(SHAPES["1→2"])
    scene.open_senders()
    scene.open_receivers()
    first, second = scene.targets
    first.do(GrantsPublished(scene.room, scene.grants(first), scene.shape.tokens))
    scene.world.run()
    second.do(AbortRequested(scene.room, "target", AbortedError("no pages")))
    scene.world.run()
    scene.expect_failed()
    assert scene.world.now < 1.0


def test_what_is_said_of_an_unopened_room_is_repeated_until_it_is_answered() -> None:
    scene = Scene()
    scene.open_senders()
    scene.open_receivers()
    scene.world.run()
    scene.world.network = dropping(Abort)
    scene.abort("target")
    scene.world.run(until=scene.world.now + 1.0)
    assert scene.status("source").poll is KVPoll.Bootstrapping
    scene.world.network = lambda _from, _to, _message: 1
    scene.world.run(until=scene.world.now + 5.0)
    scene.expect_failed()


def test_a_target_that_nobody_answers_lets_go_of_what_it_has_not_opened() -> None:
    scene = Scene()
    scene.open_receivers()
    scene.world.run()
    scene.world.network = dropping(Abort)
    scene.abort("target")
    assert not scene.status("target").leased
    scene.world.run(until=scene.world.now + QUICK.announce_seconds + 1.0)
    scene.expect_over()


@SOME
def test_a_sender_that_comes_after_a_room_was_given_up_unopened_learns_it_once(shape: str) -> None:
    scene = Scene(SHAPES[shape])
    scene.open_receivers()
    scene.world.run()
    scene.abort("target", "the client has gone")
    scene.world.run()
    scene.open_senders()
    scene.expect_failed()
    scene.open_senders()  # the number is another request's now
    assert all(rank.status("source", scene.room).poll is KVPoll.Bootstrapping for rank in scene.sources)
    scene.open_receivers()
    scene.publish()
    scene.world.run()
    scene.submit_all()
    scene.expect_success()


@SOME
@pytest.mark.parametrize("first", ["source", "target"])
def test_a_declined_room_ends_at_once_whatever_its_prompt_is(shape: str, first: str) -> None:
    scene = Scene(SHAPES[shape])
    if first == "source":
        scene.open_senders()
        scene.submit_all()
    for rank in scene.targets:
        decline(scene, rank)
    scene.world.run()
    if first == "target":
        scene.open_senders()
    scene.expect_failed()
    for rank in scene.ranks:
        status = rank.status("source" if rank in scene.sources else "target", scene.room)
        assert isinstance(status.error, DeclinedError), status
        assert status.error.message == "all of it is cached"
    assert scene.world.now < 1.0


def test_a_decline_that_reaches_nobody_ends_by_itself() -> None:
    scene = Scene()
    scene.world.network = lambda _from, _to, _message: 0
    decline(scene, scene.target)
    assert scene.status("target").poll is KVPoll.Failed
    scene.world.run(until=QUICK.announce_seconds)
    scene.expect_over()


def test_a_source_that_answers_late_is_told_late() -> None:
    scene = Scene()
    scene.open_senders()
    scene.world.network = lambda _from, _to, _message: 0
    scene.open_receivers()
    scene.world.run(until=1.0)
    scene.abort("target")
    scene.world.network = lambda _from, _to, _message: 1
    scene.world.run(until=8.0)
    scene.expect_failed()


def test_a_room_that_the_source_must_have_is_refused_at_once_where_it_has_ended() -> None:
    """A copy of the same request, or one of a source that was restarted meanwhile, waited for ever, as it seemed."""
    scene = Scene()
    scene.start()
    scene.submit_all()
    scene.expect_success()
    scene.target.do(ReceiverOpened(scene.room, scene.addresses, begun=True))
    scene.publish()
    scene.world.run()
    status = scene.status("target")
    assert status.poll is KVPoll.Failed
    assert "has no such room (any more)" in str(status.error)
    assert status.error.room == 7
    assert scene.world.now < 1.0
    scene.expect_over()


def test_a_rank_that_comes_late_to_a_room_that_was_refused_for_that_does_not_wait() -> None:
    """One rank of prefill had answered, another one had not come to the room: its pages waited for a decode that had
    given up, for as long as both sides may take to meet."""
    scene = Scene(SHAPES["2→1"])
    first, late = scene.sources
    first.do(SenderOpened(scene.room))
    scene.target.do(ReceiverOpened(scene.room, scene.addresses, begun=True))
    scene.publish()
    scene.world.run(until=1.0)
    assert scene.status("target").poll is KVPoll.Failed
    late.do(SenderOpened(scene.room))
    assert late.status("source", scene.room).poll is KVPoll.Failed
    scene.world.run(until=2.0)
    assert first.status("source", scene.room).poll is KVPoll.Failed


def test_a_room_that_the_source_has_may_be_asked_for_as_begun() -> None:
    scene = Scene()
    scene.open_senders()
    scene.submit_all()
    scene.target.do(ReceiverOpened(scene.room, scene.addresses, begun=True))
    scene.publish()
    scene.world.run()
    scene.expect_success()


def test_a_source_waits_for_its_targets_from_its_last_chunk_on() -> None:
    """A prompt that takes long to compute, or waits for its turn, has eaten what decode was to have."""
    scene = Scene()
    scene.open_senders()
    scene.world.run(until=QUICK.bootstrap_timeout - 1.0)
    scene.submit_all()
    scene.world.run(until=2 * QUICK.bootstrap_timeout - 2.0)
    assert scene.status("source").poll is KVPoll.Bootstrapping
    scene.open_receivers()
    scene.publish()
    scene.world.run()
    scene.expect_success()


def test_units_are_free_with_the_last_settled_write_and_nobody_reads_them_again() -> None:
    scene = Scene(SHAPES["1→1"])
    scene.start()
    scene.submit(0)
    assert scene.status("source").leased
    scene.world.network = dropping(Done)
    scene.submit(1)
    scene.world.run()
    status = scene.status("source")
    assert (status.poll, status.leased, status.seen) == (KVPoll.Transferring, False, 2)
    other = add_group(scene.world, scene.shape, side="target", name="e")[0]
    other.do(ReceiverOpened(scene.room, scene.addresses))
    other.do(GrantsPublished(scene.room, scene.grants(other), scene.shape.tokens))
    scene.world.run()
    assert other.status("target", scene.room).poll is KVPoll.Failed


def test_an_engine_is_told_which_peer_is_lost() -> None:
    scene = Scene()
    scene.start()
    scene.world.network = lambda _from, _to, _message: 0
    scene.world.run(until=30.0)
    (lost,) = [effect for effect in scene.target.lost if effect.address == scene.source.address]
    assert isinstance(lost, PeerLost)
    assert (lost.instance, lost.error.code) == (scene.source.core.instance, "peer_lost")

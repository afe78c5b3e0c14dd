"""Bugs that were found, each by a test that failed when it was written."""

from __future__ import annotations

import msgspec
import pytest

from kvbaton.layout import Axis, CacheLayout, Plane, Pool, Region, kv_pool, pool_bytes
from kvbaton.protocol.effects import KVPoll, Report
from kvbaton.protocol.events import GrantsPublished, MessageArrived, ReceiverOpened, SenderOpened
from kvbaton.protocol.messages import Abort, Close, Done, Drained, Grant, Hello, Open, Pong
from kvbaton.protocol.settings import Settings
from kvbaton.testing.world import World
from unit.protocol.scene import (
    ENDED,
    PAIR,
    QUICK,
    SHAPES,
    Scene,
    Shape,
    add_group,
    dropping,
    holding,
)


def test_a_sender_that_comes_after_the_open_learns_that_input_is_wanted() -> None:
    """The status of a room without a sender is noted as reported, so the sender never hears WaitingForInput."""
    scene = Scene()
    scene.open_receivers()
    scene.publish()
    scene.world.run()
    scene.open_senders()
    assert scene.status("source").poll is KVPoll.WaitingForInput, scene.explain()
    scene.drive(1.0)
    scene.expect_success()


def test_a_sender_that_comes_while_its_failed_room_is_still_announced_fails_too() -> None:
    """The room fails before its sender comes, and its record is kept until the target has acknowledged."""
    scene = Scene()
    scene.open_receivers()
    scene.publish()
    scene.world.run()
    scene.world.network = dropping(Close, Abort)
    scene.world.run(until=QUICK.waiting_timeout + 0.5)  # no chunk was submitted: the source gives up and says so
    scene.open_senders()
    scene.world.run(until=scene.world.now + 120.0)
    assert scene.status("source").poll is KVPoll.Failed, scene.explain()


def test_a_room_that_is_sent_again_while_its_failure_is_announced_ends() -> None:
    """Failed and not leased: the facade lets the engine reuse the room, but the core still has its old record."""
    scene = Scene()
    scene.start()
    scene.world.network = dropping(Close)
    scene.abort("source")
    scene.world.run()
    assert scene.status("source").poll is KVPoll.Failed
    assert not scene.status("source").leased
    scene.source.do(SenderOpened(scene.room))
    scene.world.run(until=scene.world.now + 300.0)
    assert scene.status("source").poll in ENDED, scene.explain()


def test_a_room_that_is_received_again_while_a_bystander_drains_keeps_the_tables_whole() -> None:
    """Failed and not leased: the facade lets the engine reuse the room; the bystander's transfer loses its home."""
    scene = Scene(SHAPES["bystander"])
    scene.start()
    scene.world.network = lambda sender, _to, message: 0 if isinstance(message, Drained) and sender.name == "p1" else 1
    scene.abort("target")
    scene.world.run()
    assert scene.status("target").poll is KVPoll.Failed
    assert not scene.status("target").leased
    scene.target.do(ReceiverOpened(scene.room, scene.addresses))  # checks the invariants
    scene.publish()
    scene.world.run(until=scene.world.now + 120.0)
    assert scene.status("target").poll in ENDED, scene.explain()


def test_success_absorbs_the_later_loss_of_a_bystander() -> None:
    """Success → Failed: the world raises where a terminal state changes."""
    scene = Scene(SHAPES["bystander"])
    scene.start()
    bystander = "p1"
    scene.world.network = lambda sender, _to, message: (
        0 if isinstance(message, Done) and sender.name == bystander else 1
    )
    scene.submit_all()
    assert scene.status("target").poll is KVPoll.Success, scene.explain()
    scene.world.kill(scene.world.ranks[bystander])
    scene.world.run(until=scene.world.now + 60.0)
    assert scene.status("target").poll is KVPoll.Success, scene.explain()


def test_fencing_a_peer_for_one_room_does_not_turn_another_one_into_a_success() -> None:
    """A WAITING transfer that was fenced went to FAILING without an error, and its room ended as Success."""
    scene = Scene(holding(PAIR))
    scene.start()
    scene.submit_all()
    other = scene.room + 1
    scene.open_senders(other)
    scene.open_receivers(other)
    scene.publish(other)
    scene.world.run()
    assert scene.status("source", other).poll is KVPoll.WaitingForInput
    scene.source.break_writes(landed=False)
    scene.world.run()
    scene.source.hold_writes = False
    if scene.status("source", other).poll is KVPoll.WaitingForInput:
        for number in range(len(scene.shape.chunks)):
            scene.submit(number, other)
    scene.world.run(until=scene.world.now + 120.0)
    ends = scene.status("source", other), scene.status("target", other)
    assert ends[0].poll is ends[1].poll, scene.explain(other)
    for end in ends:
        assert end.error is None or end.error.code != "internal", scene.explain(other)


def test_a_room_of_a_refused_peer_names_itself_in_its_error() -> None:
    """One error object is shared by the session and every room that fails with it; the first room's id sticks."""
    world = World(QUICK)
    add_group(world, PAIR, side="source", dtype="f2")
    target = add_group(world, PAIR, side="target")[0]
    for room in (1, 2):
        target.do(ReceiverOpened(room, ("world://p0",)))
        world.run()
    assert [target.status("target", room).error.room for room in (1, 2)] == [1, 2]  # type: ignore[union-attr]


def test_rooms_that_lose_the_same_peer_name_themselves_in_their_errors() -> None:
    scene = Scene()
    scene.start()
    other = scene.room + 1
    scene.open_senders(other)
    scene.open_receivers(other)
    scene.publish(other)
    scene.world.run()
    scene.world.kill(scene.source)
    assert [scene.status("target", room).error.room for room in (scene.room, other)] == [scene.room, other]  # type: ignore[union-attr]


def test_a_full_prefix_hit_tells_the_source_its_prefix() -> None:
    """The kv grant is left out of Open when it moves no bytes, so the source never learns that nothing is needed."""
    scene = Scene(SHAPES["hit"])
    scene.start()
    assert scene.status("source").prefix_len == scene.shape.tokens, scene.explain()


def test_a_target_that_opens_after_the_source_gave_up_fails_at_once() -> None:
    """The source's engine aborts before the target opens: the target then waits out its whole deadline."""
    scene = Scene()
    scene.open_senders()
    scene.abort("source")
    assert scene.status("source").poll is KVPoll.Failed
    scene.open_receivers()
    scene.publish()
    scene.world.run(until=5.0)
    assert scene.status("target").poll is KVPoll.Failed, scene.explain()
    assert scene.status("target").error.code == "aborted"  # type: ignore[union-attr]


def test_a_sender_learns_of_the_abort_whose_open_was_lost() -> None:
    """Abort overtakes Open (or Open is lost): the source answers Drained, and lets its own engine wait."""
    scene = Scene()
    scene.world.network = dropping(Open)
    scene.start()
    scene.abort("target")
    scene.world.run(until=5.0)
    assert scene.status("target").poll is KVPoll.Failed
    assert not scene.status("target").leased
    assert scene.status("source").poll is KVPoll.Failed, scene.explain()


def test_no_deadline_beats_a_message_that_is_already_here() -> None:
    """Deadlines are judged after each event, not after the inbox: a stalled rank loses peers that have spoken."""
    scene = Scene(Shape(source_tp=2))
    scene.start()
    scene.world.network = lambda _from, _to, _message: 0  # what arrives is handed over below
    at = scene.world.now + 2 * QUICK.silence_seconds
    for source in scene.sources:  # the inbox after a stall, read in one go
        pong = Pong(sender=source.core.instance, receiver=scene.target.core.instance)
        scene.world.perform(
            scene.target,
            scene.target.core.handle(MessageArrived(scene.target.link_to(source), msgspec.msgpack.encode(pong)), at),
        )
    assert [state for _, _, state in scene.target.core.sessions()] == ["ready", "ready"]


def test_a_peer_whose_first_greeting_went_unanswered_is_greeted_again() -> None:
    """LOST without ever having heard of the peer: nothing is sent any more, every later room fails at once."""
    scene = Scene()
    scene.world.network = lambda _from, _to, _message: 0
    scene.start()
    scene.world.run(until=QUICK.handshake_timeout + 1.0)
    assert scene.status("target").poll is KVPoll.Failed
    scene.world.network = lambda _from, _to, _message: 1
    scene.world.run(until=scene.world.now + 60.0)
    scene.open_senders(8)
    scene.open_receivers(8)
    scene.publish(8)
    scene.world.run()
    assert scene.status("target", 8).poll is KVPoll.WaitingForInput, scene.explain(8)


def test_refused_peers_that_are_gone_do_not_fill_the_table_of_sessions() -> None:
    """A REFUSED session at the source has no deadline: dead peers hold their places for ever."""
    world = World(Settings(sessions=2))
    source = add_group(world, PAIR, side="source")[0]
    for name in ("x", "y"):
        stranger = add_group(world, PAIR, side="target", name=name, dtype="f2")[0]
        stranger.do(ReceiverOpened(1, (source.address,)))
        world.run()
        world.kill(stranger)
    world.run(until=86_400.0)
    good = add_group(world, PAIR, side="target", name="good")[0]
    good.do(ReceiverOpened(2, (source.address,)))
    world.run(until=world.now + 1.0)
    assert [state for _, _, state in good.core.sessions()] == ["ready"]


def test_a_layout_with_strides_beyond_64_bits_is_refused_not_raised() -> None:
    """Strides of a dimension of one are not bounded by the region; numpy overflows inside handle()."""
    scene = Scene()
    scene.open_receivers()
    scene.world.network = dropping(Hello)
    scene.world.run()
    ours = scene.source.layout
    plane = ours.pools[0].planes[0]
    hostile = Plane(
        plane.layer, plane.name, 0, 0, 1 << 63, 1 << 63, 1 << 63, plane.item_bytes, Axis(plane.axis.items, 4, 0)
    )
    pool = Pool("kv", "kv", 1, 1, True, "u1", (hostile,))
    layout = CacheLayout("m", (Region(0, 1 << 20),), (pool,))
    hello = msgspec.structs.replace(scene.target.core.identity.hello(), layout=layout)
    scene.world.inject(scene.target, scene.source, hello)
    assert [state for _, _, state in scene.source.core.sessions()] == ["refused"]


@pytest.mark.parametrize("pages", [(1 << 20) + 1, 3 << 20])
def test_a_prompt_with_more_pages_than_a_message_carries_fails_its_room(pages: int) -> None:
    """Up to 8 MiB the peer drops the Open as malformed until the deadline; beyond, handle() raises."""
    world = World(QUICK)
    ranks = []
    for name, base in (("p", 1 << 40), ("d", 2 << 40)):
        pool = kv_pool(
            (0,), pages=pages, page_size=1, heads=1, head_bytes=1, dtype="u1", tensors=("latent",), name="kv"
        )
        ranks.append(world.add(name, CacheLayout("m", (Region(base, pool_bytes(pool)),), (pool,))))
    source, target = ranks
    target.do(ReceiverOpened(1, (source.address,)))
    world.run()
    world.network = lambda _from, _to, _message: 0
    effects = target.core.handle(GrantsPublished(1, (Grant("kv", 0, pages, tuple(range(pages))),), pages), world.now)
    reports = [effect for effect in effects if isinstance(effect, Report)]
    assert [report.status.poll for report in reports] == [KVPoll.Failed]

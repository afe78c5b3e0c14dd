"""The core as a whole: bounds, forgetting, unknown rooms, garbage, deadlines, stories, shutdown."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence

import msgspec
import pytest

from kvbaton.errors import AbortedError, DisconnectedError, InternalError, PeerLostError
from kvbaton.layout import CacheLayout
from kvbaton.plan.pair import check_coverage
from kvbaton.protocol import rooms, target_rooms
from kvbaton.protocol.context import REPEATS_PER_SECOND
from kvbaton.protocol.core import Core
from kvbaton.protocol.effects import Dial, KVPoll, Report, RoomStatus
from kvbaton.protocol.events import (
    AbortRequested,
    ChunkSubmitted,
    DialFailed,
    GrantsPublished,
    MessageArrived,
    PeerFenced,
    ReceiverOpened,
    SenderOpened,
    ShutdownRequested,
    TimePassed,
    WriteId,
    WriteSettled,
)
from kvbaton.protocol.messages import (
    Abort,
    AnyMessage,
    Close,
    Done,
    Drained,
    Failed,
    Forgotten,
    Grant,
    Open,
    Opened,
    PartBytes,
    Query,
    TransferKey,
    encode,
)
from kvbaton.protocol.settings import Settings
from kvbaton.protocol.transfer import State
from kvbaton.testing.rank import Rank
from kvbaton.testing.world import World
from unit.protocol.scene import PAIR, QUICK, SHAPES, Scene, add_group, dropping, holding


def first_open(scene: Scene) -> Open:
    return next(m for *_, m in scene.world.trace if isinstance(m, Open))


def said(scene: Scene, since: int, kind: type) -> list[AnyMessage]:
    return [m for *_, m in scene.world.trace[since:] if isinstance(m, kind)]


# ---- what an Open may not say ---------------------------------------------------------------------------------------


def refused(scene: Scene, message: Open) -> Failed:
    """Inject an Open; returns how it was refused."""
    since = len(scene.world.trace)
    rooms = scene.source.core.live_rooms
    scene.world.inject(scene.target, scene.source, message)
    answers = said(scene, since, Failed)
    assert len(answers) == 1, scene.explain()
    assert scene.source.core.live_rooms == rooms
    answer = answers[0]
    assert isinstance(answer, Failed)
    assert answer.drained
    return answer


GRANTS: dict[str, tuple[Grant, str, str]] = {
    "out of range": (Grant("kv", 0, 22, (0, 1, 2, 3, 4, 12)), "layout", "outside 0..11"),
    "duplicate": (Grant("kv", 0, 22, (0, 1, 2, 3, 4, 4)), "layout", "given twice"),
    "unknown pool": (Grant("lora", 0, 22, (0, 1, 2, 3, 4, 5)), "layout", "no pool 'lora'"),
    "too few": (Grant("kv", 0, 22, (0, 1)), "layout", "need 6 units"),
    "backwards": (Grant("kv", 22, 0, ()), "layout", "backwards"),
    "inside a page": (Grant("kv", 2, 22, (0, 1, 2, 3, 4, 5)), "layout", "no multiple of 4"),
    "slots with tokens": (Grant("aux", 0, 4, (0,)), "layout", "token range must be 0..0"),
}


@pytest.mark.parametrize("what", GRANTS)
def test_grants_that_cannot_be_are_refused(what: str) -> None:
    grant, code, text = GRANTS[what]
    scene = Scene()
    scene.start()
    good = first_open(scene)
    grants = tuple(grant if g.pool == grant.pool else g for g in good.grants)
    grants = grants if grant in grants else (*grants, grant)
    answer = refused(scene, msgspec.structs.replace(good, key=TransferKey(8, 100), grants=grants))
    assert answer.code == code
    assert text in answer.reason


def test_the_same_pool_twice_is_refused() -> None:
    scene = Scene()
    scene.start()
    good = first_open(scene)
    answer = refused(
        scene, msgspec.structs.replace(good, key=TransferKey(8, 100), grants=(*good.grants, good.grants[0]))
    )
    assert "granted twice" in answer.reason


@pytest.mark.parametrize("change", ["less", "none", "other bytes"])
def test_a_manifest_that_is_not_the_plans_is_refused(change: str) -> None:
    scene = Scene()
    scene.start()
    good = first_open(scene)
    parts = {
        "less": good.parts[:1],
        "none": (),
        "other bytes": tuple(PartBytes(p.part, p.bytes + 1) for p in good.parts),
    }[change]
    answer = refused(scene, msgspec.structs.replace(good, key=TransferKey(8, 100), parts=parts))
    assert answer.code == "protocol"
    assert "are not those of the plan" in answer.reason


def test_a_room_opened_twice_by_the_same_peer_is_refused() -> None:
    scene = Scene()
    scene.start()
    answer = refused(scene, msgspec.structs.replace(first_open(scene), key=TransferKey(scene.room, 100)))
    assert "rooms must be unique" in answer.reason
    scene.submit_all()
    scene.expect_success()


def test_a_room_opened_by_another_group_is_refused_and_the_first_one_goes_on() -> None:
    scene = Scene()
    scene.start()
    intruder = add_group(scene.world, PAIR, side="target", name="e")[0]
    intruder.do(ReceiverOpened(scene.room, scene.addresses))
    intruder.do(GrantsPublished(scene.room, scene.grants(intruder), scene.shape.tokens))
    scene.world.run()
    status = intruder.status("target", scene.room)
    assert status.poll is KVPoll.Failed
    assert status.error is not None
    assert "open already for decode group 'd'" in status.error.message
    assert not status.leased
    scene.submit_all()
    scene.expect_success()


def test_an_open_for_a_session_that_is_not_ready_is_repeated_until_it_is() -> None:
    scene = Scene()
    scene.open_senders()
    scene.open_receivers()
    scene.world.run()
    scene.source.do(PeerFenced(scene.target.core.instance))  # prepares the peer again
    scene.publish()
    scene.drive(3.0)
    scene.expect_success()


# ---- bounds and forgetting ------------------------------------------------------------------------------------------


def test_too_many_rooms_are_refused_as_overloaded() -> None:
    scene = Scene(settings=Settings(rooms=2))
    scene.start()
    for room in (8, 9):
        scene.open_receivers(room)
        scene.publish(room)
    scene.world.run()
    status = scene.status("target", 9)
    assert status.poll is KVPoll.Failed
    assert status.error is not None
    assert status.error.code == "overloaded"
    assert scene.status("target", 8).poll is KVPoll.WaitingForInput
    assert scene.source.core.live_rooms == 2


def test_an_open_that_was_refused_begins_nothing_when_a_copy_of_it_comes_late() -> None:
    """What it was refused for may have passed, but its target was told that nothing of it is in flight."""
    scene = Scene(settings=Settings(rooms=1))
    scene.start()
    message = msgspec.structs.replace(first_open(scene), key=TransferKey(8, 100))
    assert refused(scene, message).code == "overloaded"
    scene.submit_all()
    scene.expect_success()
    assert refused(scene, message).code == "overloaded"


def test_tombstones_are_bounded_and_what_they_forget_is_refused() -> None:
    scene = Scene(settings=Settings(tombstones=2))
    opens = []
    for room in range(10, 15):
        scene.room = room
        scene.start()
        opens.append(next(m for *_, m in reversed(scene.world.trace) if isinstance(m, Open)))
        scene.submit_all()
        scene.expect_success()
    answers = {}
    for message in opens:
        since = len(scene.world.trace)
        scene.world.inject(scene.target, scene.source, message)
        answers[message.key.room] = [type(m) for *_, m in scene.world.trace[since:] if not isinstance(m, Close)]
    assert answers == {10: [Failed], 11: [Failed], 12: [Failed], 13: [Done], 14: [Done]}
    failed = next(m for *_, m in reversed(scene.world.trace) if isinstance(m, Failed))
    assert isinstance(failed, Failed)
    assert "has ended here" in failed.reason
    assert scene.source.core.live_rooms == 0


def test_a_forgotten_transfer_is_still_answered_so_that_nobody_waits() -> None:
    scene = Scene(settings=Settings(tombstones=1))
    for room in (10, 11):
        scene.room = room
        scene.start()
        scene.submit_all()
    key = first_open(scene).key
    d, p = scene.target.core.instance, scene.source.core.instance
    for message, answer in (
        (Abort(sender=d, receiver=p, key=key, code="aborted", reason=""), Drained),
        (Query(sender=d, receiver=p, key=TransferKey(99, 99)), Forgotten),
        (Close(sender=d, receiver=p, key=TransferKey(98, 98), success=True), None),
    ):
        since = len(scene.world.trace)
        scene.world.inject(scene.target, scene.source, message)
        assert [type(m) for *_, m in scene.world.trace[since:]] == ([answer] if answer else [])
    assert scene.source.core.live_rooms == 0


@pytest.mark.parametrize("kind", [Opened, Done, Failed, Drained, Forgotten])
def test_news_of_a_transfer_that_the_target_does_not_know_end_with_a_close(kind: type) -> None:
    scene = Scene()
    scene.start()
    head = {"sender": scene.source.core.instance, "receiver": scene.target.core.instance, "key": TransferKey(99, 99)}
    fields = {"parts": (), "token_count": 1, "code": "x", "reason": "", "drained": True}
    names = kind.__struct_fields__  # type: ignore[attr-defined]
    since = len(scene.world.trace)
    scene.world.inject(scene.source, scene.target, kind(**head, **{k: v for k, v in fields.items() if k in names}))
    closes = said(scene, since, Close)
    assert len(closes) == (kind in (Opened, Done, Failed))
    assert all(not close.success for close in closes if isinstance(close, Close))
    assert scene.target.core.counters["messages_unknown_room"] == 1
    assert scene.target.core.live_rooms == 1


@pytest.mark.parametrize("sender", ["before", "after"])
@pytest.mark.parametrize("kind", [Abort, Query])
def test_an_open_that_its_abort_has_overtaken_begins_nothing(kind: type, sender: str) -> None:
    """Delivered in the other order: Drained was said, so nothing may be written later."""
    scene = Scene(holding(PAIR))
    if sender == "before":
        scene.open_senders()
    kept: list[Open] = []

    def keep_open(_from: Rank, _to: Rank, message: AnyMessage) -> int:
        if isinstance(message, Open):
            kept.append(message)
            return 0
        return 1

    scene.world.network = keep_open
    scene.open_receivers()
    scene.publish()
    scene.world.run()
    d, p = scene.target.core.instance, scene.source.core.instance
    message = {
        Abort: Abort(sender=d, receiver=p, key=kept[0].key, code="aborted", reason=""),
        Query: Query(sender=d, receiver=p, key=kept[0].key),
    }[kind]
    scene.world.inject(scene.target, scene.source, message)
    scene.world.inject(scene.target, scene.source, kept[0])
    if sender == "after":
        scene.open_senders()
    scene.submit_all()
    assert not scene.source.held
    assert scene.status("target").poll is KVPoll.Failed


def test_a_sender_that_comes_after_the_target_aborted_learns_the_cause_at_once() -> None:
    scene = Scene()
    scene.open_receivers()
    scene.publish()
    scene.world.run()
    scene.abort("target", "user left")
    scene.world.run()
    assert scene.source.core.live_rooms == 0
    scene.open_senders()
    status = scene.status("source")
    assert status.poll is KVPoll.Failed
    assert isinstance(status.error, AbortedError)
    assert status.error.message == "user left"
    assert scene.source.core.live_rooms == 0
    scene.open_senders()  # told once: the room may be used again
    assert scene.status("source").poll is KVPoll.Bootstrapping


def open_early(scene: Scene) -> None:
    """The targets open before any sender has come."""
    scene.open_receivers()
    scene.publish()
    scene.world.run()


def test_a_failure_before_the_sender_came_is_forgotten_when_the_target_opens_the_room_again() -> None:
    scene = Scene()
    open_early(scene)
    scene.abort("target")
    scene.world.run()
    assert scene.source.core.sizes()["early_failures"] == 1
    open_early(scene)
    assert scene.source.core.sizes()["early_failures"] == 0
    scene.open_senders()
    scene.submit_all()
    scene.expect_success()


def test_a_failure_before_the_open_is_forgotten_when_a_sender_comes_again() -> None:
    scene = Scene()
    scene.open_senders()
    scene.abort("source")
    assert scene.source.core.sizes()["early_failures"] == 1
    scene.open_senders()
    assert scene.source.core.sizes()["early_failures"] == 0


def test_each_target_is_told_once_of_a_failure_before_it_came() -> None:
    """Those that have opened, or were told, open for the next request."""
    scene = Scene(SHAPES["1→2"])
    scene.open_senders()
    first, second = scene.targets

    def opens(rank: Rank) -> KVPoll:
        rank.do(ReceiverOpened(scene.room, scene.addresses))
        rank.do(GrantsPublished(scene.room, scene.grants(rank), scene.shape.tokens))
        scene.world.run()
        return rank.status("target", scene.room).poll

    assert opens(first) is KVPoll.WaitingForInput
    scene.abort("source")
    scene.world.run()
    assert opens(second) is KVPoll.Failed
    assert opens(second) is KVPoll.WaitingForInput
    assert scene.source.core.sizes()["early_failures"] == 0


def test_the_oldest_failure_is_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "MAX_RECENT_FAILURES", 2)
    scene = Scene()
    for room in (1, 2, 3):
        scene.room = room
        scene.open_senders()
        scene.abort("source")
    assert scene.source.core.sizes()["early_failures"] == 2
    polls = []
    for room in (1, 2, 3):
        scene.room = room
        open_early(scene)
        polls.append(scene.status("target").poll)
    assert polls == [KVPoll.WaitingForInput, KVPoll.Failed, KVPoll.Failed]


def test_a_group_is_checked_once() -> None:
    scene = Scene()
    scene.start()
    assert scene.target.core.sizes()["groups_covered"] == 1


def test_of_the_groups_that_were_checked_the_latest_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Sequence[CacheLayout]] = []

    def check(sources: Sequence[CacheLayout], target: CacheLayout) -> None:
        checked.append(sources)
        check_coverage(sources, target)

    monkeypatch.setattr(target_rooms, "check_coverage", check)
    world = World(Settings(sessions=1))
    first, second = (add_group(world, PAIR, side="source", name=name)[0] for name in ("a", "b"))
    target = add_group(world, PAIR, side="target")[0]
    for room, source in enumerate((first, second, second), start=1):
        target.do(ReceiverOpened(room, (source.address,)))
        target.do(GrantsPublished(room, Scene().grants(target, room), PAIR.tokens))
        world.run()
        assert target.status("target", room).poll is KVPoll.WaitingForInput
    assert len(checked) == 2


def test_the_first_transfer_of_a_peer_is_never_taken_for_a_forgotten_one() -> None:
    scene = Scene()
    scene.start()
    since = len(scene.world.trace)
    scene.world.inject(scene.target, scene.source, msgspec.structs.replace(first_open(scene), key=TransferKey(8, 1)))
    assert said(scene, since, Opened)


# ---- nobody comes ---------------------------------------------------------------------------------------------------


def test_a_sender_that_nobody_opens_expires() -> None:
    scene = Scene()
    scene.open_senders()
    scene.world.run(until=QUICK.bootstrap_timeout - 0.1)
    assert scene.status("source").poll is KVPoll.Bootstrapping
    scene.world.run(until=QUICK.bootstrap_timeout)
    error = scene.status("source").error
    assert error is not None
    assert error.code == "expired"
    assert "no decode ranks to open the room" in error.message
    scene.expect_over()


def test_a_receiver_whose_source_never_answers_is_told_so() -> None:
    scene = Scene()
    scene.world.network = lambda _from, _to, _message: 0
    scene.open_receivers()
    scene.world.run(until=QUICK.handshake_timeout)
    error = scene.status("target").error
    assert error is not None
    assert error.code == "peer_lost"
    scene.expect_over()


@pytest.mark.parametrize("shape", ["1→1", "2→1", "1→2"])
def test_a_room_waits_in_the_queue_of_decode_for_as_long_as_decode_lives(shape: str) -> None:
    scene = Scene(SHAPES[shape])
    scene.open_senders()
    scene.open_receivers()
    scene.world.run(until=10 * QUICK.bootstrap_timeout)
    assert {scene.status(side).poll for side in ("source", "target")} == {KVPoll.Bootstrapping}
    scene.publish()
    scene.submit_all()
    scene.world.run()
    scene.expect_success()


def test_a_source_waits_for_a_queue_no_longer_than_it_hears_of_it() -> None:
    scene = Scene()
    scene.open_senders()
    scene.open_receivers()
    scene.world.run(until=3 * QUICK.bootstrap_timeout)
    assert scene.status("source").poll is KVPoll.Bootstrapping
    scene.world.network = lambda _from, _to, _message: 0
    scene.world.run(until=4 * QUICK.bootstrap_timeout + QUICK.heartbeat_interval)
    for side, code in (("source", "expired"), ("target", "peer_lost")):
        error = scene.status(side).error
        assert error is not None
        assert error.code == code


def test_a_source_room_that_was_never_asked_for_does_not_wait_for_a_queue() -> None:
    """One rank of decode has opened it, another says that it is queued: our own engine is what is missing."""
    scene = Scene(SHAPES["1→2"])
    scene.open_receivers()
    scene.world.run(until=1.0)
    first, _ = scene.targets
    first.do(GrantsPublished(scene.room, scene.grants(first), scene.shape.tokens))
    scene.world.run(until=QUICK.waiting_timeout + QUICK.bootstrap_timeout)
    error = first.status("target", scene.room).error
    assert error is not None
    assert error.code == "expired"


def test_more_rooms_than_one_ping_names_wait_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvbaton.protocol.session.MAX_QUEUED", 2)
    scene = Scene()
    rooms = range(1, 6)
    for room in rooms:
        scene.source.do(SenderOpened(room))
        scene.target.do(ReceiverOpened(room, scene.addresses))
    scene.world.run(until=3 * QUICK.bootstrap_timeout)
    assert [scene.source.status("source", room).poll for room in rooms] == [KVPoll.Bootstrapping] * len(rooms)


def test_rooms_are_found_by_their_sources_until_they_end() -> None:
    scene = Scene()
    core = scene.target.core
    scene.start()
    unreachable = [f"tcp://127.0.0.1:{port}" for port in range(1, 101)]
    for number, address in enumerate(unreachable, 100):
        scene.target.do(ReceiverOpened(number, (*scene.addresses, address)))
    assert core.sizes()["sources_awaited"] == 1 + len(unreachable)
    core.check_invariants()
    for address in unreachable:
        scene.target.do(DialFailed(address, PeerLostError("nobody listens")))
        core.check_invariants()
    scene.submit_all()
    scene.world.run(until=2 * QUICK.announce_seconds)
    assert core.sizes()["rooms"] == core.sizes()["sources_awaited"] == 0


def test_an_open_that_is_never_acknowledged_expires_and_drains() -> None:
    scene = Scene()
    scene.world.network = dropping(Open)
    scene.start()
    scene.world.run(until=QUICK.waiting_timeout)
    error = scene.status("target").error
    assert error is not None
    assert error.code == "expired"
    assert "did not acknowledge the room within 30 s" in error.message
    assert scene.target.core.live_rooms == 0


def test_a_target_that_never_confirms_lets_the_source_go() -> None:
    scene = Scene()
    scene.start()
    scene.world.network = dropping(Done)
    scene.submit_all()
    scene.world.network = dropping(Done, Query)
    scene.world.run(until=QUICK.announce_seconds + 1.0)
    error = scene.status("source").error
    assert error is not None
    assert error.code == "expired"
    assert "did not confirm the delivery" in error.message
    scene.world.network = lambda _from, _to, _message: 1
    scene.world.run(until=scene.world.now + 60.0)
    scene.expect_over()


# ---- garbage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\x00",
        b"garbage",
        b"\xc1" * 100,
        b"\x81\xa4type\xa5hello",
        encode(Query(sender="a", receiver="b", key=TransferKey(1, 1)))[:-1],
    ],
)
def test_garbage_is_counted_and_changes_nothing(payload: bytes) -> None:
    scene = Scene()
    scene.start()
    scene.source.do(MessageArrived(scene.source.link_to(scene.target), payload))
    scene.source.do(MessageArrived(999, payload))  # type: ignore[arg-type]
    assert scene.source.core.counters["messages_malformed"] == 2
    scene.submit_all()
    scene.expect_success()


def test_events_of_unknown_rooms_writes_and_peers_change_nothing() -> None:
    scene = Scene()
    for rank in scene.ranks:
        rank.do(ChunkSubmitted(99, scene.chunk(scene.source, 0)))
        rank.do(GrantsPublished(99, (), 1))
        rank.do(WriteSettled(WriteId(99)))
        rank.do(PeerFenced("nobody"))
        rank.do(TimePassed())
        assert rank.core.live_rooms == 0
        assert rank.core.next_deadline() is None


# ---- deadlines and stories ------------------------------------------------------------------------------------------


def test_an_address_that_could_not_be_dialled_is_dialled_again_for_the_next_room() -> None:
    core, address = Scene().target.core, "tcp://nowhere:1"

    def dials(number: int) -> bool:
        return Dial(address) in core.handle(ReceiverOpened(number, (address,)), 0.0)

    assert dials(1)
    assert not dials(2)
    core.handle(DialFailed(address, DisconnectedError("no route")), 0.0)
    assert dials(3)


def test_a_room_whose_address_cannot_be_dialled_fails_at_once_and_no_other() -> None:
    core, nowhere = Scene().target.core, "tcp://nowhere:1"
    core.handle(ReceiverOpened(1, (nowhere,)), 0.0)
    core.handle(ReceiverOpened(2, ("tcp://elsewhere:1",)), 0.0)
    effects = core.handle(DialFailed(nowhere, DisconnectedError("no route")), 0.0)
    reports = {effect.room: effect.status for effect in effects if isinstance(effect, Report)}
    assert {room: (status.poll, str(status.error)) for room, status in reports.items()} == {
        1: (KVPoll.Failed, "no route [room 1] [while Bootstrapping]")
    }


def test_what_thousands_of_rooms_repeat_to_a_slow_peer_does_not_grow_with_them() -> None:
    rooms = range(1, 1_001)
    scene = Scene(settings=Settings())
    scene.world.checking = False
    scene.world.network = dropping(Opened)
    for room in rooms:
        scene.open_receivers(room)
        scene.publish(room)
    scene.world.run(until=0.4)
    since = len(scene.world.trace)
    assert since > len(rooms)
    scene.world.run(until=10.0)
    repeated = [at for at, _, _, message in scene.world.trace[since:] if isinstance(message, Open)]
    assert max(Counter(map(int, repeated)).values()) <= 1.5 * REPEATS_PER_SECOND
    assert {m.key.room for *_, m in scene.world.trace[since:] if isinstance(m, Open)} == set(rooms)
    scene.world.network = dropping()
    scene.world.run(until=20.0)
    assert {scene.status("target", room).poll for room in rooms} == {KVPoll.WaitingForInput}
    for room in rooms:
        scene.target.do(AbortRequested(room, "target", AbortedError("over")))
    scene.world.run(until=30.0)
    assert scene.target.core.sizes()["repeating"] == scene.source.core.sizes()["repeating"] == 0


def test_rooms_that_only_wait_ask_at_a_bounded_rate_and_hold_up_none_that_has_to_be_heard() -> None:
    rooms = range(1, 3 * REPEATS_PER_SECOND)
    settings = Settings(retry_most_seconds=1.0, waiting_timeout=8.0)
    scene = Scene(settings=settings)
    scene.world.checking = False
    for room in rooms:
        scene.open_receivers(room)
        scene.publish(room)
    scene.world.run(until=5.5)
    assert 0 < len(said(scene, 0, Query)) <= 1.2 * 5.5 * REPEATS_PER_SECOND
    scene.world.network = dropping(Opened)
    scene.open_receivers(rooms.stop)
    scene.publish(rooms.stop)
    since = len(scene.world.trace)
    scene.world.run(until=5.5 + settings.retry_seconds)
    assert [m for *_, m in scene.world.trace[since:] if isinstance(m, Open)], "the new room's, which is not answered"


@pytest.mark.parametrize(
    ("chunks", "settled", "told"),
    [
        (0, False, "no chunk was submitted"),
        (2, False, "the writes made no progress"),
        (1, True, "no further chunk was submitted"),
    ],
)
def test_a_source_that_expires_says_what_it_waited_for(chunks: int, settled: bool, told: str) -> None:
    scene = Scene(holding(PAIR))
    scene.start()
    for number in range(chunks):
        scene.submit(number)
    if settled:
        scene.source.release_writes()
    scene.world.network = dropping(Abort)  # the target gives up as well, and must not be heard first
    scene.world.run(until=QUICK.waiting_timeout + 0.5)
    assert told in str(scene.status("source").error)


def test_the_next_deadline_is_the_earliest_of_all() -> None:
    scene = Scene()
    core = scene.source.core
    assert core.next_deadline() is None
    scene.world.now = 100.0
    scene.source.do(SenderOpened(1))
    assert core.next_deadline() == 100.0 + QUICK.bootstrap_timeout
    scene.world.now = 101.0
    scene.source.do(SenderOpened(2))
    assert core.next_deadline() == 100.0 + QUICK.bootstrap_timeout
    scene.source.do(TimePassed())
    assert core.next_deadline() == 100.0 + QUICK.bootstrap_timeout
    scene.world.run(until=100.0 + QUICK.bootstrap_timeout)
    assert scene.status("source", 1).poll is KVPoll.Failed
    assert scene.status("source", 2).poll is KVPoll.Bootstrapping
    assert core.next_deadline() == 101.0 + QUICK.bootstrap_timeout
    scene.world.run(until=200.0)
    assert core.next_deadline() is None


@pytest.mark.parametrize("shape", ["1→1", "1→2", "bystander"])
def test_no_deadline_is_ever_in_the_past(shape: str) -> None:
    scene = Scene(holding(SHAPES[shape]))
    scene.start()
    scene.submit(0)
    scene.abort("target")
    for second in range(100):
        scene.world.run(until=float(second))
        for rank in scene.ranks:
            deadline = rank.core.next_deadline()
            assert deadline is None or deadline > scene.world.now


def waits(scene: Scene, rank: Rank) -> str:
    return rank.core.trace_and_state(scene.room)[-1].text


def test_a_story_says_what_a_room_waits_for() -> None:
    scene = Scene(SHAPES["1→2"])
    scene.open_senders()
    assert waits(scene, scene.source) == "now Bootstrapping: no decode ranks to open the room; 0 have"
    scene.open_receivers()
    assert waits(scene, scene.target) == "now Bootstrapping: the engine to publish pages"
    scene.world.network = lambda _from, _to, _message: 0
    scene.publish()
    scene.world.run()
    assert waits(scene, scene.target) == "now Bootstrapping: sessions: world://p0: greeting"
    scene.world.network = lambda _from, _to, _message: 1
    scene.world.run(until=1.0)
    assert waits(scene, scene.source).startswith("now WaitingForInput: transfers: i-d0 is waiting")
    assert waits(scene, scene.target) == "now WaitingForInput: transfers: i-p0 is opened"
    scene.submit_all()
    scene.expect_success()
    told = [line.text for line in scene.source.core.trace_and_state(scene.room)]
    assert told[0] == "sender opened"
    assert "chunk to token 12 submitted" in told
    assert "chunk to token 22 submitted, the last" in told
    assert told[-1].endswith("closed")
    assert scene.source.core.trace_and_state(12345) == []


def test_a_story_tells_the_first_root_cause() -> None:
    scene = Scene(holding(PAIR))
    scene.start()
    scene.submit(0)
    scene.abort("target", "user left")
    scene.abort("target", "something else")
    scene.world.run()
    scene.source.release_writes()
    scene.world.run()
    scene.expect_failed()
    for rank in scene.ranks:
        told = "\n".join(line.text for line in rank.core.trace_and_state(scene.room))
        assert "user left" in told
        assert "something else" not in told
        status = rank.status("source" if rank is scene.source else "target", scene.room)
        assert status.error is not None
        assert status.error.message == "user left"


# ---- shutdown -------------------------------------------------------------------------------------------------------

SIDES: dict[str, Callable[[Scene], Rank]] = {"source": lambda s: s.source, "target": lambda s: s.target}


@pytest.mark.parametrize("side", SIDES)
def test_a_shutdown_fails_what_is_live_and_tells_the_peer(side: str) -> None:
    scene = Scene(holding(PAIR))
    scene.start()
    scene.submit(0)
    closing = SIDES[side](scene)
    closing.do(ShutdownRequested("upgrade"))
    scene.world.run()
    for role in ("source", "target"):
        status = scene.status(role)  # type: ignore[arg-type]
        assert status.poll is KVPoll.Failed
        assert status.error is not None
        assert status.error.message == "its rank is closing: upgrade"
    scene.source.release_writes()
    scene.world.run()
    assert closing.core.quiet
    scene.world.perform(closing, closing.core.farewell("upgrade"))
    scene.world.run(until=60.0)
    scene.expect_failed()


def test_a_farewell_with_writes_in_flight_is_our_own_bug() -> None:
    scene = Scene(holding(PAIR))
    scene.start()
    scene.submit(0)
    with pytest.raises(InternalError, match="no write is in flight"):
        scene.source.core.farewell("now")


def test_what_a_driver_asks() -> None:
    scene = Scene(holding(PAIR))
    assert not scene.source.core.wants_chunks(scene.room)
    scene.start()
    assert scene.source.core.wants_chunks(scene.room)
    assert scene.target.core.receiving
    assert not scene.source.core.receiving
    scene.submit(0)
    assert not scene.source.core.quiet
    assert not scene.source.core.receiving, "it writes"
    assert scene.target.core.quarantined == 0, "leased, but for good"
    agreed = scene.source.core.plan_digest("i-d0", "source")
    assert agreed
    assert scene.target.core.plan_digest("i-p0", "target") == agreed
    assert scene.source.core.plan_digest("i-d0", "target") is None
    scene.abort("source")
    assert not scene.source.core.wants_chunks(scene.room)
    assert scene.target.core.receiving
    scene.source.release_writes()
    scene.world.run()
    assert not scene.target.core.receiving
    assert scene.source.core.quiet


def test_a_bystander_does_not_make_its_target_receive() -> None:
    scene = Scene(SHAPES["bystander"])
    scene.world.network = lambda sender, _to, message: 0 if isinstance(message, Done) and sender.name == "p1" else 1
    scene.start()
    scene.submit_all()
    assert scene.status("target").poll is KVPoll.Success
    assert scene.target.core.live_rooms == 1, "the bystander has yet to conclude"
    assert not scene.target.core.receiving


def test_a_rank_that_sends_keeps_a_staging_slot_for_that() -> None:
    scene = Scene()
    scene.start()
    assert scene.source.core.staging.sends
    assert not scene.target.core.staging.sends


def corrupt(core: Core, how: str) -> None:
    """Make the tables of a core contradict each other, as a bug would."""
    transfers, rooms = core._transfers, core._rooms
    (transfer,) = transfers.live()
    address = (transfer.peer, transfer.role, transfer.key)
    if how == "write":
        transfer.as_source().outstanding.clear()
    elif how == "closed":
        transfer.state = State.CLOSED
    elif how == "dead and alive":
        transfers._tombstones[address] = transfer
    elif how == "deadline":
        transfers._context.cancel_timers(transfer)
    elif how == "too many tombstones":
        most = transfers._context.settings.tombstones
        transfers._tombstones.update({(str(n), "source", transfer.key): transfer for n in range(most + 1)})
    elif how == "tombstones by peer":
        transfers._tombstones_of["i-d0"] = OrderedDict({address: None})
    elif how == "empty tombstones":
        transfers._tombstones_of["i-d0"] = OrderedDict()
    elif how == "rooms":
        transfers._rooms_of["i-d0"] += 1
    elif how == "units":
        transfers._units_of["i-d0"] += 1
    elif how == "home":
        rooms._homes.clear()
    elif how == "another home":
        rooms._homes[transfer].transfers.clear()
    else:
        rooms.all()[0].reported = RoomStatus()


CONTRADICTIONS = {
    "write": "is not outstanding",
    "closed": "closed and live at once",
    "dead and alive": "closed and live at once",
    "deadline": "has no deadline",
    "too many tombstones": "too many tombstones",
    "tombstones by peer": "are not the tombstones",
    "empty tombstones": "are not the tombstones",
    "rooms": "live rooms by peer are miscounted",
    "units": "granted units by peer are miscounted",
    "home": "belongs to no room",
    "another home": "belongs to no room",
    "report": "was reported as",
}


@pytest.mark.parametrize("how", CONTRADICTIONS)
def test_tables_that_contradict_each_other_are_noticed(how: str) -> None:
    scene = Scene(holding(PAIR))
    scene.start()
    scene.submit(0)
    scene.source.core.check_invariants()
    corrupt(scene.source.core, how)
    with pytest.raises(InternalError, match=CONTRADICTIONS[how]):
        scene.source.core.check_invariants()


def test_worlds_without_traffic_stay_empty() -> None:
    world = World(QUICK)
    rank = add_group(world, PAIR, side="source")[0]
    world.run(until=1_000.0)
    assert world.trace == []
    assert rank.core.sessions() == []

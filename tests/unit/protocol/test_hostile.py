"""What a peer that lies, repeats what it has recorded, or floods can do to a core: nothing to others, little to us."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from kvbaton.control.base import LinkId
from kvbaton.plan.pair import PartId
from kvbaton.protocol import allowance
from kvbaton.protocol.allowance import BURST, Allowance
from kvbaton.protocol.effects import KVPoll, Send
from kvbaton.protocol.events import MessageArrived, ReceiverOpened
from kvbaton.protocol.messages import (
    Abort,
    AnyMessage,
    Grant,
    Hello,
    Open,
    PartBytes,
    Ping,
    Query,
    TransferKey,
    decode,
    encode,
)
from kvbaton.protocol.settings import Settings
from kvbaton.protocol.trace import MAX_CHARACTERS
from kvbaton.testing.rank import Rank
from unit.protocol.scene import QUICK, Scene

ELSEWHERE = LinkId(77_777)  # a link that no session of the scenes uses


def say(rank: Rank, message: AnyMessage, link: LinkId = ELSEWHERE) -> list[AnyMessage]:
    """A message arrives at ``rank`` over a link of its own; what is answered there."""
    effects = rank.core.handle(MessageArrived(link, encode(message)), rank.world.now)
    rank.core.check_invariants()
    answers = [decode(effect.payload) for effect in effects if isinstance(effect, Send) and effect.link == link]
    rank.world.perform(rank, [effect for effect in effects if not (isinstance(effect, Send) and effect.link == link)])
    rank.world.run()
    return answers


def recorded(scene: Scene, kind: type[AnyMessage]) -> AnyMessage:
    """The first message of a kind that the target sent."""
    return next(m for _, sender, _, m in scene.world.trace if sender == "d0" and isinstance(m, kind))


def ready(settings: Settings = QUICK) -> Scene:
    scene = Scene(settings=settings)
    scene.start()
    return scene


def opening(scene: Scene, number: int, room: int, *, sender: str = "i-d0") -> Open:
    """A well-formed Open of the scene's target for another room."""
    first = recorded(scene, Open)
    assert isinstance(first, Open)
    return msgspec.structs.replace(first, sender=sender, key=TransferKey(room, 1_000 + number))


# ---- replay


def test_a_recorded_hello_moves_no_session_to_another_link() -> None:
    scene = ready()
    assert say(scene.source, recorded(scene, Hello)) == []
    assert scene.source.core.counters["messages_replayed"] == 1
    scene.submit_all()
    scene.expect_success()


def test_a_newer_hello_does_because_its_process_has_a_new_connection() -> None:
    scene = ready()
    scene.world.reconnect(scene.target, scene.source.address)
    assert scene.source.core.counters["messages_replayed"] == 0
    assert say(scene.source, recorded(scene, Hello)) == []
    assert scene.source.core.counters["messages_replayed"] == 1
    scene.submit_all()
    scene.expect_success()


def test_a_recorded_hello_moves_no_session_even_if_it_was_meant_for_us() -> None:
    """The first greeting of a target names nobody, every later one its receiver."""
    scene = ready()
    scene.world.reconnect(scene.target, scene.source.address)
    latest = [m for _, sender, _, m in scene.world.trace if sender == "d0" and isinstance(m, Hello)][-1]
    assert latest.receiver == scene.source.core.instance
    assert say(scene.source, latest) == []
    assert scene.source.core.counters["messages_replayed"] == 1
    scene.submit_all()
    scene.expect_success()


def test_a_recorded_open_from_another_link_does_nothing() -> None:
    scene = ready()
    before = scene.source.core.sizes()
    say(scene.source, recorded(scene, Open))
    say(scene.source, opening(scene, 1, room=4711))
    after = scene.source.core.sizes()
    assert {name: after[name] for name in ("rooms", "transfers", "tombstones", "sessions")} == {
        name: before[name] for name in ("rooms", "transfers", "tombstones", "sessions")
    }
    assert scene.source.core.counters["messages_from_strangers"] == 2
    scene.submit_all()
    scene.expect_success()


def test_a_recorded_open_of_a_room_that_has_ended_does_nothing() -> None:
    scene = ready()
    scene.submit_all()
    scene.expect_success()
    scene.world.inject(scene.target, scene.source, recorded(scene, Open))
    assert scene.source.core.live_rooms == 0
    assert scene.source.core.quiet


def test_a_recorded_message_of_an_earlier_instance_does_nothing_to_its_successor() -> None:
    scene = ready()
    hello = recorded(scene, Hello)
    scene.world.replace(scene.source, "p0-again")  # the target greets it
    scene.world.run()
    successor = scene.world.ranks["p0-again"]
    (answer,) = say(successor, recorded(scene, Open))
    assert type(answer).__name__ == "UnknownPeer"
    assert successor.core.live_rooms == 0
    say(successor, hello)  # older than the greeting by which it knows the target
    assert successor.core.counters["messages_replayed"] == 1


def test_a_hello_that_was_meant_for_another_rank_moves_no_session() -> None:
    """A rank that a target greets, too, could pass the greeting on: it is newer than the one that we know."""
    scene = ready()
    hello = recorded(scene, Hello)
    assert isinstance(hello, Hello)
    for receiver in ("", "i-evil"):
        say(scene.source, msgspec.structs.replace(hello, hello_sequence=hello.hello_sequence + 5, receiver=receiver))
    assert scene.source.core.counters["messages_replayed"] == 2
    scene.submit_all()
    scene.expect_success()


def test_another_address_cannot_pass_for_a_rank_that_we_know() -> None:
    """It would be greeted by the other's name, and could pass that greeting on."""
    scene = ready()
    evil = scene.world.add("evil", scene.source.layout, address="world://evil")
    scene.world.network = lambda sender, _to, _message: 0 if sender is evil else 1
    scene.target.do(ReceiverOpened(99, (evil.address,)))
    scene.world.run()
    answer = next(m for _, sender, _, m in scene.world.trace if sender == "p0" and isinstance(m, Hello))
    scene.world.inject(evil, scene.target, answer)
    assert scene.target.core.counters["messages_replayed"] == 1
    assert {to: state for to, _, state in scene.target.core.sessions()} == {
        "i-p0 at world://p0": "ready",
        "nobody yet at world://evil": "greeting",
    }
    scene.submit_all()
    scene.expect_bytes()


def test_a_recorded_hello_of_a_replaced_instance_does_not_push_out_its_successor() -> None:
    scene = ready()
    old = recorded(scene, Hello)
    assert isinstance(old, Hello)
    successor = msgspec.structs.replace(old, sender="i-d0-again")
    say(scene.source, successor)
    assert ("i-d0", "source", "lost") in [(s.split()[0], r, state) for s, r, state in scene.source.core.sessions()]
    say(scene.source, msgspec.structs.replace(old, hello_sequence=old.hello_sequence + 9), LinkId(88_888))
    states = {name.split()[0]: state for name, _, state in scene.source.core.sessions()}
    assert states["i-d0-again"] != "lost"
    assert scene.source.core.counters["messages_replayed"] == 1


def test_another_process_on_the_link_of_a_peer_is_proof_that_the_peer_has_ended() -> None:
    scene = ready()
    hello = recorded(scene, Hello)
    link = scene.source.link_to(scene.target)
    say(scene.source, msgspec.structs.replace(hello, sender="i-x", group="x"), link)
    assert [name for name, _, _ in scene.source.core.sessions()] == ["i-x"]
    error = scene.status("source").error
    assert error is not None
    assert error.message == "replaced by i-x on its link"


def test_what_is_remembered_of_replaced_instances_is_bounded_and_the_oldest_goes_first() -> None:
    scene = Scene(settings=replace(QUICK, sessions=2))
    hello = scene.target.core.identity.hello(hello_sequence=1)
    for number in range(4):  # each takes the place of the one before
        say(scene.source, msgspec.structs.replace(hello, sender=f"i-{number}"), LinkId(1000 + number))
    assert scene.source.core.sizes()["instances_replaced"] == 2
    for number in (1, 2):
        say(scene.source, msgspec.structs.replace(hello, sender=f"i-{number}", hello_sequence=9), LinkId(2000 + number))
    assert scene.source.core.counters["messages_replayed"] == 2


# ---- answers that nobody asked for


def test_strangers_get_a_bounded_number_of_answers() -> None:
    scene = Scene()
    ping = Ping(sender="i-x", receiver="i-p0")
    answered = sum(len(say(scene.source, ping)) for _ in range(1_000))
    assert answered == BURST
    assert scene.source.core.counters["messages_from_strangers"] == 1_000
    scene.world.run(until=1.0)
    assert sum(len(say(scene.source, ping)) for _ in range(1_000)) == allowance.ANSWERS_PER_SECOND
    assert len(say(scene.source, ping, LinkId(88_888))) == 1  # another link is not to blame


def test_an_answer_to_a_stranger_is_not_much_larger_than_its_question() -> None:
    scene = Scene()
    ping = Ping(sender="x" * 64, receiver="y" * 64)
    (answer,) = say(scene.source, ping)
    assert len(encode(answer)) <= len(encode(ping))


def test_repeated_greetings_get_a_bounded_number_of_answers() -> None:
    scene = ready()
    hello = recorded(scene, Hello)
    link = scene.source.link_to(scene.target)
    answered = sum(bool(say(scene.source, hello, link)) for _ in range(1_000))
    assert 0 < answered <= BURST
    scene.submit_all()
    scene.expect_success()


def test_the_allowance_is_bounded_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allowance, "MAX_LINKS", 3)
    answers = Allowance()
    assert all(answers.take(LinkId(number), 0.0) for number in range(100))
    assert len(answers) == 3


def test_the_link_that_was_answered_longest_ago_is_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allowance, "MAX_LINKS", 2)
    answers = Allowance()
    first, second, third = map(LinkId, (1, 2, 3))
    for link in (second, first):
        assert [answers.take(link, 0.0) for _ in range(BURST + 1)] == [True] * BURST + [False]
    assert not answers.take(second, 0.0)  # asked last
    assert answers.take(third, 0.0)
    assert not answers.take(second, 0.0)
    assert answers.take(first, 0.0)


def test_an_allowance_grows_with_time_up_to_its_burst() -> None:
    answers = Allowance()
    link = LinkId(1)
    assert [answers.take(link, 5.0) for _ in range(BURST + 1)] == [True] * BURST + [False]
    pause = 1.0 / allowance.ANSWERS_PER_SECOND
    assert not answers.take(link, 5.0 + pause / 2)
    assert answers.take(link, 5.0 + pause)
    assert not answers.take(link, 5.0 + pause)
    assert sum(answers.take(link, 1_000.0) for _ in range(2 * BURST)) == BURST


# ---- tables


def test_greetings_that_come_to_nothing_are_forgotten() -> None:
    scene = Scene()
    hello = scene.target.core.identity.hello(hello_sequence=1)
    for number in range(50):
        say(
            scene.source,
            msgspec.structs.replace(hello, sender=f"i-{number}", group=f"g{number}"),
            LinkId(1000 + number),
        )
    assert len(scene.source.core.sessions()) == 50
    scene.world.run(until=QUICK.handshake_timeout + QUICK.silence_seconds + QUICK.announce_seconds + 10)
    assert scene.source.core.sessions() == []


def test_greetings_do_not_keep_others_out_of_a_full_table() -> None:
    scene = Scene(settings=replace(QUICK, sessions=8))
    hello = scene.target.core.identity.hello(hello_sequence=1)
    wrong = msgspec.structs.replace(hello, version=99)
    for number in range(100):
        say(
            scene.source,
            msgspec.structs.replace(wrong, sender=f"i-{number}", group=f"g{number}"),
            LinkId(1000 + number),
        )
    assert len(scene.source.core.sessions()) == 8
    scene.start()
    scene.submit_all()
    scene.expect_success()


def test_one_peer_cannot_open_more_rooms_than_its_share() -> None:
    scene = ready(replace(QUICK, rooms_per_peer=4))
    link = scene.source.link_to(scene.target)
    answers = [say(scene.source, opening(scene, number, room=100 + number), link) for number in range(10)]
    codes = [getattr(answer, "code", "") for (answer,) in answers]
    assert codes == ["", "", "", *["overloaded"] * 7]
    scene.submit_all()
    assert scene.status("source").poll is KVPoll.Success
    scene.world.run(until=scene.world.now + 200)
    assert scene.source.core.live_rooms == 0, "rooms that nobody asked for end"
    assert say(scene.source, opening(scene, 99, room=999), link)[0].__class__.__name__ == "Opened"


def test_one_peer_cannot_grant_more_units_than_its_share() -> None:
    scene = ready(replace(QUICK, units_per_peer=14))  # an Open of the scene names 7
    link = scene.source.link_to(scene.target)
    codes = [getattr(say(scene.source, opening(scene, n, room=100 + n), link)[0], "code", "") for n in range(3)]
    assert codes == ["", "overloaded", "overloaded"]


def test_one_peer_cannot_make_us_forget_how_anothers_rooms_ended() -> None:
    scene = ready(replace(QUICK, tombstones=40, tombstones_per_peer=16))
    other = msgspec.structs.replace(scene.target.core.identity.hello(hello_sequence=1), sender="i-x", group="x")
    link = LinkId(88_888)
    say(scene.source, other, link)
    scene.submit_all()
    scene.expect_success()
    for number in range(200):
        query = Query(sender="i-x", receiver="i-p0", key=TransferKey(number, number + 1))
        say(scene.source, query, link)
    assert scene.source.core.sizes()["tombstones"] == 17
    scene.world.inject(scene.target, scene.source, recorded(scene, Open))
    assert [type(m).__name__ for _, sender, _, m in scene.world.trace if sender == "p0"][-1] == "Done"


def test_forgetting_begins_with_the_peer_whose_rooms_were_forgotten_longest_ago() -> None:
    """An Open of a room whose end was confirmed must begin nothing, though there is no tombstone for it any more."""
    scene = ready(replace(QUICK, sessions=2, tombstones_per_peer=1))
    for number, name in enumerate(("i-x", "i-y")):
        hello = scene.target.core.identity.hello(hello_sequence=1)
        link = LinkId(88_888 + number)
        say(scene.source, msgspec.structs.replace(hello, sender=name, group=name), link)
        for room in (1, 2):
            say(scene.source, Query(sender=name, receiver="i-p0", key=TransferKey(room, room)), link)
    scene.submit_all()
    scene.room += 1
    scene.start()
    scene.submit_all()
    assert scene.source.core.sizes()["forgotten_below"] == 2
    (answer,) = say(scene.source, recorded(scene, Open), scene.source.link_to(scene.target))
    assert "has ended here" in getattr(answer, "reason", "")


def test_tombstones_keep_no_page_lists() -> None:
    scene = ready()
    scene.submit_all()
    scene.expect_success()
    (transfer,) = scene.source.core._transfers._tombstones.values()
    assert all(grant.units == () for grant in transfer.as_source().grants.values())


def test_what_a_peer_says_is_clipped_before_it_is_remembered() -> None:
    scene = ready()
    link = scene.source.link_to(scene.target)
    parts = (PartBytes(PartId("x" * 1_000_000, 0, 1, 0, 1), 1),)
    say(scene.source, msgspec.structs.replace(opening(scene, 1, room=4711), parts=parts), link)
    say(
        scene.source,
        Abort(sender="i-d0", receiver="i-p0", key=TransferKey(4712, 1), code="c" * 2000, reason="r" * 2000),
    )
    lines = [line for room in (4711, scene.room) for line in scene.source.core.trace_and_state(room)]
    assert lines
    assert max(len(line.text) for line in lines) <= MAX_CHARACTERS


def test_a_grant_that_names_a_gigantic_range_is_refused() -> None:
    scene = ready()
    link = scene.source.link_to(scene.target)
    huge = msgspec.structs.replace(opening(scene, 1, room=4711), grants=(Grant("kv", 0, (1 << 63) - 1, (0,)),))
    (answer,) = say(scene.source, huge, link)
    assert getattr(answer, "code", "") == "layout"

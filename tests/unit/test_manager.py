"""The facade over a real driver thread, over memory and over real NIXL: what an engine sees."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from ranks import ROOMS, MakeRank, begin, finish

from kvbaton.control.base import Links
from kvbaton.control.memory import Network
from kvbaton.discovery.membership import Membership
from kvbaton.errors import (
    AbortedError,
    ConfigError,
    DeclinedError,
    ExpiredError,
    InternalError,
    LayoutError,
    LocalProtocolError,
    OverloadedError,
    TransportError,
)
from kvbaton.layout import CacheLayout
from kvbaton.manager import ALWAYS_READY, KVManager, KVPoll, PeerLost, Span, new_instance
from kvbaton.protocol.settings import Settings
from kvbaton.transports import make_transport
from kvbaton.transports.base import WriteState


def test_a_room_arrives_byte_for_byte(make_rank: MakeRank) -> None:
    source, target = make_rank("prefill", fill=1), make_rank("decode")
    sender, receiver = begin(source, target)
    assert sender.poll() is KVPoll.WaitingForInput
    sender.submit([Span("kv", 0, 16, (4,))], last=False, ready=ALWAYS_READY)
    sender.submit([Span("kv", 16, 40, (6, 2)), Span("aux", 0, 0, (3,))], last=True, ready=ALWAYS_READY)
    finish(source, target, sender, receiver)
    assert (sender.poll(), receiver.poll()) == (KVPoll.Success, KVPoll.Success)
    for mine, theirs in zip((5, 3, 1), (4, 6, 2), strict=True):
        np.testing.assert_array_equal(target.page(mine), source.page(theirs))
    np.testing.assert_array_equal(target.slot(2), source.slot(3))
    untouched = [page for page in range(64) if page not in (5, 3, 1)]
    assert not target.kv.reshape(4, 64, -1)[:, untouched].any()
    assert receiver.bytes == sender.bytes == 3 * 4 * 16 * 2 * 64 + 64


def test_layers_go_ahead_of_their_chunk_and_arrive_once(make_rank: MakeRank) -> None:
    source, target = make_rank("prefill", fill=1, settings=Settings(layers_ahead="always")), make_rank("decode")
    sender, receiver = begin(source, target)
    first = (Span("kv", 0, 16, (4,)),)
    for layer in (1, 0):
        sender.submit(first, layers=(layer, layer + 1), last=False, ready=ALWAYS_READY)
    sender.submit(first, last=False, ready=ALWAYS_READY)
    rest = (Span("kv", 16, 40, (6, 2)), Span("aux", 0, 0, (3,)))
    sender.submit(rest, layers=(1, 2), last=False, ready=ALWAYS_READY)
    sender.submit(rest, layers=(0, 1), last=True, ready=ALWAYS_READY)
    finish(source, target, sender, receiver)
    assert (sender.poll(), receiver.poll()) == (KVPoll.Success, KVPoll.Success)
    for mine, theirs in zip((5, 3, 1), (4, 6, 2), strict=True):
        np.testing.assert_array_equal(target.page(mine), source.page(theirs))
    np.testing.assert_array_equal(target.slot(2), source.slot(3))
    assert receiver.bytes == sender.bytes == 3 * 4 * 16 * 2 * 64 + 64


def test_layers_that_are_held_back_are_leased(make_rank: MakeRank) -> None:
    source, target = make_rank("prefill", fill=1), make_rank("decode")
    sender, receiver = begin(source, target)
    spans = (Span("kv", 0, 40, (4, 6, 2)), Span("aux", 0, 0, (3,)))
    sender.submit(spans, layers=(0, 1), last=False, ready=ALWAYS_READY)
    assert sender.leased
    assert not sender.bytes
    with pytest.raises(LayoutError, match="which has layers 0 to 1"):
        sender.submit(spans, layers=(2, 3), last=False, ready=ALWAYS_READY)
    sender.submit(spans, last=True, ready=ALWAYS_READY)
    finish(source, target, sender, receiver)
    assert receiver.poll() is KVPoll.Success
    np.testing.assert_array_equal(target.page(1), source.page(2))


def test_units_may_be_arrays_which_the_engine_may_change_afterwards(make_rank: MakeRank) -> None:
    source, target = make_rank("prefill", fill=1), make_rank("decode")
    room = next(ROOMS)
    sender, receiver = source.manager.sender(room), target.manager.receiver(room, [source.manager.address])
    ours, theirs = np.array([4, 6, 2], dtype=np.int32), np.array([5, 3, 1, 0], dtype=np.int64)[:3]
    receiver.publish([Span("kv", 0, 40, theirs), Span("aux", 0, 0, np.array([2]))], token_count=40)
    sender.submit([Span("kv", 0, 40, ours), Span("aux", 0, 0, (3,))], last=True, ready=ALWAYS_READY)
    ours[:], theirs[:] = 60, 60
    finish(source, target, sender, receiver)
    assert receiver.error is None
    for mine, its in zip((5, 3, 1), (4, 6, 2), strict=True):
        np.testing.assert_array_equal(target.page(mine), source.page(its))


@pytest.mark.parametrize(
    ("units", "problem"),
    [
        (np.array([4, 6, 64]), "outside 0..63"),
        (np.array([4, 6, -1]), "outside 0..63"),
        (np.array([4, 6, 1 << 40]), "more than a message carries"),
        (np.array([4.0, 6.0, 2.0]), "not a list of integers"),
        (np.array([[4, 6, 2]]), "not a list of integers"),
        (np.array([4, 6, 4]), "given twice"),
        (np.array([4, 6]), "need 3 units"),
    ],
)
def test_arrays_of_units_are_checked_like_all_others(make_rank: MakeRank, units: Any, problem: str) -> None:
    target = make_rank("decode")
    receiver = target.manager.receiver(next(ROOMS), ["tcp://127.0.0.1:1"])
    with pytest.raises(LayoutError, match=problem):
        receiver.publish([Span("kv", 0, 40, units), Span("aux", 0, 0, (2,))], token_count=40)


def test_a_sender_frees_its_units_while_decode_has_not_confirmed_yet(make_rank: MakeRank) -> None:
    """Told once each: first that the units are free, then that the room has ended, with what it was."""
    source, target = make_rank("prefill", fill=1), make_rank("decode")
    room = next(ROOMS)
    receiver = target.manager.receiver(room, [source.manager.address], tag="theirs")
    sender = source.manager.sender(room, tag=("request", 7))
    receiver.publish([Span("kv", 0, 40, (5, 3, 1)), Span("aux", 0, 0, (2,))], token_count=40)
    source.wait_until(lambda: sender.poll() is KVPoll.WaitingForInput, "decode has opened")
    assert not sender.freed
    spans = [Span("kv", 0, 40, (4, 6, 2)), Span("aux", 0, 0, (3,))]
    sender.submit(spans, last=True, ready=ALWAYS_READY)
    source.wait_until(lambda: sender.freed, "the last write has settled")
    finish(source, target, sender, receiver)
    assert [(f.room, f.role, f.tag) for f in source.manager.take_freed()] == [(room, "source", ("request", 7))]
    (ended,) = source.manager.take_finished()
    assert (ended.tag, ended.bytes, ended.error) == (("request", 7), sender.bytes, None)
    assert ended.handoff_seconds == sender.handoff_seconds > 0
    assert [f.tag for f in target.manager.take_freed()] == [f.tag for f in target.manager.take_finished()] == ["theirs"]
    assert source.manager.take_freed() == []


def test_an_engine_that_takes_what_has_finished_need_not_take_what_is_freed(make_rank: MakeRank) -> None:
    """What it had not taken was kept for ever."""
    source, target = make_rank("prefill", fill=1), make_rank("decode")
    for _ in range(3):
        sender, receiver = begin(source, target)
        sender.submit([Span("kv", 0, 40, (4, 6, 2)), Span("aux", 0, 0, (3,))], last=True, ready=ALWAYS_READY)
        finish(source, target, sender, receiver)
        for rank in (source, target):
            assert len(rank.manager.take_finished()) == 1
            assert rank.manager.sizes()["freed_untold"] == 0
            assert rank.manager.take_freed() == []


def test_a_receiver_agrees_before_anything_is_published(make_rank: MakeRank) -> None:
    source, target = make_rank("prefill"), make_rank("decode")
    receiver = target.manager.receiver(next(ROOMS), [source.manager.address])
    target.wait_until(lambda: receiver.agreed, "the source has agreed")
    assert (receiver.poll(), receiver.leased) == (KVPoll.Bootstrapping, False)


def test_a_room_is_declined_whatever_its_prompt_is(make_rank: MakeRank) -> None:
    source, target = make_rank("prefill", fill=1), make_rank("decode")
    room = next(ROOMS)
    sender = source.manager.sender(room)
    sender.submit([Span("kv", 0, 40, (4, 6, 2)), Span("aux", 0, 0, (3,))], last=True, ready=ALWAYS_READY)
    receiver = target.manager.decline(room, [source.manager.address], "all of it is cached")
    source.wait_until(lambda: sender.released, "the source hears of it")
    target.wait_until(lambda: receiver.released, "the target has said so")
    for side in (sender, receiver):
        assert isinstance(side.error, DeclinedError)
        assert (side.error.message, side.error.room) == ("all of it is cached", room)
    assert source.manager.counters()["source_declined"] == 1


def test_a_room_that_prefill_must_have_and_has_not_is_refused_at_once(make_rank: MakeRank) -> None:
    source, target = make_rank("prefill"), make_rank("decode")
    receiver = target.manager.receiver(next(ROOMS), [source.manager.address], begun=True)
    receiver.publish([Span("kv", 0, 40, (5, 3, 1)), Span("aux", 0, 0, (2,))], token_count=40)
    target.wait_until(lambda: receiver.released, "it is refused")
    assert "(any more)" in str(receiver.error)


def test_a_lost_peer_is_told_once_and_wakes_the_engine(make_rank: MakeRank) -> None:
    source, target = make_rank("prefill"), make_rank("decode")
    begin(source, target)
    target.manager.take_lost_peers()
    source.manager.close()
    lost: list[PeerLost] = []

    def told() -> bool:
        target.manager.wait(0.1)
        lost.extend(target.manager.take_lost_peers())
        return bool(lost)

    target.wait_until(told, "the peer is lost")
    assert lost[0].instance == source.manager.instance
    assert lost[0].address == source.manager.address


def test_a_wait_ends_with_the_news_or_its_time(make_rank: MakeRank) -> None:
    rank = make_rank("decode")
    assert not rank.manager.wait(0.0)
    rank.manager.wakeup.set()
    assert rank.manager.wait(20.0)
    assert not rank.manager.wait(0.0)


def test_many_rooms_one_after_another_never_hang(make_rank: MakeRank) -> None:
    """Whichever side hears of the room first, both get to the end: the order is left to the threads."""
    source, target = make_rank("prefill", fill=2), make_rank("decode")
    for _ in range(50):
        sender, receiver = begin(source, target)
        sender.submit([Span("kv", 0, 40, (4, 6, 2)), Span("aux", 0, 0, (3,))], last=True, ready=ALWAYS_READY)
        finish(source, target, sender, receiver)
        assert receiver.error is None
    assert [done.error for done in target.manager.take_finished()] == [None] * 50
    assert target.manager.take_finished() == []
    assert source.manager.live_rooms == target.manager.live_rooms == 0


def test_nothing_is_read_before_the_fence(make_rank: MakeRank) -> None:
    source, target = make_rank("prefill", fill=3), make_rank("decode")
    sender, receiver = begin(source, target)
    ready = threading.Event()
    sender.submit([Span("kv", 0, 40, (4, 6, 2)), Span("aux", 0, 0, (3,))], last=True, ready=ready.is_set)
    other_sender, other_receiver = begin(source, target)
    other_sender.submit([Span("kv", 0, 40, (4, 6, 2)), Span("aux", 0, 0, (3,))], last=True, ready=ALWAYS_READY)
    finish(source, target, other_sender, other_receiver)
    target.kv[:] = 0
    source.page(4)[:] = 77
    ready.set()
    finish(source, target, sender, receiver)
    assert (target.page(5) == 77).all()


def test_a_preempted_request_gets_its_units_back_and_is_sent_from_others(make_rank: MakeRank) -> None:
    """A chunk that waits for its fence is forgotten; what has settled stays; the room goes on with other pages."""
    source, target = make_rank("prefill", fill=3), make_rank("decode")
    sender, receiver = begin(source, target)
    assert sender.withdraw(), "nothing was handed over yet"
    source.page(4)[:] = 44
    sender.submit([Span("kv", 0, 16, (4,))], last=False, ready=ALWAYS_READY)
    source.wait_until(lambda: sender.settled, "the first chunk is there")
    sender.submit([Span("kv", 16, 32, (6,))], last=False, ready=lambda: False)
    assert not sender.settled
    assert sender.withdraw()
    source.wait_until(lambda: sender.settled, "nothing reads the pages any more")
    source.page(4)[:] = source.page(6)[:] = 99
    source.page(7)[:] = 77
    sender.submit([Span("kv", 0, 40, (5, 7, 2)), Span("aux", 0, 0, (3,))], last=True, ready=ALWAYS_READY)
    finish(source, target, sender, receiver)
    assert ((target.page(5) == 44).all(), (target.page(3) == 77).all()) == (True, True)
    assert not sender.withdraw(), "it has ended"


def test_nothing_is_submitted_while_what_was_withdrawn_is_read(make_rank: MakeRank) -> None:
    source, target = make_rank("prefill", fill=3), make_rank("decode")
    sender, receiver = begin(source, target)
    driver_stands_still = threading.Event()
    sender.submit([Span("kv", 0, 16, (4,))], last=False, ready=driver_stands_still.wait)
    sender.withdraw()
    with pytest.raises(LocalProtocolError, match="still reads what was withdrawn"):
        sender.submit([Span("kv", 0, 16, (4,))], last=False, ready=ALWAYS_READY)
    driver_stands_still.set()
    source.wait_until(lambda: sender.settled, "nothing reads the page any more")
    sender.submit([Span("kv", 0, 40, (4, 6, 2)), Span("aux", 0, 0, (3,))], last=True, ready=ALWAYS_READY)
    finish(source, target, sender, receiver)


def test_decode_need_not_know_how_long_the_prompt_is(make_rank: MakeRank) -> None:
    source, target = make_rank("prefill", fill=1), make_rank("decode")
    room = next(ROOMS)
    sender, receiver = source.manager.sender(room), target.manager.receiver(room, [source.manager.address])
    receiver.publish([Span("kv", 0, 64, (5, 3, 1, 7)), Span("aux", 0, 0, (2,))], token_count=None)
    assert receiver.token_count == 0
    sender.submit([Span("kv", 0, 40, (4, 6, 2)), Span("aux", 0, 0, (3,))], last=True, ready=ALWAYS_READY)
    finish(source, target, sender, receiver)
    assert (receiver.error, receiver.token_count, receiver.bytes) == (None, 40, sender.bytes)
    np.testing.assert_array_equal(target.page(1), source.page(2))
    assert not target.page(7).any()


def test_memory_goes_and_comes_back_while_the_peers_stay(make_rank: MakeRank) -> None:
    source, target = make_rank("prefill", fill=3), make_rank("decode")
    sender, receiver = begin(source, target)
    with pytest.raises(LocalProtocolError, match="1 rooms are live"):
        source.manager.deregister()
    spans = [Span("kv", 0, 40, (4, 6, 2)), Span("aux", 0, 0, (3,))]
    sender.submit(spans, last=True, ready=ALWAYS_READY)
    finish(source, target, sender, receiver)
    for away in (source, target):
        away.manager.deregister()
        away.manager.deregister()
        with pytest.raises(LocalProtocolError, match="call register"):
            away.manager.sender(next(ROOMS))
        away.manager.register()
        target.kv[:] = 0
        sender, receiver = begin(source, target)
        sender.submit(spans, last=True, ready=ALWAYS_READY)
        finish(source, target, sender, receiver)
        np.testing.assert_array_equal(target.page(5), source.page(4))
    away.manager.register()
    source.manager.close()
    for call in (source.manager.deregister, source.manager.register):
        with pytest.raises(LocalProtocolError, match="closed"):
            call()


def test_memory_goes_or_comes_though_the_answer_was_not_waited_for(
    make_rank: MakeRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows then whether it has gone: nothing begins before it is back, and asking again is harmless."""
    monkeypatch.setattr("kvbaton.runtime.driver.ASK_SECONDS", 0.05)
    source, target = make_rank("prefill", fill=3), make_rank("decode")
    regions = source.manager.sizes().get("transport_regions")
    for call in (source.manager.deregister, source.manager.register):
        go_on = threading.Event()
        source.manager._driver._commands.ask(go_on.wait)
        with pytest.raises(ExpiredError, match="did not answer"):
            call()
        go_on.set()
        with pytest.raises(LocalProtocolError, match="call register"):
            source.manager.sender(next(ROOMS))
        monkeypatch.setattr("kvbaton.runtime.driver.ASK_SECONDS", 20.0)
        call()
        monkeypatch.setattr("kvbaton.runtime.driver.ASK_SECONDS", 0.05)
    monkeypatch.undo()
    assert source.manager.sizes().get("transport_regions") == regions
    sender, receiver = begin(source, target)
    sender.submit([Span("kv", 0, 40, (4, 6, 2)), Span("aux", 0, 0, (3,))], last=True, ready=ALWAYS_READY)
    finish(source, target, sender, receiver)
    np.testing.assert_array_equal(target.page(5), source.page(4))


def test_an_abort_reaches_the_other_side_with_its_reason(make_rank: MakeRank) -> None:
    source, target = make_rank("prefill", fill=4), make_rank("decode")
    for by_target in (True, False):
        sender, receiver = begin(source, target)
        (receiver if by_target else sender).abort("the client hung up")
        finish(source, target, sender, receiver)
        for side in (sender, receiver):
            assert side.poll() is KVPoll.Failed
            assert isinstance(side.error, AbortedError)
            assert "the client hung up" in str(side.error)
            assert side.error.room == side.room


def test_a_failure_reaches_the_other_side_as_what_it_is(make_rank: MakeRank) -> None:
    source, target = make_rank("prefill", fill=11), make_rank("decode")
    sender, receiver = begin(source, target)
    sender.fail(InternalError("the model failed"))
    finish(source, target, sender, receiver)
    for side in (sender, receiver):
        assert isinstance(side.error, InternalError)
        assert "the model failed" in str(side.error)


def test_a_sender_that_comes_late_learns_why_its_room_failed(make_rank: MakeRank) -> None:
    source, target = make_rank("prefill", fill=5), make_rank("decode")
    begin(source, target)[1].abort("warm up the session")
    room = next(ROOMS)
    receiver = target.manager.receiver(room, [source.manager.address])
    receiver.publish([Span("kv", 0, 40, (5, 3, 1))], token_count=40)
    target.wait_until(lambda: receiver.poll() is KVPoll.WaitingForInput, "the source knows the room")
    receiver.abort("gave up early")
    target.wait_until(lambda: receiver.released, "the abort is drained")
    sender = source.manager.sender(room)
    source.wait_until(lambda: sender.released, "the sender learns of it")
    assert "gave up early" in str(sender.error)


def test_a_failed_room_is_in_quarantine_until_the_source_says_that_nothing_is_under_way(make_rank: MakeRank) -> None:
    source, target = make_rank("prefill", fill=10), make_rank("decode")
    _, receiver = begin(source, target)
    assert target.manager.quarantined_rooms == 0
    target.network.cut(source.manager.address)
    receiver.abort("gave up")
    target.wait_until(lambda: receiver.poll() is KVPoll.Failed, "the failure is told at once")
    assert (target.manager.quarantined_rooms, target.manager.leased_rooms) == (1, 1)
    target.network.heal(source.manager.address)
    target.wait_until(lambda: receiver.released, "the source has answered")
    assert target.manager.quarantined_rooms == 0


@pytest.mark.parametrize("closes", [True, False], ids=["", "its transport cannot be closed"])
@pytest.mark.parametrize("ending", ["the source answers", "the source has died"])
def test_a_closed_manager_keeps_leased_what_may_still_be_written_until_that_is_proven(
    make_rank: MakeRank, ending: str, closes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its transport is destroyed, which ends our own writes and nobody else's: over shared memory the kernel goes on
    copying for a source that was only slow. For ever, it was, once the manager had closed."""
    source, target = make_rank("prefill", fill=10), make_rank("decode")
    _, receiver = begin(source, target)
    target.network.cut(source.manager.address)
    if not closes:
        monkeypatch.setattr(target.transport, "close", partial(_close_and_raise, target.transport.close))
    target.manager.close("made anew")
    assert receiver.poll() is KVPoll.Failed
    assert receiver.leased
    assert (target.manager.leased_rooms, target.manager.quarantined_rooms) == (1, 1)
    with target.network.listen(target.manager.address) as successor:
        assert successor.address == target.manager.address
    if ending == "the source has died":
        source.manager.close()
    target.network.heal(source.manager.address)
    target.wait_until(lambda: receiver.released, "the proof")
    assert target.manager.leased_rooms == 0
    target.manager.close()


@pytest.mark.parametrize("transport", ["nixl"])
def test_a_closed_manager_holds_nothing_of_its_own_writes(make_rank: MakeRank, monkeypatch: pytest.MonkeyPatch) -> None:
    """They end with the agent, whatever became of them."""
    monkeypatch.setattr("kvbaton.runtime.driver.CLOSE_GRACE_SECONDS", 0.2)
    source, target = make_rank("prefill", fill=10), make_rank("decode")
    sender, _ = begin(source, target)
    transport: Any = source.transport
    poll = transport.poll
    transport.poll = lambda handle: poll(handle) and WriteState.PENDING
    sender.submit([Span("kv", 0, 40, (4, 6, 2)), Span("aux", 0, 0, (3,))], last=True, ready=ALWAYS_READY)
    source.wait_until(lambda: sender.poll() is KVPoll.Transferring, "the write is out")
    source.manager.close()
    assert sender.released
    assert source.manager.leased_rooms == 0


def test_wrong_use_is_refused_where_it_happens(make_rank: MakeRank) -> None:
    source = make_rank("prefill", settings=Settings(rooms=1))
    sender = source.manager.sender(5)
    with pytest.raises(LocalProtocolError, match="room 5 is live already"):
        source.manager.sender(5)
    with pytest.raises(OverloadedError, match="1 rooms are live"):
        source.manager.sender(6)
    with pytest.raises(LayoutError, match="need 3 units"):
        sender.submit([Span("kv", 0, 40, (4, 6))], last=True, ready=ALWAYS_READY)
    with pytest.raises(LayoutError, match=r"outside 0\.\.63"):
        sender.submit([Span("kv", 0, 16, (64,))], last=True, ready=ALWAYS_READY)
    with pytest.raises(LayoutError, match="no pool 'state'"):
        sender.submit([Span("state", 0, 0, (1,))], last=True, ready=ALWAYS_READY)
    with pytest.raises(ConfigError, match="every prefill rank"):
        source.manager.receiver(7, [])
    with pytest.raises(ConfigError, match="outside"):
        source.manager.receiver(-1, ["memory://1"])
    sender.submit([Span("kv", 0, 40, (4, 6, 2)), Span("aux", 0, 0, (3,))], last=True, ready=ALWAYS_READY)
    with pytest.raises(LocalProtocolError, match="the last chunk of room 5 was submitted"):
        sender.submit([Span("kv", 40, 48, (7,))], last=False, ready=ALWAYS_READY)
    receiver = make_rank("decode").manager.receiver(5, [source.manager.address])
    receiver.publish([Span("kv", 0, 40, (5, 3, 1)), Span("aux", 0, 0, (2,))], token_count=40)
    with pytest.raises(LocalProtocolError, match="units were published for room 5 already"):
        receiver.publish([Span("kv", 0, 40, (5, 3, 1)), Span("aux", 0, 0, (2,))], token_count=40)
    source.manager.close()
    with pytest.raises(LocalProtocolError, match="closed"):
        source.manager.sender(8)
    sender.abort("a closed manager has ended every room: nothing to do")


def test_closing_fails_what_is_live_and_tells_the_peer(make_rank: MakeRank) -> None:
    source, target = make_rank("prefill", fill=6), make_rank("decode")
    sender, receiver = begin(source, target)
    source.manager.close()
    target.wait_until(lambda: receiver.released, "the target hears of it")
    assert sender.poll() is receiver.poll() is KVPoll.Failed
    assert "closing" in str(receiver.error) or "closed" in str(receiver.error)


def test_a_source_that_nobody_listens_for_is_named(make_rank: MakeRank) -> None:
    target = make_rank("decode")
    receiver = target.manager.receiver(9, ["memory://nobody"])
    target.wait_until(lambda: receiver.released, "the dial is refused")
    assert "nobody listens at memory://nobody" in str(receiver.error)


def test_a_finished_room_leaves_a_trace_and_no_lease(make_rank: MakeRank) -> None:
    source, target = make_rank("prefill", fill=7), make_rank("decode")
    sender, receiver = begin(source, target)
    sender.submit([Span("kv", 0, 40, (4, 6, 2)), Span("aux", 0, 0, (3,))], last=True, ready=ALWAYS_READY)
    finish(source, target, sender, receiver)
    assert source.manager.trace(sender.room)[-1].endswith("closed")
    assert target.manager.leased_rooms == 0


def test_a_timeline_says_how_long_ago_and_what_is_awaited(make_rank: MakeRank) -> None:
    source, target = make_rank("prefill", fill=8), make_rank("decode")
    sender, receiver = begin(source, target)
    moments = source.manager.timeline(sender.room)
    ages = [moment.seconds_ago for moment in moments]
    assert ages == sorted(ages, reverse=True)
    assert moments[-1].seconds_ago == 0.0
    assert moments[-1].text.startswith("now WaitingForInput: ")
    sender.submit([Span("kv", 0, 40, (4, 6, 2)), Span("aux", 0, 0, (3,))], last=True, ready=ALWAYS_READY)
    finish(source, target, sender, receiver)
    target.manager.close()
    assert [m for m in target.manager.timeline(sender.room) if m.text.startswith("now")] == []
    assert source.manager.timeline(12345) == []


def test_tables_are_empty_again_when_the_last_room_is_over(make_rank: MakeRank) -> None:
    source, target = make_rank("prefill", fill=9), make_rank("decode")
    for _ in range(3):
        sender, receiver = begin(source, target)
        sender.submit([Span("kv", 0, 40, (4, 6, 2)), Span("aux", 0, 0, (3,))], last=True, ready=ALWAYS_READY)
        finish(source, target, sender, receiver)
    for rank in (source, target):
        sizes = rank.manager.sizes()
        assert (sizes["tombstones"], sizes["stories"], sizes["sessions"]) == (3, 3, 1)
        busy = ("sides", "rooms", "homes", "transfers", "writes", "writes_in_flight", "commands", "peers_posting")
        assert {name: sizes[name] for name in busy} == dict.fromkeys(busy, 0)


def a_manager(layout: CacheLayout, transport: str, links: Links) -> KVManager:
    instance = new_instance()
    return KVManager(layout, make_transport(transport, instance), links, instance=instance, group="late")


def test_a_manager_that_was_never_started_closes_and_ends_its_rooms(make_rank: MakeRank, transport: str) -> None:
    rank, network = make_rank("decode"), Network()
    manager = a_manager(rank.layout, transport, network.listen())
    sender = manager.sender(7)
    manager.close()
    manager.close()
    assert sender.poll() is KVPoll.Failed
    assert sender.released
    with pytest.raises(LocalProtocolError, match="closed"):
        manager.start()


def test_a_manager_that_cannot_be_made_closes_what_it_was_given(
    make_rank: MakeRank, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = make_rank("decode")
    instance = new_instance()
    data, links = make_transport(transport, instance), rank.network.listen()
    closed: list[object] = []
    for thing in (data, links):
        monkeypatch.setattr(thing, "close", partial(_close_and_note, thing.close, thing, closed))
    with pytest.raises(LayoutError):
        KVManager(CacheLayout("model", (), rank.layout.pools), data, links, instance=instance, group="late")
    assert closed == [data, links]


def test_a_manager_that_cannot_start_closes_what_it_was_given(
    make_rank: MakeRank, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = make_rank("decode")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        registry = Membership(f"127.0.0.1:{taken.getsockname()[1]}", serve=True)
        instance = new_instance()
        data, links = make_transport(transport, instance), rank.network.listen()
        closed: list[object] = []
        for thing in (data, links):
            monkeypatch.setattr(thing, "close", partial(_close_and_note, thing.close, thing, closed))
        manager = KVManager(rank.layout, data, links, instance=instance, group="late", registry=registry)
        with pytest.raises(ConfigError, match="in use"), manager:
            pytest.fail("it has started")
    assert closed == [data, links]


def _close_and_raise(close: Callable[[], None]) -> None:
    close()
    raise TransportError("the plane says that it cannot")


def _close_and_note(close: Callable[[], None], thing: object, closed: list[object]) -> None:
    close()
    closed.append(thing)


@pytest.mark.parametrize("error", [ValueError("no such room"), TimeoutError("mine")], ids=["any", "time-out"])
def test_a_question_that_raises_is_answered_with_what_it_raised(
    make_rank: MakeRank, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = make_rank("decode")

    def broken(_room: int) -> list[object]:
        raise error

    monkeypatch.setattr(rank.manager._core, "trace", broken)
    with pytest.raises(type(error), match=str(error)):
        rank.manager.timeline(7)
    assert "driver_errors" not in rank.manager.counters()

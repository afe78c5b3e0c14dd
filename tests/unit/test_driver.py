"""A driver thread that meets what nobody foresaw: rooms end by name, memory comes back, the thread goes on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
from ranks import ROOMS, MakeRank, RankHarness, begin, finish

from kvbaton.control.base import Arrived, Changed, LinkId
from kvbaton.control.memory import Network
from kvbaton.errors import ExpiredError
from kvbaton.manager import ALWAYS_READY, KVPoll, Span
from kvbaton.protocol.messages import Open, decode
from kvbaton.protocol.settings import Settings

WHOLE = [Span("kv", 0, 40, (4, 6, 2)), Span("aux", 0, 0, (3,))]


def breaking(thing: object, name: str, patch: pytest.MonkeyPatch, *, times: int) -> Callable[[], int]:
    """``thing.name`` raises what no contract mentions, ``times`` times; gives how often it has."""
    real, calls, raised = getattr(thing, name), count(1), []

    def broken(*arguments: Any, **named: Any) -> Any:
        if next(calls) <= times:
            raised.append(1)
            raise RuntimeError(f"{name} fell over")
        return real(*arguments, **named)

    patch.setattr(thing, name, broken)
    return lambda: len(raised)


def expect_a_room_to_go_through(source: RankHarness, target: RankHarness) -> None:
    sender, receiver = begin(source, target)
    sender.submit(WHOLE, last=True, ready=ALWAYS_READY)
    finish(source, target, sender, receiver)
    assert (sender.error, receiver.error) == (None, None)


@pytest.mark.parametrize("name", ["connect", "prepare"])
def test_a_peer_that_cannot_be_prepared_is_refused_by_name(
    make_rank: MakeRank, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    source, target = make_rank("prefill", fill=1), make_rank("decode")
    raised = breaking(source.transport, name, monkeypatch, times=1)
    sender = source.manager.sender(77)
    receiver = target.manager.receiver(77, [source.manager.address])
    receiver.publish([Span("kv", 0, 40, (5, 3, 1)), Span("aux", 0, 0, (2,))], token_count=40)
    target.wait_until(lambda: receiver.released, "the receiver ends")
    assert raised() == 1
    assert f"preparing a peer failed: {name} fell over" in str(receiver.error)
    sender.abort("nobody comes")
    expect_a_room_to_go_through(source, target)


@pytest.mark.parametrize("name", ["post", "poll"])
def test_a_write_that_falls_over_ends_its_room_and_no_other(
    make_rank: MakeRank, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    source, target = make_rank("prefill", fill=1), make_rank("decode")
    sender, receiver = begin(source, target)
    raised = breaking(source.transport, name, monkeypatch, times=1)
    sender.submit(WHOLE, last=True, ready=ALWAYS_READY)
    finish(source, target, sender, receiver)
    assert raised() == 1
    assert (sender.poll(), receiver.poll()) == (KVPoll.Failed, KVPoll.Failed)
    assert source.manager.counters()["driver_errors"] == 1
    if name == "post":
        assert "posting a write failed: post fell over" in str(sender.error)
    expect_a_room_to_go_through(source, target)
    assert source.manager.leased_rooms == target.manager.leased_rooms == 0


def test_a_fence_that_falls_over_is_tried_again_until_the_pages_are_free(
    make_rank: MakeRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvbaton.runtime.dataplane.FENCE_AGAIN_SECONDS", 0.02)
    source, target = make_rank("prefill", fill=1), make_rank("decode")
    sender, receiver = begin(source, target)
    breaking(source.transport, "post", monkeypatch, times=1)
    fences = breaking(source.transport, "fence", monkeypatch, times=3)
    sender.submit(WHOLE, last=True, ready=ALWAYS_READY)
    finish(source, target, sender, receiver)
    assert fences() == 3
    assert source.manager.sizes()["peers_to_fence"] == 0
    expect_a_room_to_go_through(source, target)


@pytest.mark.parametrize("transport", ["memory"])
def test_deadlines_pass_where_no_message_can_be_read(
    make_rank: MakeRank, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And what fails in every turn does not fill the log."""
    settings = Settings(waiting_timeout=1.0, heartbeat_interval=100.0)
    source, target = make_rank("prefill", fill=1), make_rank("decode", settings=settings)
    _, receiver = begin(source, target)
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        raised = breaking(target.manager._links, "receive", patch, times=1_000_000)
        breaking(target.manager._links, "wait", patch, times=1_000_000)
        target.manager._links.wake()
        target.wait_until(lambda: receiver.poll() is KVPoll.Failed, "the deadline")
        assert isinstance(receiver.error, ExpiredError)
        target.wait_until(lambda: raised() >= 100, "many turns")
    complaints = [record for record in caplog.records if "the driver goes on" in record.message]
    assert 2 <= len(complaints) <= 2 * raised().bit_length()


def test_what_cannot_be_said_to_one_peer_is_said_to_the_others(
    make_rank: MakeRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two decode ranks open rooms in one turn of the prefill rank, and the link to the first is broken."""
    patient = Settings(retry_seconds=60.0, retry_most_seconds=60.0)
    source = make_rank("prefill", fill=1)
    targets = [make_rank(name, settings=patient) for name in ("decode", "another")]
    for target in targets:
        expect_a_room_to_go_through(source, target)
    links = source.manager._links
    receive, send = links.receive, links.send
    opens: list[Arrived] = []

    def receive_both() -> list[Arrived | Changed]:
        opens.extend(item for item in receive() if isinstance(item, Arrived) and isinstance(decode(item.payload), Open))
        return list(opens) if len(opens) == 2 else []

    def send_but_to_the_first(link: LinkId, *payloads: bytes) -> bool:
        if link == opens[0].link:
            raise RuntimeError("the link fell over")
        return send(link, *payloads)

    monkeypatch.setattr(links, "receive", receive_both)
    monkeypatch.setattr(links, "send", send_but_to_the_first)
    receivers = []
    for target in targets:
        receiver = target.manager.receiver(next(ROOMS), [source.manager.address])
        receiver.publish([Span("kv", 0, 40, (5, 3, 1)), Span("aux", 0, 0, (2,))], token_count=40)
        receivers.append(receiver)
    targets[1].wait_until(lambda: len(opens) == 2, "both have opened a room")
    told = next(number for number, receiver in enumerate(receivers) if receiver.room == second(opens))
    targets[told].wait_until(lambda: receivers[told].poll() is KVPoll.WaitingForInput, "the second is told")
    monkeypatch.undo()


def second(opens: list[Arrived]) -> int:
    """The room of the second Open."""
    message = decode(opens[1].payload)
    assert isinstance(message, Open)
    return message.key.room


def at_peace() -> tuple[list[RankHarness], list[float]]:
    """A prefill and a decode rank without threads that know each other, and the time of both."""
    network, now = Network(), [0.0]
    ranks = [RankHarness(name, network, "memory", None, None, clock=lambda: now[0]) for name in ("prefill", "decode")]
    sender = ranks[0].manager.sender(1)
    ranks[1].manager.receiver(1, [ranks[0].manager.address])
    for _ in range(20):
        for rank in ranks:
            rank.manager._driver.turn()
    sender.abort("only to get to know each other")
    return ranks, now


def flood(rank: RankHarness, messages: int) -> None:
    """A stranger says what makes no sense, more than one turn reads."""
    with rank.network.listen() as stranger:
        link = stranger.dial(rank.manager.address)
        assert all(stranger.send(link, b"nonsense") for _ in range(messages))


def test_a_rank_that_stood_still_reads_all_its_messages_before_it_takes_anybody_for_dead() -> None:
    (source, target), now = at_peace()
    flood(source, 600)
    now[0] += 6.0
    target.manager._driver.turn()  # pings
    now[0] += 6.0
    for _ in range(4):
        source.manager._driver.turn()
    assert source.manager._core.counters["messages_malformed"] == 600
    assert source.manager.take_lost_peers() == []


def test_what_came_while_a_turn_was_long_is_read_before_anybody_is_taken_for_dead() -> None:
    """Ten thousand commands at once may take longer than a peer may be silent."""
    (source, target), now = at_peace()

    def long_work() -> bool:
        now[0] += 6.0
        target.manager._driver.turn()  # pings
        now[0] += 6.0
        return True

    source.manager.sender(2).submit(WHOLE, last=True, ready=long_work)
    source.manager._driver.turn()
    assert now[0] == 12.0
    assert source.manager.take_lost_peers() == []


def test_a_flood_does_not_stop_the_clock() -> None:
    (source, target), now = at_peace()
    flood(source, 600)
    for _ in range(20):
        flood(source, 256)
        now[0] += 1.0
        source.manager._driver.turn()
    assert [lost.instance for lost in source.manager.take_lost_peers()] == [target.manager.instance]


def test_a_flood_leaves_half_of_the_interpreter_to_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each turn that could not read everything is followed by a pause as long as it took; the last one is not."""
    (source, _), now = at_peace()
    driver: Any = source.manager._driver
    flood(source, 600)  # three turns
    real, pauses = driver.turn, []

    def turn() -> None:
        real()
        now[0] += 0.25

    monkeypatch.setattr(driver, "turn", turn)
    monkeypatch.setattr(driver, "finished", lambda: source.manager._core.counters["messages_malformed"] == 600)
    monkeypatch.setattr("kvbaton.runtime.driver.time.sleep", pauses.append)
    driver._run()
    assert [pause for pause in pauses if pause] == [0.25, 0.25]


def a_fence_that_raises() -> bool:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize("others", [0, 1], ids=["alone", "beside a room that waits"])
@pytest.mark.parametrize("last", [False, True], ids=["first chunk", "last chunk"])
def test_a_ready_fence_that_raises_ends_its_room_at_once_and_no_other(
    make_rank: MakeRank, others: int, last: bool
) -> None:
    source, target = make_rank("prefill", fill=1), make_rank("decode")
    opened = threading.Event()
    waiting = [begin(source, target) for _ in range(others)]
    for sender, _ in waiting:
        sender.submit(WHOLE, last=True, ready=opened.is_set)
    sender, receiver = begin(source, target)
    sender.submit(WHOLE if last else [Span("kv", 0, 32, (4, 6))], last=last, ready=a_fence_that_raises)
    finish(source, target, sender, receiver)
    assert "CUDA error: an illegal memory access" in str(sender.error)
    assert receiver.poll() is KVPoll.Failed
    expect_a_room_to_go_through(source, target)
    opened.set()
    for sender, receiver in waiting:
        finish(source, target, sender, receiver)
        assert (sender.error, receiver.error) == (None, None)
    assert source.manager.counters()["fences_raised"] == 1
    assert source.manager.leased_rooms == target.manager.leased_rooms == 0


@pytest.mark.parametrize("transport", ["nixl"])
def test_peers_write_to_a_rank_whose_agent_was_replaced(make_rank: MakeRank) -> None:
    """A fence may cost the agent. Peers that knew the old one got NIXL_ERR_BACKEND for ever after."""
    source, target = make_rank("prefill", fill=1), make_rank("both")
    expect_a_room_to_go_through(source, target)
    transport: Any = target.transport
    target.manager._driver.ask(lambda _core, _now: transport._replace_agent())
    target.wait_until(lambda: target.manager.counters().get("agents_replaced") == 1, "the core is told")
    expect_a_room_to_go_through(source, target)
    assert (target.page(5) == source.page(4)).all()


def test_closing_a_rank_whose_transport_hangs_says_so_and_frees_nothing(
    make_rank: MakeRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a call of UCX towards a host that has vanished may: whoever closes must neither hang nor take memory back."""
    monkeypatch.setattr("kvbaton.runtime.driver.CLOSE_SECONDS", 0.05)
    rank = make_rank("prefill")
    goes_on, close = threading.Event(), rank.transport.close

    def hang() -> None:
        goes_on.wait()
        close()

    monkeypatch.setattr(rank.transport, "close", hang)
    with pytest.raises(ExpiredError, match=r"has not come back from a call within 0.05 s of closing"):
        rank.manager.close()
    goes_on.set()
    monkeypatch.undo()
    rank.manager.close()


def test_what_the_engine_has_posted_goes_before_what_has_come() -> None:
    """Prefill begins a room, answers, and decode asks for it as one that prefill must have: all before the driver's
    next turn, which found the question first and said that there was no such room."""
    (prefill, decode), _ = at_peace()
    receiver = decode.manager.receiver(2, [prefill.manager.address], begun=True)
    receiver.publish(WHOLE, token_count=40)
    decode.manager._driver.turn()
    sender = prefill.manager.sender(2)
    prefill.manager._driver.turn()
    assert sender.error is None, sender.error
    assert sender.poll() is KVPoll.WaitingForInput

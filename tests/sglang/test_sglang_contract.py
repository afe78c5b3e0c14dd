"""The calls that SGLang makes, as they were recorded from real processes, replayed on our halves: each poll says what
it said there, in the same places."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
from sglang_stand_in import StandIn, group

from kvbaton import ALWAYS_READY
from kvbaton.engines.sglang.receiving import Receiving
from kvbaton.engines.sglang.sending import Sending
from lab.sglang.contract import KEPT


@pytest.fixture(scope="module")
def record() -> Any:
    return msgspec.json.decode(KEPT.read_bytes())


@pytest.fixture
def pair() -> Iterator[tuple[StandIn, StandIn]]:
    sides = group(1)[0], group(1, prefill=False)[0]
    yield sides
    for side in sides:
        side.close()


def sends(side: StandIn, room: int, calls: list[Any]) -> Iterator[bool]:
    """Makes the calls one by one; false: a poll does not say yet what it has to."""
    sending = Sending(side.manager, room, side.cache)
    sent = 0
    for name, carried in calls:
        match name:
            case "pop_decode_prefix_len":
                assert sending.prefix == carried[0]
            case "init":
                sending.begin(carried[0], 1)
            case "send":
                count, states = carried
                pages = np.arange(sent, sent + count, dtype=np.int32)
                sent += count
                sending.send(pages, states, ALWAYS_READY)
            case "poll":
                while sending.poll() != carried[0]:
                    yield False
            case "abort" | "failure_exception":
                sending.give_up(name)
                assert name == "abort" or sending.error is not None
            case _:
                assert name in ("__init__", "clear")
        yield True


def receives(side: StandIn, room: int, calls: list[Any], address: str) -> Iterator[bool]:
    receiving = Receiving(side.manager, room, side.cache)
    for name, carried in calls:
        match name:
            case "init":
                receiving.begin([address])
            case "send_metadata":
                receiving.publish(np.arange(carried[0], dtype=np.int32), 1, carried[1], carried[2])
            case "poll":
                while receiving.poll() != carried[0]:
                    yield False
            case "abort" | "ensure_abort_notified" | "clear" | "failure_exception":
                receiving.give_up(name)
            case _:
                assert name == "__init__"
        yield True
    while not receiving.drained:
        yield False


def play(*halves: Iterator[bool]) -> None:
    """All of them to their ends, turn by turn."""
    left, until = list(halves), time.monotonic() + 10
    while left:
        assert time.monotonic() < until, "a poll never says what SGLang heard"
        for half in list(left):
            if next(half, None) is None:
                left.remove(half)
        time.sleep(0.0005)


def test_a_hand_off(record: Any, pair: tuple[StandIn, StandIn]) -> None:
    prefill, decode = pair
    play(
        sends(prefill, 1, record["prefill"][0]),
        receives(decode, 1, record["decode"][0], prefill.manager.address),
    )


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_half_a_request_whose_client_goes_away(record: Any, pair: tuple[StandIn, StandIn], role: str) -> None:
    prefill, decode = pair
    if role == "prefill":
        play(sends(prefill, 2, record["prefill"][1]))
    else:
        play(receives(decode, 3, record["decode"][1], prefill.manager.address))


def test_what_the_backend_builds_on(record: Any) -> None:
    """Orders of calls that its code takes for granted."""
    sender = [name for name, _ in record["prefill"][0]]
    assert sender.index("pop_decode_prefix_len") < sender.index("init") < sender.index("send")
    chunks = [carried for name, carried in record["prefill"][0] if name == "send"]
    assert [states for _, states in chunks] == [None] * (len(chunks) - 1) + [[]]
    announced = next(carried[0] for name, carried in record["prefill"][0] if name == "init")
    assert sum(pages for pages, _ in chunks) == announced
    receiver = [name for name, _ in record["decode"][0]]
    assert receiver.index("init") < receiver.index("send_metadata")
    waiting = record["decode"][0].index(["poll", [2]])
    assert waiting < receiver.index("send_metadata")

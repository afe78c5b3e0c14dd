"""Bytes of every message of protocol version 1. They may only change together with the version."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbaton.errors import MessageError
from kvbaton.layout import CacheLayout, Coordinates, Region, Staging, kv_pool
from kvbaton.plan.pair import PartId
from kvbaton.protocol.messages import (
    PROTOCOL_VERSION,
    Abort,
    AnyMessage,
    Close,
    Done,
    Drained,
    Failed,
    Forgotten,
    Goodbye,
    Grant,
    Hello,
    Message,
    Open,
    Opened,
    PartBytes,
    Ping,
    Pong,
    Query,
    StagingGrant,
    TransferKey,
    UnknownPeer,
    Verdict,
    decode,
    encode,
)

FILE = Path(__file__).parent / f"version_{PROTOCOL_VERSION}.json"
KEY = TransferKey(7, 3, 1)
#: Fields that came after the version was first released.
ADDED = {"machine"}
PART = PartId("kv", 0, 2, 0, 4)
HEAD = {"sender": "ours", "receiver": "theirs"}

LAYOUT = CacheLayout(
    "model",
    (Region(4096, 1024), Region(8192, 512)),
    (kv_pool((0, 1), pages=2, page_size=4, heads=4, head_bytes=8, dtype="uint8"),),
    Staging(1, 256, 2),
)
MESSAGES: dict[str, AnyMessage] = {
    "hello": Hello(
        sender="ours",
        version=1,
        group="g",
        group_size=2,
        coordinates=Coordinates(0, 1, 0, 1),
        layout=LAYOUT,
        agent_metadata=b"\x00\x01",
        transport="nixl",
        answers="theirs",
    ),
    "verdict": Verdict(
        **HEAD, compatible=False, plan_digest="00", code="c", field="f", ours="o", theirs="t", reason="r"
    ),
    "ping": Ping(**HEAD),
    "pong": Pong(**HEAD),
    "stranger": UnknownPeer(**HEAD),
    "goodbye": Goodbye(**HEAD, reason="r"),
    "open": Open(
        **HEAD,
        key=KEY,
        token_count=9,
        grants=(Grant("kv", 0, 9, (1, 0, 5)),),
        parts=(PartBytes(PART, 768),),
        ttl_seconds=300.0,
        staging=(StagingGrant(PART, (1, 2)),),
    ),
    "opened": Opened(**HEAD, key=KEY),
    "done": Done(**HEAD, key=KEY, parts=(PartBytes(PART, 768),), token_count=9, exposed_seconds=0.5),
    "close": Close(**HEAD, key=KEY, success=True),
    "failed": Failed(**HEAD, key=KEY, code="aborted", reason="r", drained=True, fenced=True),
    "abort": Abort(**HEAD, key=KEY, code="aborted", reason="r"),
    "drained": Drained(**HEAD, key=KEY, fenced=False),
    "query": Query(**HEAD, key=KEY),
    "forgotten": Forgotten(**HEAD, key=KEY),
}


def golden() -> dict[str, str]:
    found: dict[str, str] = json.loads(FILE.read_text())
    return found


def test_every_message_is_here() -> None:
    def leaves(kind: type) -> set[str]:
        below = kind.__subclasses__()
        return set().union(*map(leaves, below)) if below else {kind.__struct_config__.tag}  # type: ignore[attr-defined]

    assert leaves(Message) == set(MESSAGES) == set(golden())


@pytest.mark.parametrize("name", MESSAGES)
def test_the_bytes_are_those_of_the_version(name: str) -> None:
    assert encode(MESSAGES[name]).hex() == golden()[name], (
        f"the bytes of {name!r} changed. If a field was added with a default, old bytes must still decode: put the new "
        f"bytes into {FILE.name} and keep the old ones as a test; if a meaning changed, raise PROTOCOL_VERSION"
    )


@pytest.mark.parametrize("name", MESSAGES)
def test_the_bytes_decode_to_an_equal_message(name: str) -> None:
    assert decode(bytes.fromhex(golden()[name])) == MESSAGES[name]


@pytest.mark.parametrize("name", MESSAGES)
def test_fields_that_older_ranks_do_not_know_may_be_missing(name: str) -> None:
    fields = msgspec.msgpack.decode(bytes.fromhex(golden()[name]))
    older = msgspec.msgpack.encode({key: value for key, value in fields.items() if key not in ADDED})
    assert decode(older) == MESSAGES[name]


@pytest.mark.parametrize("name", MESSAGES)
def test_fields_from_the_future_are_skipped(name: str) -> None:
    fields = msgspec.msgpack.decode(bytes.fromhex(golden()[name]))
    assert decode(msgspec.msgpack.encode(fields | {"from_the_future": [1, {"a": None}]})) == MESSAGES[name]


@pytest.mark.parametrize(
    "wrong",
    [
        {"type": "no such message", "sender": "ours"},
        {"type": "ping", "sender": 5, "receiver": "theirs"},
        {"type": "ping", "sender": "ours"},
        {"type": "ping", "sender": "", "receiver": "theirs"},
        {"type": "query", "sender": "ours", "receiver": "theirs", "key": [-1, 0, 1]},
        {"type": "query", "sender": "ours", "receiver": "theirs", "key": [1 << 63, 0, 1]},
        {"sender": "ours"},
        [1, 2, 3],
        None,
    ],
)
def test_what_is_no_message_is_refused(wrong: object) -> None:
    with pytest.raises(MessageError):
        decode(msgspec.msgpack.encode(wrong))


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_random_bytes_raise_nothing_else(payload: bytes) -> None:
    with contextlib.suppress(MessageError):
        decode(payload)


@given(name=st.sampled_from(sorted(MESSAGES)), at=st.integers(0, 10_000), byte=st.integers(0, 255), cut=st.booleans())
@settings(max_examples=300, deadline=None)
def test_damaged_messages_raise_nothing_else(name: str, at: int, byte: int, cut: bool) -> None:
    payload = bytearray(encode(MESSAGES[name]))
    at %= len(payload)
    payload[at] = byte
    with contextlib.suppress(MessageError):
        decode(bytes(payload[: at + 1] if cut else payload))

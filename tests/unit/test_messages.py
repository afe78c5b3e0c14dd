"""The codec: bounds on both sides, and only messages come out. Bytes themselves are in tests/golden."""

from __future__ import annotations

import msgspec
import pytest

from kvbaton.errors import MessageError
from kvbaton.protocol.messages import (
    MAX_GRANTS,
    MAX_MESSAGE_BYTES,
    MAX_TEXT,
    MAX_UNITS_PER_GRANT,
    Abort,
    Close,
    Goodbye,
    Grant,
    Open,
    Ping,
    TransferKey,
    clip,
    decode,
    encode,
)

KEY = TransferKey(7, 3, 2)
HEAD = {"sender": "ours", "receiver": "theirs"}


def open_with(*grants: Grant, **fields: object) -> Open:
    settings = {"token_count": 1, "parts": (), "ttl_seconds": 1.0} | fields
    return Open(**HEAD, key=KEY, grants=grants, **settings)  # type: ignore[arg-type]


def test_a_message_survives_the_wire() -> None:
    message = open_with(Grant("kv", 0, 9, (4, 0, 2)))
    assert decode(encode(message)) == message


def test_a_key_is_written_for_people() -> None:
    assert str(KEY) == "7/3.2"


def test_what_is_too_large_is_neither_sent_nor_read() -> None:
    units = tuple(range(1 << 20, 1 << 21))
    with pytest.raises(MessageError, match=r"Open of \d+ bytes exceeds .* use larger ones"):
        encode(open_with(Grant("a", 0, 1, units), Grant("b", 0, 1, units)))
    with pytest.raises(MessageError, match="exceeds the limit"):
        decode(b"\x00" * (MAX_MESSAGE_BYTES + 1))


@pytest.mark.parametrize(
    "message",
    [
        Ping(sender="", receiver="theirs"),
        Ping(sender="x" * 65, receiver="theirs"),
        Goodbye(**HEAD, reason="x" * (MAX_TEXT + 1)),
        Close(**HEAD, key=TransferKey(-1, 1), success=True),
        Close(**HEAD, key=TransferKey(1 << 63, 1), success=True),
        open_with(*(Grant(str(i), 0, 0, ()) for i in range(MAX_GRANTS + 1))),
        open_with(Grant("kv", 0, 1, (0,) * (MAX_UNITS_PER_GRANT + 1))),
        open_with(Grant("kv", 0, 1, (-1,))),
        open_with(Grant("kv", 0, 1, (1 << 31,))),
        open_with(token_count=-1),
        open_with(ttl_seconds=-1.0),
        open_with(ttl_seconds=86_401.0),
    ],
    ids=lambda message: type(message).__name__,
)
def test_values_out_of_bounds_are_refused_by_the_receiver(message: Open) -> None:
    with pytest.raises(MessageError, match="not a message of protocol version 1"):
        decode(msgspec.msgpack.encode(message))


@pytest.mark.parametrize("payload", [b"", b"\xff", b"\xc1", b"\x90", b"\x80", b"\x91" * 4096, b"\xd9\xff\xff"])
def test_bytes_that_are_no_message_are_refused(payload: bytes) -> None:
    with pytest.raises(MessageError):
        decode(payload)


def test_a_long_reason_is_clipped_to_what_a_message_carries() -> None:
    assert clip("x" * MAX_TEXT) == "x" * MAX_TEXT
    clipped = clip("x" * (MAX_TEXT + 1))
    assert len(clipped) == MAX_TEXT
    assert clipped.endswith("…")
    message = Abort(**HEAD, key=KEY, code="c", reason=clipped)
    assert decode(encode(message)) == message

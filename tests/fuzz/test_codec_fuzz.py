"""The codec: any bytes are a message or a MessageError, and what is a message comes back as it was."""

from __future__ import annotations

from random import Random

import pytest
from fuzz.siege import Siege
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbaton.errors import MessageError
from kvbaton.protocol.messages import MAX_MESSAGE_BYTES, decode, encode

RANDOMS = st.randoms(use_true_random=False)
FUZZ = settings.get_profile("fuzz")
MANY = settings(FUZZ, max_examples=8 * FUZZ.max_examples)
SIEGE = Siege()


def either(payload: bytes) -> None:
    try:
        message = decode(payload)
    except MessageError:
        return
    assert decode(encode(message)) == message


@given(st.binary(max_size=200))
@MANY
def test_any_bytes(payload: bytes) -> None:
    either(payload)


@given(RANDOMS)
@MANY
def test_a_message_comes_back_as_it_was(random: Random) -> None:
    message = SIEGE.message(random, random.choice(SIEGE.scene.ranks))
    assert decode(encode(message)) == message


@given(RANDOMS, st.binary(min_size=1, max_size=4), st.integers(0, 1 << 30))
@MANY
def test_almost_a_message(random: Random, patch: bytes, position: int) -> None:
    payload = encode(SIEGE.message(random, SIEGE.scene.source))
    at = position % len(payload)
    either(payload[:at] + patch + payload[at + len(patch) :])
    either(payload[:at])
    either(payload + patch)


def test_depth_and_length_are_bounded() -> None:
    for bomb in (
        b"\x91" * 100_000,
        b"\x81\xa4type" * 20_000,
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff" + bytes(9),
        b"\x81\xa4type\xda\xff\xff" + b"x" * 65_535,
    ):
        with pytest.raises(MessageError) as caught:
            decode(bomb)
        assert len(str(caught.value)) < 4096
    with pytest.raises(MessageError, match="exceeds"):
        decode(bytes(MAX_MESSAGE_BYTES + 1))

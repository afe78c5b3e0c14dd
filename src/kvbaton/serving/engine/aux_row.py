"""The aux row: what decode must know about a prompt besides its cache. One fixed little-endian row per request.

::

    offset   0  magic          4 bytes   b"KVBA"
             4  version        u16
             6  flags          u16       none yet
             8  room           u64
            16  prompt digest  u64       over the prompt's token ids: both legs must mean the same prompt
            24  seed           u64       of the request's random sequences, wherever it came from
            32  prompt tokens  u32
            36  choices        u16       first tokens that follow, 1 to MAX_CHOICES
            38  alternatives   u16       alternatives that follow, 0 to MAX_TOP_LOGPROBS
            40  first tokens   MAX_CHOICES of (logprob f64, token u32); unused ones are zero
           232  alternatives   MAX_TOP_LOGPROBS of the same, likeliest first; unused ones are zero
           472  records check  u32       over the records of the prompt's logprobs; 0 where nobody asked for them
           476  zeros
           508  crc32          u32       over bytes 0..508

All choices draw their first token from one distribution, so that one list of alternatives serves them all and the row
is small. A version has one size; the size is part of the layout, and so two versions are told apart at the handshake.

Rules: a row is served only if everything in it is what decode expects of this room; a torn, stale or foreign row is
an error and never a token. This file must not know of pools, torch or peers.
"""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from kvbaton.errors import LocalProtocolError, RemoteProtocolError
from kvbaton.serving.engine.request import MAX_CHOICES, MAX_TOP_LOGPROBS, Alternatives

MAGIC = b"KVBA"
VERSION = 3
ROW_BYTES = 512
_HEAD = struct.Struct("<4sHHQQQIHH")
_ENTRY = struct.Struct("<dI")
_CHECK = struct.Struct("<I")
_CHECK_AT = ROW_BYTES - _CHECK.size
_RECORDS_CHECK_AT = 472
_TOP_AT = _HEAD.size + MAX_CHOICES * _ENTRY.size
_END_AT = _TOP_AT + MAX_TOP_LOGPROBS * _ENTRY.size
assert _END_AT <= _RECORDS_CHECK_AT  # noqa: S101 - the table above


@dataclass(frozen=True, kw_only=True, slots=True)
class AuxRow:
    """The first token of each choice as (token, logprob), and what goes with them. ``seed`` is the one in use, given or
    derived; ``top`` are the likeliest tokens of that place; ``records_check`` is of the prompt's logprobs."""

    room: int
    prompt_digest: int
    prompt_tokens: int
    firsts: Alternatives
    seed: int
    top: Alternatives = ()
    flags: int = 0
    records_check: int = 0


def prompt_digest(tokens: Sequence[int]) -> int:
    """A 64-bit digest of token ids."""
    packed = struct.pack(f"<{len(tokens)}I", *tokens)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


def encode(row: AuxRow) -> bytes:
    """The ROW_BYTES bytes of ``row``. Raises LocalProtocolError for more than a row has room for."""
    if not 1 <= len(row.firsts) <= MAX_CHOICES or len(row.top) > MAX_TOP_LOGPROBS:
        raise LocalProtocolError(
            f"an aux row has room for 1 to {MAX_CHOICES} first tokens and {MAX_TOP_LOGPROBS} alternatives, "
            f"not for {len(row.firsts)} and {len(row.top)}",
            room=row.room,
        )
    data = bytearray(ROW_BYTES)
    _HEAD.pack_into(
        data,
        0,
        MAGIC,
        VERSION,
        row.flags,
        row.room,
        row.prompt_digest,
        row.seed,
        row.prompt_tokens,
        len(row.firsts),
        len(row.top),
    )
    for start, entries in ((_HEAD.size, row.firsts), (_TOP_AT, row.top)):
        for number, (token, logprob) in enumerate(entries):
            _ENTRY.pack_into(data, start + number * _ENTRY.size, logprob, token)
    _CHECK.pack_into(data, _RECORDS_CHECK_AT, row.records_check)
    _CHECK.pack_into(data, _CHECK_AT, zlib.crc32(data[:_CHECK_AT]))
    return bytes(data)


def decode(data: bytes | memoryview, *, room: int, prompt: Sequence[int]) -> AuxRow:
    """Read the row of ``room``. Raises RemoteProtocolError for every row that is not this room's and this prompt's."""
    data = bytes(data)
    if len(data) != ROW_BYTES:
        raise RemoteProtocolError(f"the aux row has {len(data)} bytes, ours has {ROW_BYTES}", room=room)
    if not any(data):
        raise RemoteProtocolError("the hand-off ended but its aux row was never written", room=room)
    magic, version, flags, found, digest, seed, count, choices, alternatives = _HEAD.unpack_from(data)
    (check,) = _CHECK.unpack_from(data, _CHECK_AT)
    if magic != MAGIC or zlib.crc32(data[:_CHECK_AT]) != check:
        raise RemoteProtocolError("the aux row is damaged; its bytes are not those that prefill wrote", room=room)
    if version != VERSION:
        raise RemoteProtocolError(f"the aux row has version {version}, ours is {VERSION}; update one side", room=room)
    if found != room:
        raise RemoteProtocolError(f"the aux row belongs to room {found}", room=room)
    if count != len(prompt):
        raise RemoteProtocolError(f"prefill read a prompt of {count} tokens, decode has {len(prompt)}", room=room)
    if digest != prompt_digest(prompt):
        raise RemoteProtocolError(
            "prefill and decode tokenized different prompts; send both the same request and tokenizer", room=room
        )
    if not 1 <= choices <= MAX_CHOICES or alternatives > MAX_TOP_LOGPROBS:
        raise RemoteProtocolError(
            f"the aux row counts {choices} first tokens and {alternatives} alternatives; "
            f"it has room for {MAX_CHOICES} and {MAX_TOP_LOGPROBS}",
            room=room,
        )
    return AuxRow(
        room=found,
        prompt_digest=digest,
        prompt_tokens=count,
        firsts=_entries(data, _HEAD.size, choices, room),
        top=_entries(data, _TOP_AT, alternatives, room),
        seed=seed,
        flags=flags,
        records_check=_CHECK.unpack_from(data, _RECORDS_CHECK_AT)[0],
    )


def _entries(data: bytes, start: int, count: int, room: int) -> Alternatives:
    found = tuple(_ENTRY.unpack_from(data, start + number * _ENTRY.size) for number in range(count))
    strange = next((logprob for logprob, _ in found if not math.isfinite(logprob)), None)
    if strange is not None:
        raise RemoteProtocolError(f"the aux row has {strange} for a logarithm of a probability", room=room)
    return tuple((token, logprob) for logprob, token in found)

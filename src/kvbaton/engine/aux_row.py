"""The aux row: what decode must know about a prompt besides its cache. One fixed little-endian row per request.

::

    offset  0  magic          4 bytes   b"KVBA"
            4  version        u16
            6  flags          u16       none yet
            8  room           u64
           16  prompt digest  u64       over the prompt's token ids: both legs must mean the same prompt
           24  seed           u64       of the request's random sequence, wherever it came from
           32  logprob        f64       of the first token
           40  prompt tokens  u32
           44  first token    u32
           48  crc32          u32       over bytes 0..48
           52  padding to 64 bytes

Rules: a row is served only if everything in it is what decode expects of this room; a torn, stale or foreign row is
an error and never a token. This file must not know of pools, torch or peers.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from kvbaton.errors import RemoteProtocolError

MAGIC = b"KVBA"
VERSION = 1
ROW_BYTES = 64
_BODY = struct.Struct("<4sHHQQQdII")
_CHECK = struct.Struct("<I")


@dataclass(frozen=True, kw_only=True, slots=True)
class AuxRow:
    """The first token and what goes with it. ``seed`` is the one in use, given or derived."""

    room: int
    prompt_digest: int
    prompt_tokens: int
    first_token: int
    logprob: float
    seed: int
    flags: int = 0


def prompt_digest(tokens: Sequence[int]) -> int:
    """A 64-bit digest of token ids."""
    packed = struct.pack(f"<{len(tokens)}I", *tokens)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


def encode(row: AuxRow) -> bytes:
    """The ROW_BYTES bytes of ``row``."""
    body = _BODY.pack(
        MAGIC,
        VERSION,
        row.flags,
        row.room,
        row.prompt_digest,
        row.seed,
        row.logprob,
        row.prompt_tokens,
        row.first_token,
    )
    return (body + _CHECK.pack(zlib.crc32(body))).ljust(ROW_BYTES, b"\0")


def decode(data: bytes | memoryview, *, room: int, prompt: Sequence[int]) -> AuxRow:
    """Read the row of ``room``. Raises RemoteProtocolError for every row that is not this room's and this prompt's."""
    body = bytes(data[: _BODY.size])
    (check,) = _CHECK.unpack_from(data, _BODY.size)
    magic, version, flags, found, digest, seed, logprob, count, token = _BODY.unpack(body)
    if not any(body):
        raise RemoteProtocolError("the hand-off ended but its aux row was never written", room=room)
    if magic != MAGIC or zlib.crc32(body) != check:
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
    return AuxRow(
        room=found,
        prompt_digest=digest,
        prompt_tokens=count,
        first_token=token,
        logprob=logprob,
        seed=seed,
        flags=flags,
    )

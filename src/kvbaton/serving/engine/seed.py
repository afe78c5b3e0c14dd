"""The seed of a request, and of each of its answers: the same on every machine."""

from __future__ import annotations

import hashlib
import struct

from kvbaton.serving.engine.request import Request

#: A seed is a number of 64 bits.
SEED_MASK = (1 << 64) - 1


def seed_of(request: Request) -> int:
    """The request's seed as 64 bits; one derived from its id where it has none."""
    if request.sampling.seed is not None:
        return request.sampling.seed & SEED_MASK
    return int.from_bytes(hashlib.blake2b(request.request_id.encode(), digest_size=8).digest(), "little")


def seed_of_choice(seed: int, index: int) -> int:
    """The seed of answer number ``index``: the first has the request's own."""
    if index == 0:
        return seed
    packed = struct.pack("<QQ", seed, index)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8, person=b"kvbaton choice").digest(), "little")

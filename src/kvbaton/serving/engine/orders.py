"""What the leader of a group and its followers tell each other: tagged structs, over a pipe.

The leader decides everything and orders it; a follower does it in that order and reports the status of its rooms.
``side`` numbers a sender or receiver for as long as the group lives: rooms may be used again, sides are not.

This file must not know of processes, models or transports.
"""

from __future__ import annotations

from msgspec import Struct

from kvbaton.errors import KVBatonError
from kvbaton.layout import CacheLayout
from kvbaton.manager import KVPoll, Span
from kvbaton.protocol.messages import Role
from kvbaton.serving.engine.pipe import Died
from kvbaton.serving.engine.pool import Copies


class ForwardRequest(Struct, frozen=True, array_like=True):
    """One request of a forward pass: its new tokens, its units, how many tokens are cached."""

    tokens: tuple[int, ...]
    pages: tuple[int, ...]
    ring: tuple[int, ...]
    state: int
    cached: int


class Forward(Struct, frozen=True, tag="forward"):
    """``ahead``: the side, and the units, that the layers of the pass are handed over with as they are computed;
    ``every``: the logits of every token are wanted, not only of each request's last."""

    requests: tuple[ForwardRequest, ...]
    ahead: tuple[int, tuple[Span, ...]] | None = None
    every: bool = False


class Copy(Struct, frozen=True, tag="copy"):
    copies: Copies


class Begin(Struct, frozen=True, tag="begin"):
    """Make the sender, or the receiver from ``sources``, of a room."""

    side: int
    role: Role
    room: int
    sources: tuple[str, ...] = ()


class Publish(Struct, frozen=True, tag="publish"):
    side: int
    spans: tuple[Span, ...]
    token_count: int


class SubmitChunk(Struct, frozen=True, tag="submit"):
    """``written``: (pool, unit, bytes) of what the leader alone has written: aux rows, records of the prompt."""

    side: int
    spans: tuple[Span, ...]
    last: bool
    written: tuple[tuple[str, int, bytes], ...] = ()


class Fail(Struct, frozen=True, tag="fail"):
    side: int
    error: KVBatonError


class StopRank(Struct, frozen=True, tag="stop"):
    reason: str


class RankReady(Struct, frozen=True, tag="ready"):
    """A follower has loaded, registered and listens."""

    instance: str
    address: str
    layout_digest: str
    layout: CacheLayout | None = None


class RankStatus(Struct, frozen=True, tag="status"):
    """A room's status on one follower: what its KVSender or KVReceiver says."""

    side: int
    poll: KVPoll
    leased: bool = False
    prefix_len: int = 0
    bytes: int = 0
    exposed_seconds: float = 0.0
    error: KVBatonError | None = None


Order = Forward | Copy | Begin | Publish | SubmitChunk | Fail | StopRank
Report = RankReady | RankStatus | Died

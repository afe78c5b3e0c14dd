"""What the leader of a group and its followers tell each other: tagged structs, msgpack bytes, over a pipe.

The leader decides everything and orders it; a follower does it in that order and reports how its rooms fare. ``side``
numbers a sender or receiver for as long as the group lives: rooms may be used again, sides are not.

This file must not know of processes, models or transports.
"""

from __future__ import annotations

import msgspec
from msgspec import Struct

from kvbaton.engine.pool import Copies
from kvbaton.errors import KVBatonError, from_code
from kvbaton.layout import CacheLayout
from kvbaton.manager import KVPoll, Span
from kvbaton.messages import Role


class Failure(Struct, frozen=True, array_like=True):
    """An error on its way through the pipe."""

    code: str
    message: str
    peer: str = ""
    room: int | None = None

    @classmethod
    def of(cls, error: KVBatonError) -> Failure:
        return cls(error.code, error.message, error.peer, error.room)

    def error(self) -> KVBatonError:
        return from_code(self.code, self.message, peer=self.peer, room=self.room)


class Request(Struct, frozen=True, array_like=True):
    """One request of a forward pass: its new tokens, its units, how many tokens are cached."""

    tokens: tuple[int, ...]
    pages: tuple[int, ...]
    ring: tuple[int, ...]
    state: int
    cached: int


class Forward(Struct, frozen=True, tag="forward"):
    requests: tuple[Request, ...]


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


class Submit(Struct, frozen=True, tag="submit"):
    """``rows``: (slot, bytes) of aux rows that the leader has written."""

    side: int
    spans: tuple[Span, ...]
    last: bool
    rows: tuple[tuple[int, bytes], ...] = ()


class Fail(Struct, frozen=True, tag="fail"):
    side: int
    failure: Failure


class Stop(Struct, frozen=True, tag="stop"):
    reason: str


class Ready(Struct, frozen=True, tag="ready"):
    """A follower has loaded, registered and listens."""

    instance: str
    address: str
    layout_digest: str
    layout: CacheLayout | None = None


class Fares(Struct, frozen=True, tag="fares"):
    """How a follower's side fares: what a KVSender or KVReceiver would say."""

    side: int
    poll: KVPoll
    leased: bool = False
    prefix_len: int = 0
    bytes: int = 0
    exposed_seconds: float = 0.0
    failure: Failure | None = None


class Died(Struct, frozen=True, tag="died"):
    """A follower could not go on."""

    failure: Failure


Order = Forward | Copy | Begin | Publish | Submit | Fail | Stop
Report = Ready | Fares | Died

_encoder = msgspec.msgpack.Encoder()
_orders = msgspec.msgpack.Decoder(Order)
_reports = msgspec.msgpack.Decoder(Report)


def encode(message: Order | Report) -> bytes:
    return _encoder.encode(message)


def decode_order(data: bytes) -> Order:
    order: Order = _orders.decode(data)
    return order


def decode_report(data: bytes) -> Report:
    report: Report = _reports.decode(data)
    return report

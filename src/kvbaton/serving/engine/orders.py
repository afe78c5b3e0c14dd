"""What the processes of one server tell each other over a pipe: every message there is, each a tagged struct.

The leader of a group of ranks decides everything and orders it; a follower does it in that order and reports the status
of its rooms. ``side`` numbers a sender or receiver for as long as the group lives: rooms may be used again, sides are
not. A server with data parallelism passes requests on to its replicas, and asks them how they fare. A child of either
kind first says that it is ready, ends when it is told to :class:`Stop`, and says that it has ``Died`` where it cannot
go on. No two messages have one tag.

This file must not know of processes, models or transports.
"""

from __future__ import annotations

from msgspec import Struct

from kvbaton.discovery.registry import Route
from kvbaton.errors import KVBatonError
from kvbaton.layout import CacheLayout
from kvbaton.manager import KVPoll, Span, TraceEvent
from kvbaton.plan.layout_file import RankLayout
from kvbaton.protocol.messages import Role
from kvbaton.serving.engine.handoffs import Handoffs
from kvbaton.serving.engine.pipe import Died
from kvbaton.serving.engine.pool import Copies
from kvbaton.serving.engine.request import Output, Request
from kvbaton.serving.engine.stats import Stats


class Stop(Struct, frozen=True, tag="stop"):
    """The last order."""


# ---- a leader and its followers ------------------------------------------------------------------------------------


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


class SubmitChunk(Struct, frozen=True, tag="submit_chunk"):
    """``written``: (pool, unit, bytes) of what the leader alone has written: aux rows, records of the prompt."""

    side: int
    spans: tuple[Span, ...]
    last: bool
    written: tuple[tuple[str, int, bytes], ...] = ()


class Fail(Struct, frozen=True, tag="fail"):
    side: int
    error: KVBatonError


class RankReady(Struct, frozen=True, tag="rank_ready"):
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


# ---- a server and its replicas -------------------------------------------------------------------------------------


class SubmitRequest(Struct, frozen=True, tag="submit_request"):
    request: Request


class EndRequest(Struct, frozen=True, tag="end_request"):
    request_id: str
    reason: str


class HandOn(Struct, frozen=True, tag="hand_on"):
    """Let the engine that opens ``room`` and those behind it have these requests' answers."""

    request_ids: tuple[str, ...]
    room: int


class EndAll(Struct, frozen=True, tag="end_all"):
    error: KVBatonError


class ReplicaQuery(Struct, frozen=True, tag="query"):
    """How it fares; with ``room``, what happened to a room. ``number``: of the question."""

    number: int
    room: int | None = None


class ReplicaReady(Struct, frozen=True, tag="replica_ready"):
    """A replica has loaded, registered its memory and listens."""

    routes: tuple[Route, ...]
    layouts: tuple[RankLayout, ...]


class ReplicaOutput(Struct, frozen=True, tag="output"):
    """An output of a request; a refusal is one with an error."""

    request_id: str
    output: Output


class ReplicaAnswer(Struct, frozen=True, tag="answer"):
    """The answer to a :class:`ReplicaQuery`."""

    number: int
    stats: Stats | None = None
    handoffs: Handoffs | None = None
    events: tuple[TraceEvent, ...] = ()
    error: KVBatonError | None = None


RankOrder = Forward | Copy | Begin | Publish | SubmitChunk | Fail | Stop
RankReport = RankReady | RankStatus | Died
ReplicaOrder = SubmitRequest | EndRequest | HandOn | EndAll | ReplicaQuery | Stop
ReplicaReport = ReplicaReady | ReplicaOutput | ReplicaAnswer | Died

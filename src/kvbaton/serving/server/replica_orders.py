"""What a server and its data-parallel ranks tell each other: tagged structs, over a pipe.

This file must not know of processes, models or transports.
"""

from __future__ import annotations

from msgspec import Struct

from kvbaton.discovery.registry import Route
from kvbaton.errors import KVBatonError
from kvbaton.manager import TraceEvent
from kvbaton.plan.layout_file import RankLayout
from kvbaton.serving.engine.pipe import Died
from kvbaton.serving.engine.request import Output, Request
from kvbaton.serving.engine.scheduler import Stats
from kvbaton.serving.server.replica import Handoffs


class SubmitRequest(Struct, frozen=True, tag="submit"):
    request: Request


class EndRequest(Struct, frozen=True, tag="abort"):
    request_id: str
    reason: str


class EndAll(Struct, frozen=True, tag="end_all"):
    error: KVBatonError


class ReplicaQuery(Struct, frozen=True, tag="query"):
    """How it fares; with ``room``, what happened to a room. ``number``: of the question."""

    number: int
    room: int | None = None


class StopReplica(Struct, frozen=True, tag="stop"):
    pass


class ReplicaReady(Struct, frozen=True, tag="ready"):
    """A rank has loaded, registered its memory and listens."""

    routes: tuple[Route, ...]
    layouts: tuple[RankLayout, ...]


class ReplicaOutput(Struct, frozen=True, tag="output"):
    """An output of a request; a refusal is one with an error."""

    request_id: str
    output: Output


class ReplicaAnswer(Struct, frozen=True, tag="answer"):
    """The answer to an :class:`ReplicaQuery`."""

    number: int
    stats: Stats | None = None
    handoffs: Handoffs | None = None
    events: tuple[TraceEvent, ...] = ()
    error: KVBatonError | None = None


Order = SubmitRequest | EndRequest | EndAll | ReplicaQuery | StopReplica
Report = ReplicaReady | ReplicaOutput | ReplicaAnswer | Died

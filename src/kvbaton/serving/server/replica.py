"""What a server has behind its HTTP: an engine with its hand-offs, here (see ``local_replica``) or in other processes
(see ``replicas``).

This file must not know of processes, models or transports.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from msgspec import Struct

from kvbaton.discovery.registry import Route
from kvbaton.errors import KVBatonError
from kvbaton.manager import TraceEvent
from kvbaton.plan.layout_file import RankLayout
from kvbaton.serving.server.engine import Engine
from kvbaton.serving.server.metrics import Gauge


class StagingUse(Struct, frozen=True, kw_only=True):
    """Staging memory of a rank, and how much of it is in use."""

    policy: str
    slot_bytes: int
    slots: int
    slots_free: int


class Handoffs(Struct, frozen=True, kw_only=True):
    """What the first rank of an engine knows of its hand-offs; or the sum, where there are several engines."""

    evidence: str
    address: str
    group: str
    layout_digest: str
    rank: int
    live_rooms: int
    leased_rooms: int
    quarantined_rooms: int
    staging: StagingUse | None
    counters: dict[str, int]

    def gauges(self) -> list[Gauge]:
        """What is held now."""
        gauges = [
            Gauge("kvbaton_rooms_live", "Rooms of rank 0 that have not ended, or are leased.", self.live_rooms),
            Gauge("kvbaton_rooms_leased", "Rooms of rank 0 that a peer may still write.", self.leased_rooms),
            Gauge("kvbaton_rooms_quarantined", "Leased rooms of rank 0 that have failed.", self.quarantined_rooms),
        ]
        if self.staging is not None:
            used = self.staging.slots - self.staging.slots_free
            gauges += [
                Gauge("kvbaton_staging_slots", "Staging slots of rank 0.", self.staging.slots),
                Gauge("kvbaton_staging_slots_used", "Staging slots of rank 0 in use.", used),
            ]
        return gauges


def sum_of(several: Sequence[Handoffs]) -> Handoffs:
    """The hand-offs of several engines that are alike, as one."""
    first = several[0]
    counters = Counter[str]()
    for one in several:
        counters.update(one.counters)
    staging = first.staging
    uses = [one.staging for one in several if one.staging is not None]
    if staging is not None:
        staging = StagingUse(
            policy=staging.policy,
            slot_bytes=staging.slot_bytes,
            slots=sum(use.slots for use in uses),
            slots_free=sum(use.slots_free for use in uses),
        )
    return Handoffs(
        evidence=_joined(one.evidence for one in several),
        address=_joined(one.address for one in several),
        group=_joined(one.group for one in several),
        layout_digest=_joined(one.layout_digest for one in several),
        rank=first.rank,
        live_rooms=sum(one.live_rooms for one in several),
        leased_rooms=sum(one.leased_rooms for one in several),
        quarantined_rooms=sum(one.quarantined_rooms for one in several),
        staging=staging,
        counters=dict(counters),
    )


def _joined(words: Iterable[str]) -> str:
    """Distinct ones, in order of appearance."""
    return ", ".join(dict.fromkeys(word for word in words if word))


class Replica(Engine, Protocol):
    """An engine that hands over. Every method may be called from any thread."""

    @property
    def routes(self) -> Sequence[Route]:
        """Where each rank is found, for the registry; the port for HTTP is still to be set."""

    @property
    def layouts(self) -> Sequence[RankLayout]:
        """The memory of each rank of one engine, for operators."""

    def handoffs(self) -> Handoffs | None:
        """A snapshot; None where nothing is handed over. May wait for a moment."""

    def timeline(self, room: int) -> Sequence[TraceEvent]:
        """What happened to a room here, oldest first. May wait for a moment. Raises ExpiredError."""

    def watch(self, on_lost: Callable[[KVBatonError], None]) -> None:
        """``on_lost`` is told once, from any thread, when a process that belongs to this has gone."""

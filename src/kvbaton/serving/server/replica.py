"""What a server has behind its HTTP: an engine with its hand-offs, here (see ``local_replica``) or in other processes
(see ``replicas``).

This file must not know of processes, models or transports.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from kvbaton.discovery.registry import Route
from kvbaton.errors import KVBatonError
from kvbaton.manager import TraceEvent
from kvbaton.plan.layout_file import RankLayout
from kvbaton.serving.engine.handoffs import Handoffs
from kvbaton.serving.server.engine import Engine
from kvbaton.serving.server.metrics import Gauge


def gauges_of(handoffs: Handoffs) -> list[Gauge]:
    """What is held now."""
    gauges = [
        Gauge("kvbaton_rooms_live", "Rooms of rank 0 that have not ended, or are leased.", handoffs.live_rooms),
        Gauge("kvbaton_rooms_leased", "Rooms of rank 0 that a peer may still write.", handoffs.leased_rooms),
        Gauge("kvbaton_rooms_quarantined", "Leased rooms of rank 0 that have failed.", handoffs.quarantined_rooms),
    ]
    if handoffs.staging is not None:
        used = handoffs.staging.slots - handoffs.staging.slots_free
        gauges += [
            Gauge("kvbaton_staging_slots", "Staging slots of rank 0.", handoffs.staging.slots),
            Gauge("kvbaton_staging_slots_used", "Staging slots of rank 0 in use.", used),
        ]
    return gauges


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

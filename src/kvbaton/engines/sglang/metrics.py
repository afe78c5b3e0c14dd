"""What the hand-off counts, on SGLang's ``/metrics``, by the names that a server of ours has for the same.

Each process of SGLang writes its metrics to a file, and its API server sums them up; so what our driver counts is
written there as well, whenever a request has ended.
"""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import REGISTRY, CollectorRegistry, Counter

NAME = "sglang:kvbaton_handoff_events"


class HandoffEvents:
    """One rank's. ``registry``: the process's own where it is not said."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._events = Counter(NAME, "What the hand-off counted on all ranks, by event.", ["event"], registry=registry)
        self._written: dict[str, int] = {}

    def write(self, counted: Mapping[str, int]) -> None:
        """``counted``: since the start, by event."""
        for event, count in counted.items():
            more = count - self._written.get(event, 0)
            if more > 0:
                self._events.labels(event).inc(more)
                self._written[event] = count

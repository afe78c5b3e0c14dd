"""Prometheus metrics of the HTTP servers: base units, prefix ``kvbaton_``, one registry per server.

This file must not know of engines (it reads numbers that a callable gives it) or HTTP.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Histogram, Info, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvbaton import __version__
from kvbaton.serving.engine.request import Handoff

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
#: Upper bounds in seconds: requests last from one short answer to a long one under load.
REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
HANDOFF_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5, 30)
HANDOFF_BYTES_BUCKETS = tuple(float(1 << power) for power in range(12, 36, 2))


@dataclass(frozen=True, slots=True)
class Gauge:
    """One number at the time of a scrape. Gauges of one name carry the same label names.

    ``grows``: it only does that, so it is exported as a counter, with ``_total`` behind its name.
    """

    name: str
    help: str
    value: float
    labels: Mapping[str, str] = field(default_factory=dict)
    grows: bool = False


class RequestTimer:
    """One request under way. ``outcome`` is ``ok``, an error's code, or ``client_gone``."""

    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics = metrics
        self._started = perf_counter()
        self._answered = False
        self.outcome = "client_gone"

    def first_token(self) -> None:
        if not self._answered:
            self._answered = True
            self._metrics.first_token_seconds.observe(perf_counter() - self._started)

    @property
    def seconds(self) -> float:
        return perf_counter() - self._started


class ServerMetrics:
    """What an API server or a router counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        build = {"version": __version__, "python": platform.python_version()}
        Info("kvbaton_build", "What runs here; always 1.", registry=self.registry).info(build)
        self.requests = Counter(
            "kvbaton_requests",
            "Requests that ended, by route and outcome (ok, client_gone, or an error's code).",
            ["route", "outcome"],
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "kvbaton_request_seconds",
            "From a request's arrival to the last byte of its answer.",
            ["route"],
            buckets=REQUEST_BUCKETS,
            registry=self.registry,
        )
        self.first_token_seconds = Histogram(
            "kvbaton_time_to_first_token_seconds",
            "From a request's arrival to its first token; at a router of answers that stream only.",
            buckets=REQUEST_BUCKETS,
            registry=self.registry,
        )
        self.unknown_fields = Counter(
            "kvbaton_unknown_fields",
            "Requests with a field that nobody knows, by its name; beyond some names as one.",
            ["field"],
            registry=self.registry,
        )

    def unknown_field(self, name: str) -> None:
        self.unknown_fields.labels(name).inc()

    def counter(self, name: str, text: str) -> Counter:
        """One more counter, without labels."""
        return Counter(name, text, registry=self.registry)

    def histogram(self, name: str, text: str) -> Histogram:
        """One more histogram of seconds, without labels."""
        return Histogram(name, text, buckets=REQUEST_BUCKETS, registry=self.registry)

    def counters(self, name: str, text: str, label: str, read: Callable[[], Mapping[str, float]]) -> None:
        """Export a table of counts that somebody else keeps, as ``<name>_total{<label>=...}``."""
        self.registry.register(_Counts(name, text, label, read))

    def gauges(self, read: Callable[[], Iterable[Gauge]]) -> None:
        """Export every number that ``read`` gives, at the time of the scrape. ``read`` runs on the scraping thread."""
        self.registry.register(_Gauges(read))

    @contextmanager
    def timed(self, route: str) -> Iterator[RequestTimer]:
        """Count a request and its duration when the block ends, however it ends."""
        timer = RequestTimer(self)
        try:
            yield timer
        finally:
            self.requests.labels(route, timer.outcome).inc()
            self.request_seconds.labels(route).observe(timer.seconds)

    def exposition(self) -> bytes:
        """The text format, as ``/metrics`` answers it."""
        return generate_latest(self.registry)


class HandoffMetrics:
    """What one side counts of the hand-offs of its requests, and of answers that go on elsewhere."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._seconds = Histogram(
            "kvbaton_handoff_seconds",
            "From granting pages to a complete hand-off, per request.",
            buckets=HANDOFF_BUCKETS,
            registry=registry,
        )
        self._bytes = Histogram(
            "kvbaton_handoff_bytes",
            "Bytes handed over, per request.",
            buckets=HANDOFF_BYTES_BUCKETS,
            registry=registry,
        )

        self._exposed = Histogram(
            "kvbaton_handoff_exposed_seconds",
            "From the last chunk being computed to its last byte having settled, per request: what hand-off adds.",
            buckets=HANDOFF_BUCKETS,
            registry=registry,
        )
        self.recomputed = Counter(
            "kvbaton_recomputed_tokens",
            "Tokens of answers that another server had given and that were computed again.",
            registry=registry,
        )
        self.handed_on = Counter(
            "kvbaton_handed_on_requests",
            "Requests that go on at another server, with their cache.",
            registry=registry,
        )

    def observe(self, handoff: Handoff) -> None:
        self._seconds.observe(handoff.seconds)
        self._exposed.observe(handoff.exposed_seconds)
        self._bytes.observe(handoff.bytes)


class _Gauges(Collector):
    def __init__(self, read: Callable[[], Iterable[Gauge]]) -> None:
        self._read = read

    def describe(self) -> Iterable[Metric]:
        return ()  # the names are known only when they are read

    def collect(self) -> Iterable[Metric]:
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        for gauge in self._read():
            family = families.get(gauge.name)
            if family is None:
                kind = CounterMetricFamily if gauge.grows else GaugeMetricFamily
                family = families[gauge.name] = kind(gauge.name, gauge.help, labels=list(gauge.labels))
            family.add_metric(list(gauge.labels.values()), gauge.value)
        return families.values()


class _Counts(Collector):
    def __init__(self, name: str, text: str, label: str, read: Callable[[], Mapping[str, float]]) -> None:
        self._name = name
        self._text = text
        self._label = label
        self._read = read

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily(self._name, self._text, labels=[self._label])
        for key, count in self._read().items():
            family.add_metric([key], count)
        return [family]

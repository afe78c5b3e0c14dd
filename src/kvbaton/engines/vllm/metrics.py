"""What the rooms came to, through vLLM's own hooks: its log line and its ``/metrics``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.v1.metrics.utils import create_metric_per_engine

from kvbaton.engines.vllm import tally

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
SIZES = tuple(float(1 << shift) for shift in range(12, 36, 2))


@dataclass
class KVBatonStats(KVConnectorStats):  # type: ignore[misc]
    """``data`` as :mod:`kvbaton.engines.vllm.tally` keeps it."""

    data: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.data = self.data or tally.empty()

    def reset(self) -> None:
        self.data = tally.empty()

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        self.data = tally.add(self.data, other.data)
        return self

    def reduce(self) -> dict[str, int | float]:
        return tally.summary(self.data)

    def is_empty(self) -> bool:
        """An interval in which nothing has ended needs no line in the log."""
        return tally.Tally(self.data).empty


class KVBatonMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """Of decode: how long hand-offs took and how much of it was not hidden by the prefill. Of both: outcomes."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Any:
            metric = self._histogram_cls(name=name, documentation=text, buckets=buckets, labelnames=labelnames)
            return create_metric_per_engine(metric, per_engine_labelvalues)

        self._observed = {
            "handoff_seconds": histogram(
                "vllm:kvbaton_handoff_seconds", "From granting blocks to their having arrived.", SECONDS
            ),
            "exposed_seconds": histogram(
                "vllm:kvbaton_exposed_seconds",
                "From the last chunk of a prompt to its last byte having settled.",
                SECONDS,
            ),
            "received_bytes": histogram("vllm:kvbaton_received_bytes", "Bytes received for a request, a rank.", SIZES),
        }
        self._rooms = self._counter_cls(
            name="vllm:kvbaton_rooms",
            documentation="Hand-offs that have ended, a rank; outcome is success or the code of the error.",
            labelnames=[*labelnames, "side", "outcome"],
        )
        gauge = {"multiprocess_mode": "mostrecent"}
        self._gauges = {
            name: create_metric_per_engine(
                self._gauge_cls(name=f"vllm:kvbaton_{name}", documentation=text, labelnames=labelnames, **gauge),
                per_engine_labelvalues,
            )
            for name, text in (
                ("live_rooms", "Hand-offs under way, a rank."),
                ("quarantined_rooms", "Failed hand-offs whose blocks a silent peer may still write, a rank."),
            )
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, metrics in self._observed.items():
            for value in transfer_stats_data[name]:
                metrics[engine_idx].observe(value)
        for side in tally.COUNTED:
            for outcome, number in transfer_stats_data[side].items():
                labels = [*self.per_engine_labelvalues[engine_idx], side, outcome]
                self._rooms.labels(*labels).inc(number)
        for name, metrics in self._gauges.items():
            if name in transfer_stats_data:
                metrics[engine_idx].set(transfer_stats_data[name])

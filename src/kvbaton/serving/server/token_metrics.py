"""What an API server counts of its engine's tokens, by model and data-parallel rank: how many, and how fast.

Rules: times are taken where outputs reach the event loop, for streams and whole answers alike. An output of several
tokens that came between two looks counts as so many equal steps.

This file must not know HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Histogram

from kvbaton.serving.engine.request import Output, Request
from kvbaton.serving.server.metrics import REQUEST_BUCKETS

LABELS = ("model", "rank")
#: Upper bounds in seconds of one token's step.
STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5)


@dataclass(frozen=True, slots=True)
class RankMetrics:
    """Those of one rank."""

    prompt_tokens: Counter
    generation_tokens: Counter
    queue_seconds: Histogram
    inter_token_seconds: Histogram
    token_seconds: Histogram


class TokenMetrics:
    """Of one server. A rank's are there from its first output on, rank 0's from the start."""

    def __init__(self, registry: CollectorRegistry, model: str) -> None:
        self._model = model
        self._prompt = Counter(
            "kvbaton_prompt_tokens", "Tokens of the prompts of requests that were answered.", LABELS, registry=registry
        )
        self._generation = Counter(
            "kvbaton_generation_tokens", "Tokens of answers; on prefill the first of each.", LABELS, registry=registry
        )
        self._queue = Histogram(
            "kvbaton_queue_seconds",
            "From a request's arrival at the engine to when it was taken up: memory was there for it.",
            LABELS,
            buckets=REQUEST_BUCKETS,
            registry=registry,
        )
        self._inter_token = Histogram(
            "kvbaton_inter_token_seconds",
            "From one token of an answer to the next.",
            LABELS,
            buckets=STEP_BUCKETS,
            registry=registry,
        )
        self._per_token = Histogram(
            "kvbaton_time_per_output_token_seconds",
            "The mean of an answer: from its first to its last token, by the tokens after the first.",
            LABELS,
            buckets=STEP_BUCKETS,
            registry=registry,
        )
        self._ranks: dict[int, RankMetrics] = {}
        self.of(0)

    def of(self, rank: int) -> RankMetrics:
        if rank not in self._ranks:
            labels = (self._model, str(rank))
            self._ranks[rank] = RankMetrics(
                self._prompt.labels(*labels),
                self._generation.labels(*labels),
                self._queue.labels(*labels),
                self._inter_token.labels(*labels),
                self._per_token.labels(*labels),
            )
        return self._ranks[rank]


@dataclass(slots=True)
class _Answer:
    first: float
    last: float
    later_tokens: int = 0


class TokenClock:
    """Of the answers to one HTTP request: fed every output as it comes. ``requests``: each by the number of its first
    answer."""

    def __init__(self, metrics: TokenMetrics, requests: Mapping[int, Request]) -> None:
        self._metrics = metrics
        self._requests = requests
        self._answers: dict[int, _Answer] = {}

    def heard(self, output: Output) -> None:
        now, metrics, count = perf_counter(), self._metrics.of(output.rank), len(output.tokens)
        if output.queued_seconds is not None:
            metrics.queue_seconds.observe(output.queued_seconds)
            metrics.prompt_tokens.inc(len(self._requests[output.index].asked_tokens))
        metrics.generation_tokens.inc(count)
        answer = self._answers.get(output.index)
        if answer is None:
            self._answers[output.index] = answer = _Answer(now, now)
        elif count:
            for _ in range(count):
                metrics.inter_token_seconds.observe((now - answer.last) / count)
            answer.last = now
            answer.later_tokens += count
        if output.ends_choice and answer.later_tokens:
            metrics.token_seconds.observe((answer.last - answer.first) / answer.later_tokens)

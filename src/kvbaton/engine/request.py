"""What an engine is asked, and what it answers: plain data between the API server and the scheduler thread."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvbaton.errors import KVBatonError


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How to pick tokens. ``temperature`` 0 is greedy. ``seed`` makes a sampled request repeatable."""

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt to continue.

    ``room`` and ``bootstrap`` are set for disaggregated requests only: the router's room, and (decode side) the control
    addresses of the prefill group's ranks as resolved from the registry.
    """

    request_id: str
    prompt_tokens: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    room: int | None = None
    sources: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Handoff:
    """What the hand-off of a request moved and took.

    ``seconds`` runs from the grant of pages to the arrival and so contains the prefill; ``exposed_seconds`` is what
    disaggregation adds: from the last chunk being computed to its last byte having settled.
    """

    bytes: int
    seconds: float
    exposed_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """One step of a request's answer. The last one has ``finish_reason`` ("stop", "length", "abort") or ``error``."""

    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[float, ...] = ()
    finish_reason: str | None = None
    error: KVBatonError | None = None
    handoff: Handoff | None = None

    @property
    def final(self) -> bool:
        return self.finish_reason is not None or self.error is not None

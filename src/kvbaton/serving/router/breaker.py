"""A circuit breaker: a worker that fails every request, though it answers its probes, is tried ever less.

Rules:

- Failures of one kind (an error's code) in a row open it; any success between them, or a quiet ``window_secs``, begins
  anew. What is the client's doing is no failure, and neither is what a probe finds out by itself.
- While it is open the worker is taken only where there is no other one: the breaker never makes an outage.
- After ``timeout_secs`` one request is a trial (half-open): its success closes the circuit, anything else leaves it
  open for as long again.

This file must not know HTTP or what a worker is.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class BreakerSettings:
    """See the module. ``failure_threshold`` 0: it never opens."""

    failure_threshold: int = 10
    timeout_secs: float = 10.0
    window_secs: float = 120.0


class Breaker:
    """Of one worker."""

    def __init__(self, settings: BreakerSettings | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings if settings is not None else BreakerSettings()
        self._clock = clock
        self._failures: Counter[str] = Counter()
        self._last = 0.0
        self._until: float | None = None

    @property
    def is_open(self) -> bool:
        """Also while it is half-open."""
        return self._until is not None

    @property
    def allows(self) -> bool:
        """Whether a request may be sent."""
        return self._until is None or self._clock() >= self._until

    def taken(self) -> None:
        """A request is sent: while the circuit is open, it is the trial, and others wait for it."""
        if self._until is not None:
            self._until = self._clock() + self._settings.timeout_secs

    def failed(self, kind: str) -> bool:
        """Returns whether this has opened the circuit."""
        now = self._clock()
        if now - self._last > self._settings.window_secs:
            self._failures.clear()
        self._last = now
        self._failures[kind] += 1
        if self._until is not None:
            self._until = now + self._settings.timeout_secs
            return False
        threshold = self._settings.failure_threshold
        if threshold and self._failures[kind] >= threshold:
            self._until = now + self._settings.timeout_secs
            return True
        return False

    def succeeded(self) -> bool:
        """Returns whether this has closed the circuit."""
        was_open, self._until = self._until is not None, None
        self._failures.clear()
        return was_open

    def __repr__(self) -> str:
        return f"<Breaker {'open' if self.is_open else 'closed'} {dict(self._failures)}>"

"""Calls of a thread that must go on: whatever they raise unforeseen is counted, and logged ever more rarely."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

log = logging.getLogger("kvbaton.driver")

#: Distinct failures whose number is remembered, and characters of each.
MAX_FAILURES = 64
MAX_TEXT = 200


class Guard:
    """``threaded``: whether a thread runs the calls. Where none does, whoever makes them gets what they raise."""

    def __init__(self, counters: Counter[str], threaded: Callable[[], bool]) -> None:
        self._counters = counters
        self._threaded = threaded
        self._failures = Counter[str]()

    def attempt(self, call: Callable[[], object]) -> Exception | None:
        """Whatever ``call`` raises that was not foreseen."""
        try:
            call()
        except Exception as error:  # noqa: BLE001 - the thread must go on
            self.failed(error)
            return error
        return None

    def failed(self, error: Exception) -> None:
        """Count and log what was not foreseen."""
        if not self._threaded():
            raise error
        self._counters["driver_errors"] += 1
        text = repr(error)[:MAX_TEXT]
        if len(self._failures) >= MAX_FAILURES:
            self._failures.clear()
        self._failures[text] += 1
        times = self._failures[text]
        if times.bit_count() == 1:  # what fails in every turn must not fill a disk
            log.error("something failed, %d times by now; the driver goes on", times, exc_info=error)

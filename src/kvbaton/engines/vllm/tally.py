"""What a rank's rooms came to since vLLM last asked: plain lists and counts, which vLLM carries to its API server."""

from __future__ import annotations

from typing import Any

#: Lists of observations.
OBSERVED = ("handoff_seconds", "exposed_seconds", "received_bytes")
#: Counts by outcome: ``success``, or the code of the error.
COUNTED = ("sent", "received")
#: What is true now.
GAUGED = ("live_rooms", "quarantined_rooms")


class Tally:
    """``data`` is what is carried."""

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        self.data: dict[str, Any] = data or empty()

    def received(self, outcome: str, *, handoff_seconds: float, exposed_seconds: float, size: int) -> None:
        """A room of decode has ended; sizes in bytes."""
        self._count("received", outcome)
        if outcome == "success":
            for name, value in zip(OBSERVED, (handoff_seconds, exposed_seconds, size), strict=True):
                self.data[name].append(value)

    def sent(self, outcome: str) -> None:
        """A room of prefill has ended."""
        self._count("sent", outcome)

    def _count(self, name: str, outcome: str) -> None:
        self.data[name][outcome] = self.data[name].get(outcome, 0) + 1

    def now(self, **gauges: int) -> bool:
        """Set what is true now; whether that is news."""
        news = any(self.data.get(name) != value for name, value in gauges.items())
        self.data.update(gauges)
        return news

    @property
    def empty(self) -> bool:
        """Nothing has ended."""
        return not any(self.data[name] for name in COUNTED)

    def take(self) -> dict[str, Any]:
        """What there is, and begin anew."""
        taken = self.data
        self.data = empty() | {name: taken[name] for name in GAUGED if name in taken}
        return taken


def empty() -> dict[str, Any]:
    """Nothing observed, nothing counted."""
    return {**{name: [] for name in OBSERVED}, **{name: {} for name in COUNTED}}


def add(data: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """``data`` with ``other``, of another rank or of a later step, added to it."""
    for name in OBSERVED:
        data[name] = [*data[name], *other[name]]
    for name in COUNTED:
        for outcome, count in other[name].items():
            data[name][outcome] = data[name].get(outcome, 0) + count
    for name in GAUGED:
        if name in other:
            data[name] = other[name]
    return data


def summary(data: dict[str, Any]) -> dict[str, int | float]:
    """A few figures for vLLM's log line; times in milliseconds, sizes in MB of 10^6 bytes."""
    seconds = sorted(data["handoff_seconds"])
    failed = sum(count for name in COUNTED for outcome, count in data[name].items() if outcome != "success")
    return {
        "rooms received": sum(data["received"].values()),
        "rooms sent": sum(data["sent"].values()),
        "failed": failed,
        "median hand-off (ms)": round(seconds[len(seconds) // 2] * 1e3, 2) if seconds else 0,
        "p90 hand-off (ms)": round(seconds[len(seconds) * 9 // 10] * 1e3, 2) if seconds else 0,
        "received (MB)": round(sum(data["received_bytes"]) / 1e6, 3),
    }

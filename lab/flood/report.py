"""Results as rows of a table, and as data."""

from __future__ import annotations

from collections.abc import Sequence

from lab.flood.campaign import Result

HEADINGS = ("attack", "honest", "p99 in calm", "during", "ratio", "peak growth, MiB", "what the attacker got")


def row(result: Result) -> tuple[str, ...]:
    before, during = result.p99_seconds
    return (
        result.name,
        f"{result.requests[0]} + {result.requests[1]}",
        f"{before:.2f} s",
        f"{during:.2f} s",
        f"{result.ratio:.1f}",
        ", ".join(f"{name.split('-')[0]} {grown:+.0f}" for name, grown in result.peak_growth_mib.items()),
        ", ".join(f"{count:,} of {what}" for what, count in result.got.items()),
    )


def as_data(results: Sequence[Result]) -> dict[str, object]:
    return {
        "ok": all(result.ok for result in results),
        "attacks": [
            {
                "name": result.name,
                "ok": result.ok,
                "requests": result.requests,
                "p99_seconds": result.p99_seconds,
                "p99_ratio": round(result.ratio, 2),
                "peak_growth_mib": result.peak_growth_mib,
                "got": result.got,
                "complaints": result.complaints,
            }
            for result in results
        ],
    }

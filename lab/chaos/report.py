"""Results as a table for people, as JSON, and as the section of docs/reliability.md that a run writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvbaton.errors import ConfigError
from lab.chaos.cell import CellResult
from lab.chaos.fault import Phase
from lab.docs.page import split

BEGIN = "<!-- kvbaton chaos: begin -->"
END = "<!-- kvbaton chaos: end -->"
HEADINGS = ("fault", "victim", *(phase.value for phase in Phase))


def rows(results: Sequence[CellResult]) -> list[list[str]]:
    """One row per fault, network and victim, one column per phase."""
    table: dict[tuple[str, str], dict[Phase, str]] = {}
    for result in results:
        spec = result.spec
        fault = f"{spec.fault.value} (tcp)" if spec.network == "tcp" else spec.fault.value
        table.setdefault((fault, spec.victim.value), {})[spec.phase] = cell(result)
    return [[*key, *(cells.get(phase, "") for phase in Phase)] for key, cells in table.items()]


def cell(result: CellResult) -> str:
    mark = "✓" if result.ok else "✗"
    quarantine = " Q" if result.quarantined else ""
    return f"{mark} {result.outcome} {result.seconds:.1f} s{quarantine}"


def slowest(results: Sequence[CellResult]) -> dict[str, dict[str, float]]:
    """By fault: the most seconds to a typed error, and to being served again once the fault was over."""
    found: dict[str, dict[str, float]] = {}
    for result in results:
        name = f"{result.spec.fault.value} (tcp)" if result.spec.network == "tcp" else result.spec.fault.value
        worst = found.setdefault(name, {"error_seconds": 0.0, "recovery_seconds": 0.0})
        if result.outcome != "answer":
            worst["error_seconds"] = max(worst["error_seconds"], result.seconds)
        worst["recovery_seconds"] = max(worst["recovery_seconds"], result.recovered_seconds)
    return found


def as_data(results: Sequence[CellResult]) -> dict[str, object]:
    return {
        "ok": all(result.ok for result in results),
        "cells": [
            {
                "fault": result.spec.fault.value,
                "victim": result.spec.victim.value,
                "phase": result.spec.phase.value,
                "network": result.spec.network,
                "ok": result.ok,
                "outcome": result.outcome,
                "message": result.message,
                "seconds": round(result.seconds, 3),
                "recovered_seconds": round(result.recovered_seconds, 3),
                "quarantined": result.quarantined,
                "failures": list(result.failures),
            }
            for result in results
        ],
        "slowest": slowest(results),
    }


def markdown(results: Sequence[CellResult]) -> str:
    green = sum(result.ok for result in results)
    lines = [f"{green} of {len(results)} cells green.", "", *_table(HEADINGS, rows(results)), ""]
    worst = [
        [
            name,
            f"{seconds['error_seconds']:.1f}" if seconds["error_seconds"] else "-",
            f"{seconds['recovery_seconds']:.1f}",
        ]
        for name, seconds in slowest(results).items()
    ]
    lines += _table(("fault", "max seconds to a typed error", "max seconds to the next right answer"), worst)
    return "\n".join(lines)


def _table(headings: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (headings, ["---"] * len(headings), *body)]


def around_markers(path: Path) -> tuple[str, str]:
    """What stands before and behind the markers of a Markdown file. Raises ConfigError where there are none."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--write {path}: {error.strerror}; name a file with the lines {BEGIN} and {END}") from None
    before, _, after = split(path, text, BEGIN, END)
    return before, after


def write_into(path: Path, results: Sequence[CellResult]) -> None:
    """Replace what stands between the markers of a Markdown file. Raises ConfigError where there are none."""
    before, after = around_markers(path)
    path.write_text(f"{before}{BEGIN}\n{markdown(results)}\n{END}{after}", encoding="utf-8")

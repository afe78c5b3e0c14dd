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
HEADINGS = ("fault", "victim", *(phase.value for phase in Phase), "with a second worker")


def rows(results: Sequence[CellResult]) -> list[list[str]]:
    """One row per fault, network and victim, one column per phase, one for all phases with a second worker."""
    alone: dict[tuple[str, str], dict[Phase, str]] = {}
    beside: dict[tuple[str, str], list[CellResult]] = {}
    for result in results:
        key = _name(result), result.spec.victim.value
        cells = alone.setdefault(key, {})
        if result.spec.workers > 1:
            beside.setdefault(key, []).append(result)
        else:
            cells[result.spec.phase] = cell(result)
    return [
        [*key, *(cells.get(phase, "") for phase in Phase), together(beside.get(key, []))]
        for key, cells in alone.items()
    ]


def _name(result: CellResult) -> str:
    return f"{result.spec.fault.value} (tcp)" if result.spec.network == "tcp" else result.spec.fault.value


def together(results: Sequence[CellResult]) -> str:
    """All phases of one fault: how many answers the clients got, and after how many seconds the latest."""
    if not results:
        return ""
    mark = "✓" if all(result.ok for result in results) else "✗"
    answers = sum(result.outcome == "answer" for result in results)
    return f"{mark} {answers} of {len(results)} answers, {max(result.seconds for result in results):.1f} s"


def cell(result: CellResult) -> str:
    mark = "✓" if result.ok else "✗"
    quarantine = " Q" if result.quarantined else ""
    return f"{mark} {result.outcome} {result.seconds:.1f} s{quarantine}"


def slowest(results: Sequence[CellResult]) -> dict[str, dict[str, float]]:
    """By fault: the most seconds to a typed error, and to being served again once the fault was over."""
    found: dict[str, dict[str, float]] = {}
    for result in results:
        name = _name(result)
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
                "workers": result.spec.workers,
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

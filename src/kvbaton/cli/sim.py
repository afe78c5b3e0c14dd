"""``kvbaton sim``: try to break the protocol with simulated faults, from seeds that replay."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from kvbaton.cli.settings import positive
from kvbaton.errors import ConfigError

if TYPE_CHECKING:
    from kvbaton.testing.sim.campaign import Summary
    from kvbaton.testing.sim.scenario import Scenario

#: Failing seeds that are shrunk and printed in full; the rest are listed.
MOST_TOLD = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=positive, default=1000, help="how many seeds to run")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="run this one seed only")
    parser.add_argument("--scenario", type=Path, help="run a scenario from a JSON file instead of a seed")
    parser.add_argument("--trace", action="store_true", help="with --seed or --scenario: print everything that happens")
    parser.add_argument("--shrink", action=argparse.BooleanOptionalAction, default=True, help="make what fails small")
    parser.add_argument("--jobs", type=positive, help="processes (default: one per core)")
    parser.add_argument("--plot", type=Path, help="heat map of states and events, .html or .svg")
    parser.add_argument("--json", action="store_true", help="data on stdout")


def run(options: argparse.Namespace) -> int:
    if options.plot is not None and options.plot.suffix not in (".html", ".htm", ".svg"):
        raise ConfigError(f"cannot plot to {options.plot.name}: use a name that ends in .html or .svg")
    if options.seed is not None or options.scenario is not None:
        return _run_one(options)
    return _run_many(options)


def _run_one(options: argparse.Namespace) -> int:
    from kvbaton.testing.sim.generate import generate
    from kvbaton.testing.sim.scenario import Scenario
    from kvbaton.testing.sim.world import run as run_scenario

    if options.scenario is not None:
        try:
            scenario = Scenario.from_json(options.scenario.read_bytes())
        except (OSError, msgspec.MsgspecError) as error:
            raise ConfigError(f"cannot read the scenario {options.scenario}: {error}") from error
    else:
        scenario = generate(options.seed)
    outcome = run_scenario(scenario, tracing=options.trace)
    if options.json:
        report = {
            "seed": scenario.seed,
            "violations": [{"kind": outcome.kind, "text": outcome.text}] if outcome.kind else [],
            "steps": outcome.steps,
            "simulated_seconds": outcome.seconds,
            "faults": outcome.faults,
            "results": outcome.results,
            "trace": outcome.trace,
        }
        print(msgspec.json.encode(report).decode())
    else:
        if options.trace:
            print(scenario.to_json().decode())
            print("\n".join(outcome.trace))
        verdict = f"{outcome.kind}: {outcome.text}" if outcome.kind else "every invariant held"
        print(f"seed {scenario.seed}: {verdict} ({outcome.steps} steps, {outcome.seconds:.1f} simulated seconds)")
    if outcome.kind:
        _print_failure(scenario, options.shrink, source=_source(options))
    return 1 if outcome.kind else 0


def _run_many(options: argparse.Namespace) -> int:
    from kvbaton.testing.sim import coverage
    from kvbaton.testing.sim.campaign import run_campaign
    from kvbaton.testing.sim.generate import generate

    started = time.monotonic()
    with _Progress(options.seeds) as progress:
        summary = run_campaign(options.first_seed, options.seeds, jobs=options.jobs, on_progress=progress.advance)
    seconds = time.monotonic() - started
    report = _report(summary, options.first_seed, seconds)
    if options.plot is not None:
        caption = f"kvbaton sim: {summary.seeds} seeds from {options.first_seed}, {len(summary.findings)} violations"
        coverage.write_plot(options.plot, summary.cells, caption)
    print(msgspec.json.encode(report).decode() if options.json else _table(report))
    for finding in summary.findings[:MOST_TOLD]:
        _print_failure(generate(finding.seed), options.shrink, source=f"--seed {finding.seed}")
    return 1 if summary.findings else 0


def _report(summary: Summary, first: int, seconds: float) -> dict[str, Any]:
    from kvbaton.testing.sim import coverage

    legal = coverage.legal_cells()
    missing = coverage.never_reached(summary.cells)
    return {
        "first_seed": first,
        "seeds": summary.seeds,
        "violations": [{"seed": f.seed, "kind": f.kind, "text": f.text} for f in summary.findings],
        "seconds": round(seconds, 3),
        "seeds_per_second": round(summary.seeds / seconds, 1),
        "steps": summary.steps,
        "simulated_seconds": round(summary.seconds, 1),
        "cells_legal": len(legal),
        "cells_reached": len(legal) - len(missing),
        "cells_never_reached": missing,
        "cells_illegal_reached": coverage.forbidden_but_reached(summary.cells),
        "cells": dict(sorted(summary.cells.items())),
        "faults": dict(sorted(summary.faults.items())),
        "results": dict(summary.results.most_common()),
    }


def _table(report: dict[str, Any]) -> str:
    lines = [
        f"{report['seeds']} seeds from {report['first_seed']} in {report['seconds']:.1f} s "
        f"({report['seeds_per_second']} per second): {len(report['violations'])} violations",
        f"{report['steps']} steps, {report['simulated_seconds']:.0f} simulated seconds",
        f"transition table: {report['cells_reached']} of {report['cells_legal']} legal cells reached",
        *(f"  never reached: {name}" for name in report["cells_never_reached"]),
        *(f"  reached, though illegal: {name}" for name in report["cells_illegal_reached"]),
        "faults: " + ", ".join(f"{name} {count}" for name, count in report["faults"].items()),
        "ends of rooms: " + ", ".join(f"{name} {count}" for name, count in report["results"].items()),
        *(f"seed {v['seed']}: {v['kind']}: {v['text']}" for v in report["violations"]),
    ]
    return "\n".join(lines)


def _source(options: argparse.Namespace) -> str:
    """Where the one scenario comes from, as flags."""
    return f"--seed {options.seed}" if options.scenario is None else f"--scenario {shlex.quote(str(options.scenario))}"


def _print_failure(scenario: Scenario, shrinking: bool, *, source: str) -> None:
    """A failing scenario's story, for people: on stderr. ``source``: the flags that it comes from."""
    from kvbaton.testing.sim.shrink import shrink
    from kvbaton.testing.sim.world import run as run_scenario

    failed = run_scenario(scenario)
    if shrinking and failed.kind:
        failed = shrink(failed)
    traced = run_scenario(failed.scenario, tracing=True)
    print(f"\n{source.removeprefix('--')} breaks an invariant{', made small' if shrinking else ''}:", file=sys.stderr)
    print(failed.scenario.to_json().decode(), file=sys.stderr)
    print("\n".join(traced.trace[-200:]), file=sys.stderr)
    print(f"replay: kvbaton sim {source} --trace", file=sys.stderr)


class _Progress:
    """A bar on stderr, where there is somebody to look at it."""

    def __init__(self, seeds: int) -> None:
        try:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        except ModuleNotFoundError as error:
            raise ConfigError(f"sim needs the package {error.name!r}", hint="pip install 'kvbaton[serve]'") from None

        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._broken = 0
        self._task = self._progress.add_task("seeds", total=seeds)

    def __enter__(self) -> _Progress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, summary: Summary) -> None:
        self._broken += len(summary.findings)
        text = f"seeds, {self._broken} violations" if self._broken else "seeds"
        self._progress.update(self._task, advance=summary.seeds, description=text)

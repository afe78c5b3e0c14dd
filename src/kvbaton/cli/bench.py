"""``kvbaton bench transfer``: how fast rooms are handed over, against memcpy and raw NIXL in the same run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import msgspec

from kvbaton.cli.settings import add_log_level, positive, transfer_costs
from kvbaton.errors import ConfigError

if TYPE_CHECKING:
    from rich.status import Status

    from kvbaton.bench.scenario import BenchScenario
    from kvbaton.bench.transfer import BenchResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        choices=("transfer", "rooms", "plan", "staging", "calibrate"),
        help="transfer: rooms from source to target ranks; rooms: one small room beside many that wait; plan: building "
        "plans and merging runs; staging: gathered against direct writes over a grid; calibrate: the costs that "
        "choosing between them is made with",
    )
    parser.add_argument("--suite", action="store_true", help="run the standard scenarios instead of one")
    parser.add_argument("--layers", type=positive, default=8, help="layers of the model, K and V each")
    parser.add_argument("--pages", type=positive, default=64, help="pages of a room, 16 tokens each")
    parser.add_argument(
        "--item-bytes", type=positive, default=32 << 10, help="bytes of a page of one layer's K, all heads"
    )
    parser.add_argument("--order", choices=("shuffled", "contiguous"), default="shuffled", help="page ids of a room")
    parser.add_argument("--rooms", type=positive, default=64, help="rooms of a round")
    parser.add_argument("--concurrency", type=positive, default=64, help="rooms open at a time")
    parser.add_argument("--source-tp", type=positive, default=1, help="prefill ranks")
    parser.add_argument("--target-tp", type=positive, default=1, help="decode ranks")
    parser.add_argument("--page-size", type=positive, default=16, help="tokens of a page")
    parser.add_argument("--chunks", type=positive, default=1, help="chunks that a room is submitted in")
    parser.add_argument(
        "--interior",
        choices=("HND", "NHD"),
        default=None,
        help="order of heads and tokens in a page; if left out HND, with staging NHD",
    )
    parser.add_argument("--kind", choices=("kv", "mla"), default="kv", help="K and V of all heads, or one latent")
    parser.add_argument("--plane", choices=("shared", "tcp"), default="shared", help="what UCX may use")
    parser.add_argument("--staging", choices=("auto", "always", "never"), default="never", help="as serve takes it")
    parser.add_argument("--rounds", type=positive, default=5, help="measured rounds, after one that warms up")
    parser.add_argument("--seed", type=int, default=0, help="of bytes and page order")
    parser.add_argument(
        "--disaggregation-transfer-backend", choices=("nixl", "memory"), default="nixl", help="kvbaton's transport"
    )
    parser.add_argument("--transfer-costs", type=Path, default=None, help="a file that calibrate wrote")
    parser.add_argument("--plot", type=Path, default=None, help="with staging or rooms: a picture, .svg or .png")
    parser.add_argument("--json", action="store_true", help="data on stdout, every round")
    add_log_level(parser)


def run(options: argparse.Namespace) -> int:
    if options.what == "plan":
        return _run_plan(options)
    if options.what == "rooms":
        return _run_rooms(options)
    if options.what in ("staging", "calibrate"):
        return _run_staging(options)
    try:
        from rich.console import Console

        from kvbaton.bench.transfer import TransferBench
    except ModuleNotFoundError as error:
        raise ConfigError(f"bench needs the package {error.name!r}", hint="pip install 'kvbaton[serve]'") from None
    results: list[BenchResult] = []
    console = Console(stderr=True)
    for scenario in _scenarios(options):
        with (
            console.status(f"{scenario.name}: starting ranks") as status,
            TransferBench(scenario, options.disaggregation_transfer_backend) as bench,
        ):
            results.append(bench.run(partial(_show, status, scenario.name), idle=not results))
        console.print(f"{scenario.name}: done", highlight=False)
    if options.json:
        sys.stdout.write(msgspec.json.encode([_data(result) for result in results]).decode() + "\n")
    else:
        _print(results)
    return 0


def _run_rooms(options: argparse.Namespace) -> int:
    from rich.console import Console

    from kvbaton.bench.open_rooms import measure

    save = _plotter().save_open_rooms if options.plot is not None else None
    with Console(stderr=True, highlight=False).status("starting ranks") as status:
        found = measure(options.rounds, options.seed, options.disaggregation_transfer_backend, status.update)
    if save is not None:
        save(found, options.plot)
    if options.json:
        data = [{"open": one.open, "waiting_cpu": one.waiting_cpu, **_data(one.result)} for one in found]
        sys.stdout.write(msgspec.json.encode(data).decode() + "\n")
        return 0
    for one in found:
        print(
            f"beside {one.open} open rooms: {one.milliseconds:.3f} ms, leanest "
            f"{_milliseconds(one.result.median('leanest'))} ms, decode waits with {one.waiting_cpu:.2%} of a core, "
            f"load {one.result.load:.1f}"
        )
    return 0


def _run_plan(options: argparse.Namespace) -> int:
    from kvbaton.bench.plan_cost import measure

    costs = [
        measure(source_tp=8, target_tp=2, layers=64, pages=2048),
        measure(source_tp=8, target_tp=8, layers=64, pages=2048),
        measure(source_tp=1, target_tp=1, layers=64, pages=2048),
    ]
    if options.json:
        sys.stdout.write(msgspec.json.encode(costs).decode() + "\n")
        return 0
    for cost in costs:
        print(
            f"TP {cost.source_tp} to {cost.target_tp}, {cost.layers} layers, {cost.pages} contiguous pages: plan "
            f"{cost.plan_seconds * 1e3:.2f} ms, entries {cost.entries_seconds * 1e3:.2f} ms, {cost.writers} writers, "
            f"{cost.entries} entries in {cost.runs} runs"
        )
    return 0


def _run_staging(options: argparse.Namespace) -> int:
    from rich.console import Console

    from kvbaton.bench.calibrate import calibrate
    from kvbaton.bench.staging import grid, measure
    from kvbaton.plan.costs import HOST_COSTS

    console = Console(stderr=True, highlight=False)
    if options.what == "calibrate":
        with console.status("calibrating") as status:
            costs = calibrate(status.update)
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(costs)).decode() + "\n")
        return 0
    costs = transfer_costs(options.transfer_costs) or HOST_COSTS
    save = _plotter().save if options.plot is not None else None
    points = []
    for number, scenario in enumerate(grid(options.rounds, options.page_size, options.interior or "NHD")):
        with console.status("starting") as status:
            points.append(measure(scenario, costs, partial(_show, status, str(number + 1))))
        point = points[-1]
        console.print(
            f"{point.run_bytes} B, {point.pages} pages: direct {point.direct_seconds * 1e3:.2f} ms, staged "
            f"{point.staged_seconds * 1e3:.2f} ms ({point.direct_seconds / point.staged_seconds:.2f} times), equal TP "
            f"{point.equal_seconds * 1e3:.2f} ms; model {'stages' if point.prefers_staging else 'writes directly'}"
        )
    if save is not None:
        save(points, options.plot)
    right = sum(point.prefers_staging == point.staging_is_faster for point in points)
    if options.json:
        sys.stdout.write(msgspec.json.encode({"right": right, "of": len(points), "points": points}).decode() + "\n")
    else:
        worst = max(point.regret for point in points)
        print(
            f"the cost model picks the faster way in {right} of {len(points)} points; at worst {worst:.2f} of its time"
        )
    return 0


def _plotter() -> ModuleType:
    try:
        from kvbaton.bench import plot
    except ModuleNotFoundError as error:
        raise ConfigError(f"--plot needs the package {error.name!r}", hint="pip install 'kvbaton[plot]'") from None
    return plot


def _show(status: Status, name: str, text: str) -> None:
    status.update(f"{name}: {text}")


def _scenarios(options: argparse.Namespace) -> Sequence[BenchScenario]:
    from kvbaton.bench.scenario import BenchScenario, suite

    if not options.suite:
        return [
            BenchScenario(
                layers=options.layers,
                pages=options.pages,
                item_bytes=options.item_bytes,
                order=options.order,
                rooms=options.rooms,
                concurrency=options.concurrency,
                source_tp=options.source_tp,
                target_tp=options.target_tp,
                page_size=options.page_size,
                chunks=options.chunks,
                interior=options.interior or "HND",
                kind=options.kind,
                plane=options.plane,
                staging=options.staging,
                rounds=options.rounds,
                seed=options.seed,
            )
        ]
    return suite(options.rounds, options.seed)


def _data(result: BenchResult) -> dict[str, object]:
    return {
        "scenario": result.scenario.name,
        "layers": result.scenario.layers,
        "pages": result.scenario.pages,
        "item_bytes": result.scenario.item_bytes,
        "order": result.scenario.order,
        "rooms": result.scenario.rooms,
        "concurrency": result.scenario.concurrency,
        "source_tp": result.scenario.source_tp,
        "target_tp": result.scenario.target_tp,
        "total_bytes": result.total_bytes,
        "verified_bytes": result.verified_bytes,
        "seconds": result.seconds,
        "median_seconds": {name: result.median(name) for name in result.seconds},
        "over": {name: result.over(name) for name in result.seconds if name != "kvbaton"},
        "cpu_seconds_per_gigabyte": {name: result.cpu_per_gigabyte(name) for name in result.cpu_seconds},
        "rooms_per_second": result.rooms_per_second,
        "load": result.load,
        "idle_cpu": result.idle_cpu,
        "evidence": result.evidence,
    }


def _print(results: Sequence[BenchResult]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="medians; a ratio is kvbaton's time over the other's", title_justify="left")
    times = ("kvbaton ms", "leanest ms", "raw ms", "/ leanest", "/ raw")
    for heading in ("scenario", "MB", *times, "CPU s/GB", "leanest's", "rooms/s", "load", "path"):
        table.add_column(heading, justify="left" if heading in ("scenario", "path") else "right")
    for result in results:
        table.add_row(
            result.scenario.name,
            f"{result.total_bytes / 1e6:.1f}",
            *(_milliseconds(result.median(name)) for name in ("kvbaton", "leanest", "raw")),
            *(_ratio(result.over(name)) for name in ("leanest", "raw")),
            *(_ratio(result.cpu_per_gigabyte(name)) for name in ("kvbaton", "leanest")),
            f"{result.rooms_per_second:.0f}",
            f"{result.load:.1f}",
            result.evidence or "unknown",
        )
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for result in results:
        checked = f"{result.verified_bytes / 1e6:.1f} MB verified"
        idle = "; ".join(f"{name} idle: {share:.2%} of a core" for name, share in result.idle_cpu.items())
        console.print(f"{result.scenario.name}: {checked}{'; ' if idle else ''}{idle}", highlight=False)


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"

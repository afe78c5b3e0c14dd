"""``python -m lab soak``: tens of thousands of rooms between two processes, aborts, kills; fails if anything grows."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from kvbaton.cli.settings import add_log_level, positive, seconds
from kvbaton.cli.signals import exit_on_sigterm
from kvbaton.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lab.soak.config import SoakConfig
    from lab.soak.run import Half


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rooms", type=positive, default=50_000, help="rooms in all, half of them for each survivor")
    parser.add_argument("--abort-percent", type=float, default=5.0, help="rooms that one of the two sides gives up")
    parser.add_argument("--restart-seconds", type=seconds, default=60.0, help="pause between two kills of the peer")
    parser.add_argument("--concurrency", type=positive, default=32, help="rooms open at a time")
    parser.add_argument("--sample-rooms", type=positive, default=500, help="rooms between two samples")
    parser.add_argument("--seed", type=int, default=0, help="of aborts and kills")
    parser.add_argument(
        "--disaggregation-transfer-backend", choices=("nixl", "memory"), default="nixl", help="how bytes travel"
    )
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write every sample here")
    parser.add_argument("--plot", type=Path, default=None, metavar="FILE", help="write an SVG here")
    add_log_level(parser)


def run(options: argparse.Namespace) -> int:
    exit_on_sigterm()
    try:
        from rich.console import Console
    except ModuleNotFoundError as error:
        raise ConfigError(f"a soak needs the package {error.name!r}", hint="pip install 'kvbaton[serve]'") from None
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from lab.soak.config import SoakConfig
    from lab.soak.judge import complaints
    from lab.soak.run import run_soak

    config = SoakConfig(
        rooms=options.rooms,
        aborts=options.abort_percent / 100,
        restart_seconds=options.restart_seconds,
        concurrency=options.concurrency,
        sample_rooms=options.sample_rooms,
        seed=options.seed,
        transport=options.disaggregation_transfer_backend,
    )
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("starting", total=config.rooms)

        def tell(survivor: str, rooms: int) -> None:
            progress.update(task, advance=rooms, description=f"the {survivor} survives")

        halves = run_soak(config, tell)
    wrong = complaints(config, halves)
    _write(options, config, halves, wrong)
    _print(config, halves, wrong)
    return 1 if wrong else 0


def _write(options: argparse.Namespace, config: SoakConfig, halves: Sequence[Half], wrong: Sequence[str]) -> None:
    from lab.soak.judge import slopes
    from lab.soak.plot import svg

    if options.json is not None:
        data = {"config": config, "halves": halves, "slopes": slopes(config, halves), "complaints": wrong}
        options.json.write_bytes(msgspec.json.encode(data))
    if options.plot is not None:
        options.plot.write_text(svg(config, halves), encoding="utf-8")


def _print(config: SoakConfig, halves: Sequence[Half], wrong: Sequence[str]) -> None:
    from lab.soak.judge import slopes

    for half in halves:
        outcomes = ", ".join(f"{count:,} {name}" for name, count in half.outcomes.most_common())
        print(f"{half.survivor} survives {half.restarts} kills of its peer in {half.seconds:.0f} s: {outcomes}")
    for slope in slopes(config, halves):
        print(
            f"{slope.survivor:<7} {slope.name:<18} {slope.least:>9,.0f} .. {slope.most:>9,.0f}   "
            f"growth {slope.growth:>+9.1f}   noise {slope.noise:>7.1f}   {'flat' if slope.ok else 'GROWS'}"
        )
    for complaint in wrong:
        print(f"NOT OK: {complaint}")

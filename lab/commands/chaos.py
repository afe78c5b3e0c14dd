"""``python -m lab chaos``: breaks a running pair in every way and phase of the matrix, and checks what follows."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from kvbaton.cli.settings import add_log_level
from kvbaton.cli.signals import exit_on_sigterm
from kvbaton.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from lab.chaos.cell import CellResult
    from lab.chaos.fault import Spec

MESSAGE_CHARACTERS = 110


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--faults", default="", help="some of the faults, separated by commas; empty: all")
    parser.add_argument("--phases", default="", help="some of the phases, separated by commas; empty: all")
    parser.add_argument("--victims", default="", help="some of the victims, separated by commas; empty: all")
    parser.add_argument("--network", default="", choices=("", "shm", "tcp"), help="one network only; empty: both")
    parser.add_argument(
        "--workers", type=int, default=0, choices=(0, 1, 2), help="of each role; 0: first one, then two"
    )
    parser.add_argument("--quick", action="store_true", help="a few cells, about half a minute")
    parser.add_argument("--json", action="store_true", help="data on stdout instead of a table")
    parser.add_argument(
        "--write", type=Path, default=None, metavar="FILE", help="also put the table into this Markdown"
    )
    parser.add_argument("--logs", type=Path, default=None, metavar="DIR", help="keep the servers' logs here")
    add_log_level(parser)


def run(options: argparse.Namespace) -> int:
    exit_on_sigterm()
    if options.write is not None:
        from lab.chaos.report import around_markers

        around_markers(options.write)  # before minutes are spent
    try:
        from rich.console import Console

        import kvbaton.serving.server.launch  # noqa: F401 - all that the servers need is here, or fail now
    except ModuleNotFoundError as error:
        raise ConfigError(f"chaos needs the package {error.name!r}", hint="pip install 'kvbaton[serve]'") from None
    specs = _chosen(options)
    console = Console(stderr=True, highlight=False)
    if options.logs is not None:
        options.logs.mkdir(parents=True, exist_ok=True)
        results = asyncio.run(_run(specs, options.logs, console))
    else:
        with tempfile.TemporaryDirectory(prefix="kvbaton-chaos-") as directory:
            results = asyncio.run(_run(specs, Path(directory), console))
    return _tell(results, options)


def _chosen(options: argparse.Namespace) -> list[Spec]:
    from lab.chaos.fault import Fault, Phase, Victim, matrix, quick

    def some(kind: type[Fault] | type[Phase] | type[Victim], text: str, flag: str) -> set[object]:
        wanted = [name.strip() for name in text.split(",") if name.strip()]
        names = {member.value: member for member in kind}
        for name in wanted:
            if name not in names:
                raise ConfigError(f"{flag} {name!r} is none of {', '.join(names)}")
        return {names[name] for name in wanted} or set(kind)

    faults = some(Fault, options.faults, "--faults")
    phases = some(Phase, options.phases, "--phases")
    victims = some(Victim, options.victims, "--victims")
    return [
        spec
        for spec in (quick() if options.quick else matrix())
        if spec.fault in faults
        and spec.phase in phases
        and spec.victim in victims
        and options.network in ("", spec.network)
        and options.workers in (0, spec.workers)
    ]


async def _run(specs: Sequence[Spec], directory: Path, console: Console) -> list[CellResult]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from lab.chaos.matrix import run_matrix
    from lab.chaos.report import cell

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("starting", total=len(specs))

        def tell(spec: Spec, result: CellResult | None) -> None:
            if result is None:
                progress.update(task, description=str(spec))
                return
            progress.advance(task)
            progress.console.print(f"{cell(result)}  {spec}", style="" if result.ok else "bold red", markup=False)
            for failure in result.failures:
                progress.console.print(f"    {failure}", style="red", markup=False)

        return await run_matrix(specs, directory, tell)


def _tell(results: Sequence[CellResult], options: argparse.Namespace) -> int:
    from lab.chaos.report import as_data, write_into

    if options.write is not None:
        write_into(options.write, results)
    if options.json:
        sys.stdout.write(msgspec.json.encode(as_data(results)).decode() + "\n")
    else:
        _print(results)
    return 0 if all(result.ok for result in results) else 1


def _print(results: Sequence[CellResult]) -> None:
    from rich.console import Console
    from rich.table import Table

    from lab.chaos.report import HEADINGS, rows, slowest

    table = Table(title="by fault, victim and phase: what the client got, and when", title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading)
    for row in rows(results):
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(table)
    for name, seconds in slowest(results).items():
        console.print(
            f"{name}: typed error within {seconds['error_seconds']:.1f} s, "
            f"next right answer within {seconds['recovery_seconds']:.1f} s"
        )
    console.print(f"{sum(result.ok for result in results)} of {len(results)} cells green; Q: quarantined meanwhile")

"""``python -m lab conformance``: every model family times every topology, compared with a single process."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from kvbaton.cli.settings import add_log_level
from kvbaton.cli.signals import exit_on_sigterm
from kvbaton.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lab.conformance.cells import Cell


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a few cells that touch every kind of pool")
    parser.add_argument("--family", action="append", metavar="NAME", help="only this family, repeatable")
    parser.add_argument("--topology", action="append", metavar="NAME", help="only this topology, repeatable")
    parser.add_argument("--keep", type=Path, default=None, metavar="DIR", help="keep checkpoints and logs there")
    parser.add_argument("--json", action="store_true", help="data on stdout instead of a table")
    add_log_level(parser)


def run(options: argparse.Namespace) -> int:
    exit_on_sigterm()
    try:
        import kvbaton.serving.server.launch  # noqa: F401 - all that the servers need is here, or fail now
        from lab.conformance import campaign
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"conformance needs the package {error.name!r}", hint="pip install 'kvbaton[serve]'"
        ) from None
    plan = campaign.choose(options.family or (), options.topology or (), quick=options.quick)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kvbaton-conformance-") as scratch:
        directory = options.keep if options.keep is not None else Path(scratch)
        directory.mkdir(parents=True, exist_ok=True)
        cells = asyncio.run(campaign.run(plan, directory, _tell))
    equal = all(cell.equal for cell in cells)
    if options.json:
        seconds = round(time.monotonic() - started, 3)
        sys.stdout.write(msgspec.json.encode({"equal": equal, "seconds": seconds, "cells": cells}).decode() + "\n")
    else:
        _print(cells)
    return 0 if equal else 1


def _tell(cell: Cell) -> None:
    verdict = "equal" if cell.equal else f"NOT EQUAL: {cell.reason}"
    print(f"{cell.family}, {cell.topology}: {verdict} ({cell.seconds:.1f} s)", file=sys.stderr, flush=True)


def _print(cells: Sequence[Cell]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="prefill → decode, against a single process", title_justify="left")
    table.add_column("family")
    topologies = list(dict.fromkeys(cell.topology for cell in cells))
    for topology in topologies:
        table.add_column(topology)
    found = {(cell.family, cell.topology): cell for cell in cells}
    for family in dict.fromkeys(cell.family for cell in cells):
        row = []
        for topology in topologies:
            cell = found.get((family, topology))
            row.append("" if cell is None else "[green]equal" if cell.equal else "[bold red]NO")
        table.add_row(family, *row)
    console = Console(width=None if sys.stdout.isatty() else 180, highlight=False)
    console.print(table)
    console.print(f"{sum(cell.equal for cell in cells)} of {len(cells)} cells equal")

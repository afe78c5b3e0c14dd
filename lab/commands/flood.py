"""``python -m lab flood``: floods a running pair in every way known, and checks that honest requests hardly notice."""

from __future__ import annotations

import argparse
import asyncio
import shutil
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

    from lab.flood.campaign import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="attacks with one of these in the name, separated by commas"
    )
    parser.add_argument("--quick", action="store_true", help="a little of each, all at once, without a look at p99")
    parser.add_argument("--json", action="store_true", help="data on stdout instead of a table")
    parser.add_argument("--logs", type=Path, default=None, metavar="DIR", help="keep the servers' logs here")
    add_log_level(parser)


def run(options: argparse.Namespace) -> int:
    exit_on_sigterm()
    try:
        import kvbaton.serving.server.launch  # noqa: F401 - all that the servers need is here, or fail now
        import lab.flood.attacks  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"a flood needs the package {error.name!r}", hint="pip install 'kvbaton[serve,dev]'"
        ) from None
    with tempfile.TemporaryDirectory(prefix="kvbaton-flood-") as scratch:
        directory = options.logs if options.logs is not None else Path(scratch)
        directory.mkdir(parents=True, exist_ok=True)
        results = asyncio.run(_run(options, directory, Path(scratch) / "model"))
    if options.json:
        from lab.flood.report import as_data

        sys.stdout.write(msgspec.json.encode(as_data(results)).decode() + "\n")
    else:
        _print(results)
    return 0 if all(result.ok for result in results) else 1


async def _run(options: argparse.Namespace, directory: Path, model: Path) -> list[Result]:
    from kvbaton.serving.fleet import Fleet
    from kvbaton.serving.models import builtin
    from lab.flood.attacks import ENDLESS, FULL, SMALL, attacks_on
    from lab.flood.campaign import run as run_campaign

    sizes = SMALL if options.quick else FULL
    shutil.copytree(builtin("recall"), model)
    (model / "chat_template.jinja").write_text(ENDLESS, encoding="utf-8")
    async with Fleet(directory, model=str(model), reference=True) as fleet:
        await fleet.all_ready()
        wanted = options.only.split(",")
        every = await attacks_on(fleet, sizes, template=True)
        attacks = [one for one in every if any(text in one.name for text in wanted)]
        if not attacks:
            raise ConfigError(f"--only {options.only!r}: no attack has any of this in its name")
        waves = [attacks] if options.quick else [[attack] for attack in attacks]
        progress = Progress(len(waves))
        return await run_campaign(fleet, waves, sizes, progress.begin, progress.tell, judge_p99=not options.quick)


class Progress:
    """What goes on, line by line on stderr, of ``total`` waves."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._number = 0
        self._started = time.monotonic()

    def begin(self, name: str) -> None:
        self._number += 1
        self._say(name)

    def tell(self, result: Result) -> None:
        usual, during = result.p99_seconds
        verdict = "; ".join(result.complaints) or "ok"
        self._say(f"p99 {usual:.2f} s, {during:.2f} s during: {result.ratio:.1f} times: {verdict}")

    def _say(self, words: str) -> None:
        passed = time.monotonic() - self._started
        print(f"[{passed:4.0f} s, {self._number} of {self._total}] {words}", file=sys.stderr, flush=True)


def _print(results: Sequence[Result]) -> None:
    from rich.console import Console
    from rich.table import Table

    from lab.flood.report import HEADINGS, row

    table = Table(title="honest requests during floods", title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading)
    for result in results:
        table.add_row(*row(result), style="" if result.ok else "bold red")
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(table)
    for result in results:
        for complaint in result.complaints:
            console.print(f"NOT OK: {result.name}: {complaint}", markup=False)

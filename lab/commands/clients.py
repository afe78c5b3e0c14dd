"""``python -m lab clients``: clients of others, their own code, in front of our servers."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

import msgspec

from kvbaton.cli.settings import positive
from kvbaton.cli.signals import exit_on_sigterm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object a row on stdout")
    parser.add_argument("--questions", type=positive, default=200, help="recall questions for each router")
    parser.add_argument("--venv", type=Path, default=Path(".venv-clients"), help="the clients' environment")
    parser.add_argument("--build", type=Path, default=Path("build/clients"), help="where logs go")


def run(options: argparse.Namespace) -> int:
    exit_on_sigterm()
    from lab.clients.campaign import Row, perform
    from lab.clients.environment import prepare

    python = prepare(options.venv.absolute())
    options.build.mkdir(parents=True, exist_ok=True)

    def tell(row: Row) -> None:
        if options.json:
            print(msgspec.json.encode(row).decode(), flush=True)
        mark = "ok  " if row.ok == row.asked else "FAIL"
        said = f": {row.said}" if row.said else ""
        line = f"{mark} {row.client}: {row.what}: {row.ok} of {row.asked} ({row.seconds:.0f} s){said}"
        print(line, file=sys.stderr, flush=True)

    rows = asyncio.run(perform(python, options.build.absolute(), count=options.questions, tell=tell))
    return 0 if rows and all(row.ok == row.asked for row in rows) else 1

"""``python -m lab real``: a model that people use, single and as a pair."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from kvbaton.cli.settings import positive
from kvbaton.cli.signals import exit_on_sigterm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=positive, default=24, help="of lm-eval's task")
    parser.add_argument("--venv", type=Path, default=Path(".venv-real"), help="its environment, made if missing")
    parser.add_argument("--model", type=Path, default=Path("build/models/smollm2"), help="made if it is not there")
    parser.add_argument("--build", type=Path, default=Path("build/real"), help="where logs go")


def run(options: argparse.Namespace) -> int:
    exit_on_sigterm()
    from lab.clients.row import Row
    from lab.real.campaign import perform
    from lab.real.environment import convert, prepare

    python = prepare(options.venv.absolute())
    model, build = options.model.absolute(), options.build.absolute()
    convert(python, model)
    build.mkdir(parents=True, exist_ok=True)
    print("| | equal | s | printed |\n|---|---|---|---|", flush=True)

    def tell(row: Row) -> None:
        line = f"| {row.client}: {row.what} | {row.ok} of {row.asked} | {row.seconds:.0f} | {row.said} |"
        print(line, flush=True)

    rows = asyncio.run(perform(python, model, build, samples=options.samples, tell=tell))
    return 0 if all(row.ok == row.asked for row in rows) else 1

"""``python -m lab sglang``: the transfer backend in real SGLang processes, token for token, and with every failure."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

import msgspec

from kvbaton.cli.signals import exit_on_sigterm
from kvbaton.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scene", default="", help="only scenes with this in their name")
    parser.add_argument("--case", default="", help="only cases with this in their name")
    parser.add_argument("--json", action="store_true", help="one JSON object a row on stdout")
    parser.add_argument("--venv", type=Path, default=Path(".venv-sglang"), help="SGLang's environment, made if missing")
    parser.add_argument("--build", type=Path, default=Path("build/sglang"), help="where models and logs go")


def run(options: argparse.Namespace) -> int:
    exit_on_sigterm()
    from lab.sglang.campaign import PLAYS, Row, perform
    from lab.sglang.environment import prepare

    plays = [play for play in PLAYS if options.scene in play.name]
    if not plays:
        raise ConfigError(f"no scene is called {options.scene!r}; there are: {', '.join(play.name for play in PLAYS)}")
    python = prepare(options.venv.absolute())
    logs = options.build / "logs"
    logs.mkdir(parents=True, exist_ok=True)

    def tell(row: Row) -> None:
        if options.json:
            print(msgspec.json.encode(row).decode(), flush=True)
        mark = "ok  " if row.ok else "FAIL"
        print(f"{mark} {row.scene}: {row.case} ({row.seconds:.0f} s): {row.said}", file=sys.stderr, flush=True)

    rows = asyncio.run(
        perform(plays, only=options.case, python=python, models=options.build / "models", logs=logs, tell=tell)
    )
    print(f"{sum(row.ok for row in rows)} of {len(rows)} cases green", file=sys.stderr)
    return 0 if rows and all(row.ok for row in rows) else 1

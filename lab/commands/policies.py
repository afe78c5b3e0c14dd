"""``python -m lab policies``: the router's policies in front of the same servers, under the same loads, by turns."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

import msgspec

from kvbaton.cli.settings import add_log_level, positive
from kvbaton.cli.signals import exit_on_sigterm
from kvbaton.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=positive, default=5, help="of each policy under each load, by turns")
    parser.add_argument("--requests", type=positive, default=96, help="of a round")
    parser.add_argument("--concurrency", type=positive, default=8)
    parser.add_argument("--decodes", type=positive, default=3, help="decode servers")
    parser.add_argument("--plot", type=Path, default=None, metavar="FILE", help="a picture, .svg or .png")
    parser.add_argument("--json", action="store_true", help="data on stdout, every round")
    parser.add_argument("--logs", type=Path, default=None, metavar="DIR", help="keep the servers' logs here")
    add_log_level(parser)


def run(options: argparse.Namespace) -> int:
    exit_on_sigterm()
    from lab.policies.campaign import HEADINGS, Measured, compare

    if options.plot is not None:
        try:
            from lab.policies import plot
        except ModuleNotFoundError as error:
            raise ConfigError(f"--plot needs the package {error.name!r}", hint="pip install 'kvbaton[plot]'") from None
    with tempfile.TemporaryDirectory(prefix="kvbaton-policies-") as scratch:
        directory = options.logs if options.logs is not None else Path(scratch)
        directory.mkdir(parents=True, exist_ok=True)
        found = asyncio.run(
            compare(
                directory,
                decodes=options.decodes,
                requests=options.requests,
                concurrency=options.concurrency,
                rounds=options.rounds,
                tell=lambda text: print(text, file=sys.stderr, flush=True),
            )
        )
    if options.plot is not None:
        plot.save(found, options.plot)
    if options.json:
        sys.stdout.write(msgspec.json.encode(found).decode() + "\n")
        return 0
    firsts: dict[str, Measured] = {}
    rows = [HEADINGS, ["---"] * len(HEADINGS), *(one.row(firsts.setdefault(one.workload, one)) for one in found)]
    for row in rows:
        print(f"| {' | '.join(row)} |")
    loads = [load for one in found for load in one.loads]
    print(f"load of the machine {min(loads):.1f} to {max(loads):.1f}", file=sys.stderr)
    return 0

"""``python -m lab failover``: strikes one of two workers under load, and shows that no client notices."""

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
    from lab.failover.campaign import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--faults", default="kill,stop", help="some of kill, stop, term, separated by commas")
    parser.add_argument("--victims", default="decode,prefill", help="decode, prefill, or all: one after the other")
    parser.add_argument("--requests", type=int, default=400, help="of each load; half of them stream")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--json", action="store_true", help="data on stdout instead of a table")
    parser.add_argument("--logs", type=Path, default=None, metavar="DIR", help="keep the servers' logs here")
    add_log_level(parser)


def run(options: argparse.Namespace) -> int:
    exit_on_sigterm()
    from lab.failover.campaign import FAULTS, VICTIMS

    faults = [name for name in options.faults.split(",") if name]
    victims = [name for name in options.victims.split(",") if name]
    for flag, names, known in (("--faults", faults, FAULTS), ("--victims", victims, (*VICTIMS, "all"))):
        for name in names:
            if name not in known:
                raise ConfigError(f"{flag} {name!r} is none of {', '.join(known)}")
    with tempfile.TemporaryDirectory(prefix="kvbaton-failover-") as scratch:
        directory = options.logs if options.logs is not None else Path(scratch)
        directory.mkdir(parents=True, exist_ok=True)
        results = asyncio.run(_run(options, faults, victims, directory))
    if options.json:
        sys.stdout.write(msgspec.json.encode(results).decode() + "\n")
    else:
        for line in _lines(results):
            sys.stdout.write(line + "\n")
    return 0 if all(result.ok for result in results) else 1


async def _run(options: argparse.Namespace, faults: list[str], victims: list[str], directory: Path) -> list[Result]:
    from kvbaton.serving.fleet import Fleet
    from lab.failover.campaign import run_fault
    from lab.failover.load import expectations

    results = []
    async with Fleet(directory, model="recall", prefills=2, decodes=2, reference=True) as fleet:
        await fleet.all_ready()
        if fleet.reference is None:
            raise ConfigError("the fleet has no single process")
        expected = await expectations(fleet.http, fleet.reference.url, max_tokens=options.max_tokens)
        await fleet.reference.stop()
        servers = {
            "decode": fleet.decodes[:1],
            "prefill": fleet.prefills[:1],
            "all": [*fleet.decodes, *fleet.prefills],
        }
        for fault in faults:
            for victim in victims:
                one = await run_fault(fleet, fault, servers[victim], expected, options.requests, options.concurrency)
                results.append(one)
                for line in _lines([one]):
                    sys.stderr.write(line + "\n")
    return results


def _lines(results: list[Result]) -> list[str]:
    lines = []
    for one in results:
        lines.append(
            f"{one.fault} {', '.join(one.victims)}: {sum(one.failures.values())} of {one.requests} failed or differ; "
            f"longest pause of a stream {one.longest_pause_seconds:.1f} s; {one.retries} attempts after the first, "
            f"{one.resumed} answers went on elsewhere, {one.recomputed_tokens} tokens computed again, "
            f"{one.handed_on} answers handed on"
        )
        lines += [f"    {count} x {text}" for text, count in one.failures.most_common(5)]
        lines += [f"    {one.left_behind}"] if one.left_behind else []
    return lines

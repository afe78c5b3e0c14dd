"""``python -m lab throughput``: the embedded engine against transformers' ``generate``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import msgspec

from kvbaton.cli.settings import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=positive, default=5, help="of each contestant, in turn")
    parser.add_argument("--threads", type=positive, default=2, help="torch's threads, for both")
    parser.add_argument("--model", type=Path, default=Path("build/models/throughput"), help="made if it is not there")
    parser.add_argument("--only", metavar="PROMPTS", type=positive, help="only the size of so many prompts")
    parser.add_argument("--json", action="store_true", help="one JSON object a size on stdout, with every round")


def run(options: argparse.Namespace) -> int:
    from lab.rounds import SUITE
    from lab.throughput import Throughput

    bench = Throughput(options.model, options.threads)
    if not options.json:
        print(
            "| prompts x tokens + answer | engine tokens/s | generate tokens/s | ratio | of processor time | picking |"
        )
        print("|---|---|---|---|---|---|")
    differ = 0
    for scenario in SUITE:
        if options.only not in (None, scenario.prompts):
            continue
        result = bench.measure(scenario, options.rounds)
        differ += result.answers - result.equal
        if options.json:
            print(msgspec.json.encode(result).decode(), flush=True)
        else:
            print(
                f"| {scenario} | {result.tokens_per_second(result.engine):.1f} "
                f"| {result.tokens_per_second(result.generate):.1f} | {result.wall_ratio:.2f} "
                f"| {result.processor_ratio:.2f} | {result.picking:.2%} |",
                flush=True,
            )
        load = os.getloadavg()[0]
        print(f"{scenario}: {result.equal} of {result.answers} answers equal; load {load:.1f}", file=sys.stderr)
    return 1 if differ else 0

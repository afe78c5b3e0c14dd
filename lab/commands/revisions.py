"""``python -m lab revisions``: the embedded engine before and after, in turns."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from statistics import median

from kvbaton.cli.settings import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", metavar="REVISION", help="what git calls it")
    parser.add_argument("--rounds", type=positive, default=7, help="of each revision, in turn")
    parser.add_argument("--threads", type=positive, default=2, help="torch's threads, for both")
    parser.add_argument("--model", type=Path, default=Path("build/models/throughput"), help="made if it is not there")
    parser.add_argument("--build", type=Path, default=Path("build/revisions"), help="where the other's sources go")
    parser.add_argument("--only", metavar="PROMPTS", type=positive, help="only the size of so many prompts")


def run(options: argparse.Namespace) -> int:
    from lab.revisions import ROOT, Contestant, compare, sources
    from lab.rounds import SUITE, write_model

    model = options.model.absolute()
    write_model(model)
    source = sources(options.before, options.build.absolute() / options.before.replace("/", "-"))
    print("| prompts x tokens + answer | before, tokens/s | after, tokens/s | time | processor time | equal |")
    print("|---|---|---|---|---|---|")
    differ = 0
    with (
        Contestant(source, model, options.threads) as before,
        Contestant(ROOT / "src", model, options.threads) as after,
    ):
        for scenario in SUITE:
            if options.only not in (None, scenario.prompts):
                continue
            found = compare(before, after, scenario, options.rounds)
            differ += found.answers - found.equal
            rates = [
                scenario.tokens_per_second(median(one.wall for one in each)) for each in (found.before, found.after)
            ]
            print(
                f"| {scenario} | {rates[0]:.1f} | {rates[1]:.1f} | {found.wall_ratio:.3f} "
                f"| {found.processor_ratio:.3f} | {found.equal} of {found.answers} |",
                flush=True,
            )
            print(f"{scenario}: load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    return 1 if differ else 0

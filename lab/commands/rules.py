"""``python -m lab rules``: takes each rule of the deployment out of the source; its tests must fail."""

from __future__ import annotations

import argparse
import os

from lab.mutation.rules import campaign


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", default="", metavar="WORDS", help="those whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="at a time")


def run(options: argparse.Namespace) -> int:
    return campaign(options.only, options.jobs)

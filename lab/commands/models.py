"""``python -m lab models``: a tiny random checkpoint of every model family, for servers and for the other engines."""

from __future__ import annotations

import argparse
import time
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", nargs="?", type=Path, default=Path("build/models"), help="where they go")
    parser.add_argument("--family", action="append", metavar="NAME", help="only this family, repeatable")


def run(options: argparse.Namespace) -> int:
    from lab.conformance.families import FAMILIES, write_model

    for family in options.family or FAMILIES:
        started = time.perf_counter()
        write_model(family, options.directory / family)
        print(f"{options.directory / family}: {time.perf_counter() - started:.1f} s", flush=True)
    return 0

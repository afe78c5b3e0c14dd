"""``python -m lab mutate``: mutation testing of the protocol."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from lab.mutation.mutants import LIMIT_SECONDS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sample", type=int, default=300, help="mutants to try, drawn at random; 0: all")
    parser.add_argument("--seed", type=int, default=1, help="of the draw")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="at a time")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="seconds until a mutant counts as hanging")
    parser.add_argument("--only", default="", metavar="NAME", help="only modules whose name contains this")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write all verdicts there")
    parser.add_argument(
        "--from", type=Path, default=None, dest="recorded", metavar="FILE", help="run none: what --json wrote"
    )
    parser.add_argument("--again", action="store_true", help="with --from: try once more what lived")
    parser.add_argument(
        "--write", type=Path, default=None, metavar="FILE", help="put score and survivors into this Markdown"
    )


def run(options: argparse.Namespace) -> int:
    from lab.mutation.mutants import campaign

    return campaign(options)

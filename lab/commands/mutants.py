"""``python -m lab mutants``: plants each bug of the field in the simulator, and writes which seed finds it.

A change of ``generate.py`` makes other scenarios of the seeds: then all of them have to be run again.
"""

from __future__ import annotations

import argparse
import logging
import sys

from lab.docs import mutants
from lab.docs.mutants import MOST_SEEDS, MUTANTS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", default="", metavar="NAME", help="those whose name contains this; the others stay")
    parser.add_argument("--most", type=int, default=MOST_SEEDS, help="seeds from 0 on that a mutant may take")


def run(options: argparse.Namespace) -> int:
    logging.getLogger("kvbaton").setLevel(logging.CRITICAL)  # drivers warn of what is done to them on purpose
    page = mutants.PAGE.read_text(encoding="utf-8")
    shown = mutants.known(page)
    for mutant in MUTANTS:
        if options.only in mutant.name:
            shown[mutant.name] = mutants.show(mutant, options.most)
            print(f"{mutant.name}: {' '.join(shown[mutant.name])}", file=sys.stderr, flush=True)
    mutants.PAGE.write_text(mutants.rewritten(page, shown), encoding="utf-8")
    return 0

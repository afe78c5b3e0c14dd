"""Write the planted mutants of tests/sim into docs/simulation.md: what each plants, the first seed that shows it.

    python tools/mutant_table.py                 run all of them (minutes), rewrite the table
    python tools/mutant_table.py --only NAME     run those whose name contains NAME; the others keep their seeds
    python tools/mutant_table.py --names         run none: names and texts anew, known seeds stay
    python tools/mutant_table.py --check         run none; exit 1 if a name or a text is out of date

A change of ``generate.py`` makes other scenarios of the seeds: then all of them have to be run again.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "sim"))

from page import filled, settle, split  # noqa: E402 - sorted with the others
from sim_mutants import MUTANTS, Mutant  # noqa: E402 - it is no package
from test_mutants import MOST_SEEDS, first_failure  # noqa: E402 - it is no package

PAGE = ROOT / "docs" / "simulation.md"
START, END = "<!-- mutants -->", "<!-- /mutants -->"
#: The last two columns of a row: the first seed, and the invariant that it breaks.
Shown = tuple[str, str]


def show(mutant: Mutant, most: int) -> Shown:
    """Run one mutant until a seed shows it."""
    failed = first_failure(mutant, range(most))
    return (str(failed.scenario.seed), failed.kind) if failed is not None else (f"none below {most}", "")


def table(shown: Mapping[str, Shown]) -> str:
    lines = ["| mutant | what it plants | first seed | breaks |", "|---|---|---|---|"]
    for mutant in MUTANTS:
        seed, kind = shown.get(mutant.name, ("", ""))
        lines.append(f"| {mutant.name} | {mutant.what} | {seed} | {kind} |")
    return "\n".join(lines)


def known(page: str) -> dict[str, Shown]:
    """The seeds that the page has, by the name of their mutant."""
    found = {}
    for line in split(PAGE, page, START, END)[1].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4:
            found[cells[0]] = (cells[2], cells[3])
    return found


def rewritten(page: str, shown: Mapping[str, Shown]) -> str:
    return filled(PAGE, page, START, END, table(shown))


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the planted mutants into docs/simulation.md.")
    parser.add_argument("--only", metavar="NAME", help="run those whose name contains this")
    parser.add_argument("--most", type=int, default=MOST_SEEDS, help="seeds from 0 on that a mutant may take")
    parser.add_argument("--names", action="store_true", help="run none")
    parser.add_argument("--check", action="store_true", help="run none, change nothing; exit 1 if out of date")
    options = parser.parse_args()
    logging.getLogger("kvbaton").setLevel(logging.CRITICAL)  # drivers warn of what is done to them on purpose
    page = PAGE.read_text(encoding="utf-8")
    shown = known(page)
    chosen = [] if options.names or options.check else [m for m in MUTANTS if (options.only or "") in m.name]
    for mutant in chosen:
        shown[mutant.name] = show(mutant, options.most)
        print(f"{mutant.name}: {' '.join(shown[mutant.name])}", file=sys.stderr, flush=True)
    return settle(PAGE, rewritten(page, shown), check=options.check, command="tools/mutant_table.py --names")


if __name__ == "__main__":
    raise SystemExit(main())

"""Write the planted mutants of tests/sim into docs/simulation.md: what each plants, the first seed that shows it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "sim"))

from sim_mutants import MUTANTS, Mutant  # noqa: E402 - it is no package
from test_mutants import MOST_SEEDS, first_failure  # noqa: E402 - it is no package

from lab.docs.page import filled, split  # noqa: E402 - sorted with the others

__all__ = ["MOST_SEEDS", "MUTANTS", "PAGE", "known", "rewritten", "show"]

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


def rewritten(page: str, shown: Mapping[str, Shown] | None = None) -> str:
    """The page with names and texts as they are now; what was ``shown`` before stays where nothing new is known."""
    return filled(PAGE, page, START, END, table(known(page) if shown is None else shown))

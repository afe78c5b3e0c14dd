"""The security page says nothing that no test tries: each row of its tables names tests, and they exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "security.md"
#: Figures of runs, which are no claims.
FIGURES = "How it is tested"
#: Lines that say what is trusted, title included.
FIRST_LINES = 10


def functions() -> set[str]:
    """Names of all test functions."""
    return {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path)))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def rows() -> Iterator[tuple[str, list[str]]]:
    """Section and cells of every row below a table's heading."""
    section, is_head = "", True
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line[3:]
        if not line.startswith("|"):
            is_head = True
        elif re.fullmatch(r"[|\s:-]+", line):
            is_head = False
        elif not is_head:
            yield section, [cell.strip() for cell in line.strip("|").split(" | ")]


def named(text: str) -> list[str]:
    return re.findall(r"`(test_\w+)`", text)


def test_every_claim_names_tests_that_exist() -> None:
    known, claims = functions(), [cells for section, cells in rows() if section != FIGURES]
    assert len(claims) > 50
    without = [cells[0] for cells in claims if not named(cells[-1])]
    assert not without, "claims without a test"
    missing = {name for cells in claims for name in named(cells[-1])} - known
    assert not missing, "tests that do not exist"


def test_every_test_that_the_page_names_exists() -> None:
    assert not set(named(PAGE.read_text(encoding="utf-8"))) - functions()


def test_what_is_trusted_is_said_first() -> None:
    first = "\n".join(PAGE.read_text(encoding="utf-8").splitlines()[:FIRST_LINES])
    for said in ("data network is trusted", "namespaces", "NetworkPolicy", "RDMA partitions", "owns the process"):
        assert said in first
    assert "owns the memory of all ranks" in first
    assert "have no authentication" in " ".join(first.split())


def test_what_is_false_is_not_said() -> None:
    assert "only registered regions can be written" not in PAGE.read_text(encoding="utf-8")

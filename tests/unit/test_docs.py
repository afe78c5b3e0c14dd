"""What the documents say is still true: generated parts, links, commands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvbaton.cli.main import build_parsers

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("bench/*.md")])


@pytest.mark.parametrize("tool", ["protocol_diagram", "flags_table", "mutant_table"])
def test_generated_parts_are_up_to_date(tool: str) -> None:
    command = [sys.executable, f"tools/{tool}.py", "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    local = [target for target in targets if "://" not in target]
    missing = [target for target in local if not (page.parent / target).exists()]
    assert not missing, f"{page.name} links to {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_exist(page: Path) -> None:
    _, parsers = build_parsers()
    text = page.read_text()
    named = set(re.findall(r"\bkvbaton ([a-z]+)\b", " ".join(re.findall(r"`([^`]*)`", text))))
    assert named <= set(parsers), f"{page.name} names commands that do not exist: {named - set(parsers)}"


def test_make_words_exist() -> None:
    words = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = " ".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"`make ([a-z]+)`", text))
    assert named <= words, f"no such words: {named - words}"

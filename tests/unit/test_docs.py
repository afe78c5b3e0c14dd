"""What the documents say is still true: generated parts, links, commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvbaton.cli.main import KVBATON
from lab.commands import LAB
from lab.commands.docs import GENERATED

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("bench/*.md")])


@pytest.mark.parametrize("page", GENERATED, ids=lambda p: p.name)
def test_generated_parts_are_up_to_date(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert GENERATED[page](text) == text, "run make docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    local = [target for target in targets if "://" not in target]
    missing = [target for target in local if not (page.parent / target).exists()]
    assert not missing, f"{page.name} links to {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_exist(page: Path) -> None:
    prose = re.sub(r"```python\n.*?```", "", page.read_text(), flags=re.DOTALL)
    text = "\n".join(re.findall(r"`([^`]*)`", prose))
    for program, words in ((KVBATON, r"\bkvbaton ([a-z]+)\b"), (LAB, r"\bpython -m lab ([a-z]+)\b")):
        named = set(re.findall(words, text))
        missing = named - program.commands.keys()
        assert not missing, f"{page.name} names commands of {program.name} that do not exist: {missing}"


def test_make_words_exist() -> None:
    words = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = " ".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"`make ([a-z]+)`", text))
    assert named <= words, f"no such words: {named - words}"

"""The page of advisories is about the versions that are pinned: every package that the library and [serve] need."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
ROWS = re.findall(r"^\| ([\w.-]+) \| ([\w.]+) \|", (ROOT / "docs" / "advisories.md").read_text(), re.MULTILINE)
#: Installed as it is found: no version is pinned.
UNPINNED = "none"


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {canonical(name): version for name, _, version in (line.partition("==") for line in lines) if version}


def needed(name: str, extras: set[str], found: set[str]) -> set[str]:
    """What a package needs here, and what that needs."""
    try:
        lines = requires(name) or ()
    except PackageNotFoundError:
        return found
    for requirement in map(Requirement, lines):
        wanted = requirement.marker is None or any(requirement.marker.evaluate({"extra": one}) for one in ("", *extras))
        if wanted and (child := canonical(requirement.name)) not in found:
            found.add(child)
            needed(child, requirement.extras, found)
    return found


def test_versions_are_the_pinned_ones() -> None:
    told = {canonical(name): version for name, version in ROWS if name != "package"}
    assert len(told) > 40
    assert {name: version for name, version in told.items() if version != pinned().get(name, UNPINNED)} == {}


def test_every_package_that_is_needed_and_pinned_is_there() -> None:
    told = {canonical(name) for name, _ in ROWS}
    assert (needed("kvbaton", {"serve", "cu12"}, set()) & pinned().keys()) - told == set()

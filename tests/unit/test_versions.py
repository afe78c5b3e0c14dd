"""The declared ranges: every direct dependency has a floor, and only what is wrong here fails a test."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from lab.floors import floors

ROOT = Path(__file__).parents[2]


def test_every_direct_dependency_has_a_floor_and_is_pinned() -> None:
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name, _, version = line.partition("==")
        pinned[name.lower().replace("_", "-")] = version
        assert line.startswith("#") or ("://" not in line and "--hash" not in line)
    for floor in floors((ROOT / "pyproject.toml").read_text()):
        name, _, version = floor.partition("==")
        assert numbers(pinned[name.lower().replace("_", "-")]) >= numbers(version), name
    with pytest.raises(ValueError, match="'numpy' has no lower bound"):
        floors('[project]\ndependencies = ["numpy"]\noptional-dependencies = {serve=[], cu12=[], dev=[]}')


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


@pytest.mark.parametrize("category", [FutureWarning, DeprecationWarning])
def test_what_others_announce_fails_nothing_even_where_it_names_our_line(category: type[Warning]) -> None:
    """A new transformers made 294 tests fail with a FutureWarning about a name of an argument."""
    with warnings.catch_warnings(record=True):
        warnings.warn_explicit("`a` is `b` now", category, "runner.py", 1, module="kvbaton.serving.engine.runner")
        warnings.warn_explicit("overflow", RuntimeWarning, "cache.py", 1, module="transformers.cache_utils")


@pytest.mark.parametrize("category", [RuntimeWarning, UserWarning, SyntaxWarning])
def test_what_is_wrong_here_fails(category: type[Warning]) -> None:
    with pytest.raises(category, match="overflow"):
        warnings.warn_explicit("overflow", category, "pair.py", 1, module="kvbaton.plan.pair")
    with pytest.raises(ResourceWarning):
        warnings.warn_explicit("unclosed", ResourceWarning, "socket.py", 1, module="socket")

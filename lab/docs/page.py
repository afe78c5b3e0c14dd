"""Markdown pages that are generated in part: what stands between two markers, and whether it is up to date."""

from __future__ import annotations

from pathlib import Path

from kvbaton.errors import ConfigError


def split(path: Path, text: str, start: str, end: str) -> tuple[str, str, str]:
    """What stands before, between and behind the markers of a page's text. Raises ConfigError where there are none."""
    head, found, rest = text.partition(start)
    inner, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ConfigError(f"{path} has no lines {start} and {end}")
    return head, inner, tail


def filled(path: Path, text: str, start: str, end: str, part: str) -> str:
    """The text with ``part`` between its markers. Raises ConfigError."""
    head, _, tail = split(path, text, start, end)
    return f"{head}{start}\n\n{part}\n\n{end}{tail}"

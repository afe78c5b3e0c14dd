"""Markdown pages that are generated in part: what stands between two markers, and whether it is up to date."""

from __future__ import annotations

import sys
from pathlib import Path

from kvbaton.errors import ConfigError


def split(path: Path, text: str, start: str, end: str) -> tuple[str, str, str]:
    """What stands before, between and behind the markers of a page's text. Raises ConfigError where there are none."""
    head, found, rest = text.partition(start)
    inner, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ConfigError(f"{path} has no {start} and {end}")
    return head, inner, tail


def filled(path: Path, text: str, start: str, end: str, part: str) -> str:
    """The text with ``part`` between its markers. Raises ConfigError."""
    head, _, tail = split(path, text, start, end)
    return f"{head}{start}\n\n{part}\n\n{end}{tail}"


def settle(path: Path, wanted: str, *, check: bool, command: str) -> int:
    """Write the page if it is not as ``wanted``; with ``check`` only say so. The exit code."""
    if path.read_text(encoding="utf-8") == wanted:
        return 0
    if check:
        print(f"docs/{path.name} is out of date\nhint: run python {command}", file=sys.stderr)
        return 1
    path.write_text(wanted, encoding="utf-8")
    return 0

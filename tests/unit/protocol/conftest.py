"""After these tests: which cells of the transition table they reached."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvbaton.protocol.table import TABLE, Ignored, Illegal
from unit.protocol.scene import REACHED, collect


@pytest.fixture(autouse=True)
def _collect_counters() -> Iterator[None]:
    yield
    collect()


def unreached() -> dict[str, list[str]]:
    """Cells that no test reached, by kind of rule."""
    missing: dict[str, list[str]] = {"handler": [], "ignored": [], "illegal": []}
    for state, rules in TABLE.items():
        for on, rule in rules.items():
            kind = "ignored" if isinstance(rule, Ignored) else "illegal" if isinstance(rule, Illegal) else "handler"
            if not REACHED[f"{state.value}:{on.value}"]:
                missing[kind].append(f"{state.value}:{on.value}")
    return missing


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    collect()
    if not REACHED:
        return
    total = sum(len(rules) for rules in TABLE.values())
    missing = unreached()
    reached = total - sum(map(len, missing.values()))
    terminalreporter.write_line(f"transition table: {reached} of {total} cells reached by the tests of the protocol")
    if terminalreporter.verbosity > 0:
        for kind, cells in missing.items():
            terminalreporter.write_line(f"  not reached, {kind}: {', '.join(cells) or 'none'}")

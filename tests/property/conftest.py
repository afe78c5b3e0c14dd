"""After the properties: how many cases ran, and on which pools."""

from __future__ import annotations

import pytest
from property_cases import COUNTED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if COUNTED:
        pools = ", ".join(f"{name} in {count}" for name, count in sorted(COUNTED.items()) if name != "cases")
        terminalreporter.write_line(
            f"plan properties: {COUNTED['cases']} layouts resharded without a difference ({pools})"
        )

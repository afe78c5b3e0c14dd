"""Prints the lowest versions that pyproject.toml declares, as constraints: what ``make oldest`` installs.

Run by any Python, before anything is installed.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

EXTRAS = ("serve", "cu12", "dev")
_FLOOR = re.compile(r"^([\w.-]+)(?:\[[\w,]+\])?\s*(?:>=|==)\s*([\w.]+)")


def floors(text: str) -> list[str]:
    """``name==version`` of every direct dependency. Raises ValueError for one without a lower bound."""
    project = tomllib.loads(text)["project"]
    wanted = [*project["dependencies"], *(one for extra in EXTRAS for one in project["optional-dependencies"][extra])]
    found = []
    for requirement in wanted:
        match = _FLOOR.match(requirement)
        if match is None:
            raise ValueError(f"pyproject.toml: {requirement!r} has no lower bound")
        found.append(f"{match[1]}=={match[2]}")
    return sorted(set(found))


if __name__ == "__main__":
    print("\n".join(floors((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))))

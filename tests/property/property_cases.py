"""How many cases the properties of the plan run, and how many they ran."""

from __future__ import annotations

import os
from collections import Counter

#: All properties together, in the default run.
DEFAULT_CASES = 600
CASES = int(os.environ.get("KVBATON_PROPERTY_CASES", DEFAULT_CASES))
COUNTED: Counter[str] = Counter()


def share(part: float) -> int:
    """Cases of one property."""
    return max(1, round(CASES * part))

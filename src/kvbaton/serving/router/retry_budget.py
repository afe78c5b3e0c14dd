"""How many attempts all requests together may repeat, so that a broken deployment is not asked ever more.

This file must not know what a request is.
"""

from __future__ import annotations

#: What each request earns: in the long run so many retries for one request.
EARNED = 0.2


class RetryBudget:
    """Starts full, with one retry for each request that may be in flight: the death of a worker costs as many."""

    def __init__(self, most: int) -> None:
        self._most = float(most)
        self._left = float(most)

    def earn(self) -> None:
        """A request has come."""
        self._left = min(self._most, self._left + EARNED)

    def spend(self) -> bool:
        """Take one retry. False if none is left."""
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True

    def __repr__(self) -> str:
        return f"<RetryBudget {self._left:.0f} of {self._most:.0f}>"

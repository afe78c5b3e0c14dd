"""How often a link may make us answer what no session asked for: greetings, and messages of strangers.

A correct peer repeats a greeting at most every ``retry_seconds``; whoever says more is answered less. So an answer that
is larger than its question (our Hello names all of our memory) is no lever, and a flood of nonsense costs its reading.
"""

from __future__ import annotations

from collections import OrderedDict

from kvbaton.control.base import LinkId

#: Answers that a link gets at once, and how many more it gets each second.
BURST = 16
ANSWERS_PER_SECOND = 4.0
#: Most links that are remembered; the one that was answered longest ago is forgotten first.
MAX_LINKS = 4_096


class Allowance:
    """See the module. ``now`` as everywhere in the core: seconds, only forward."""

    def __init__(self) -> None:
        self._left: OrderedDict[LinkId, tuple[float, float]] = OrderedDict()  # answers left, at which time

    def __len__(self) -> int:
        return len(self._left)

    def take(self, link: LinkId, now: float) -> bool:
        """Whether this link may be answered once more, now."""
        left, at = self._left.pop(link, (float(BURST), now))
        left = min(float(BURST), left + (now - at) * ANSWERS_PER_SECOND)
        granted = left >= 1.0
        self._left[link] = (left - 1.0 if granted else left, now)
        if len(self._left) > MAX_LINKS:
            self._left.popitem(last=False)
        return granted

"""One end of message links under observation, for tests: everything that it ever gave."""
# ruff: noqa: S101 - assertions are what a test says

from __future__ import annotations

import time
from collections.abc import Callable

from kvbaton.control.base import Arrived, Changed, LinkChange, LinkId, Links

#: Longest time that anything may take.
DEADLINE_SECONDS = 10.0
#: Longest nap while several ends have to be served in turn.
_NAP_SECONDS = 0.005


class Log:
    """One end under observation: its links and everything they ever gave."""

    def __init__(self, links: Links) -> None:
        self.links = links
        self.items: list[Arrived | Changed] = []

    def step(self) -> None:
        """Wait a moment, take what is there."""
        self.links.wait(_NAP_SECONDS)
        self.items.extend(self.links.receive())

    def changes(self, link: LinkId) -> list[LinkChange]:
        return [item.change for item in self.items if isinstance(item, Changed) and item.link == link]

    def payloads(self, link: LinkId | None = None) -> list[bytes]:
        return [item.payload for item in self.items if isinstance(item, Arrived) and link in (None, item.link)]

    def last_link(self) -> LinkId:
        """The link of the last message."""
        return next(item.link for item in reversed(self.items) if isinstance(item, Arrived))


def until(condition: Callable[[], bool], *ends: Log, seconds: float = DEADLINE_SECONDS) -> None:
    """Serve all ends until the condition holds; fail at the deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, [end.items[-5:] for end in ends]
        for end in ends:
            end.step()

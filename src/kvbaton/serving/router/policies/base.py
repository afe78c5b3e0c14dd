"""How one of several servers of a role is chosen.

This file must not know HTTP, rooms or how servers are probed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvbaton.serving.router.worker import Worker


class Policy(Protocol):
    """One for each role of a router, in one event loop."""

    def choose(self, candidates: Sequence[Worker], prompt: bytes, /) -> Worker:
        """One of ``candidates``, of which there is at least one, all usable; the request is then sent there.

        They come in the order in which they were taken last, the one first whose turn is longest ago: a policy that
        takes the first of equals spreads requests that come in one moment, although none shows in a load yet. The load
        that the router knows of is ``Worker.legs``. ``prompt`` is the field of the request that its answer begins with,
        as its JSON text: equal beginnings are equal beginnings of prompts.
        """

    def forget(self, worker: Worker, /) -> None:
        """It is no candidate any more."""

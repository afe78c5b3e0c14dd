"""Which room a request went on in, so that the story of either room leads to the other.

This file must not know HTTP or workers.
"""

from __future__ import annotations

import time
from collections import OrderedDict

from kvbaton.serving.server.story import Side, StoryLine

#: Rooms that are remembered; the oldest are forgotten first.
MAX_ROOMS = 4096


class Trail:
    """What a router has to say of rooms that were not enough."""

    def __init__(self) -> None:
        self._by_room: OrderedDict[int, list[tuple[float, str]]] = OrderedDict()

    def add(self, room: int, text: str) -> None:
        self._by_room.setdefault(room, []).append((time.monotonic(), text))
        self._by_room.move_to_end(room)
        while len(self._by_room) > MAX_ROOMS:
            self._by_room.popitem(last=False)

    def side(self, room: int) -> Side:
        """The router's side of the room's story; without lines where it has none."""
        now = time.monotonic()
        lines = tuple(StoryLine(now - when, text) for when, text in self._by_room.get(room, ()))
        return Side(role="router", lines=lines)

    def __repr__(self) -> str:
        return f"<Trail of {len(self._by_room)} rooms>"

"""What happened to a room, in order: the answer to "where is request N stuck?". Bounded in rooms and in lines."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass

MAX_ROOMS = 4_096
MAX_LINES = 64
#: Longest line; a peer chooses part of the text.
MAX_CHARACTERS = 400


@dataclass(frozen=True, slots=True)
class Line:
    """One event of a room. ``at`` in seconds of the core's clock."""

    at: float
    text: str


class Story:
    """The last lines of the last rooms."""

    def __init__(self) -> None:
        self._rooms: OrderedDict[int, deque[Line]] = OrderedDict()

    def tell(self, room: int, at: float, text: str) -> None:
        lines = self._rooms.get(room)
        if lines is None:
            lines = self._rooms[room] = deque(maxlen=MAX_LINES)
            if len(self._rooms) > MAX_ROOMS:
                self._rooms.popitem(last=False)
        lines.append(Line(at, text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 1] + "…"))

    def __len__(self) -> int:
        """Rooms that are remembered."""
        return len(self._rooms)

    def of(self, room: int) -> list[Line]:
        return list(self._rooms.get(room, ()))

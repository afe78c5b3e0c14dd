"""What happened to a room, in order: the answer to "where is request N stuck?". Bounded in rooms and in lines.

How a room began says as much as how it stands, so a long trace keeps both ends and says how many lines are left out.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field

from msgspec import Struct

MAX_ROOMS = 4_096
#: Lines that are kept from the beginning of a room, and most of its end.
FIRST_LINES = 16
LAST_LINES = 48
#: Longest line; a peer chooses part of the text.
MAX_CHARACTERS = 400


class TraceLine(Struct, frozen=True, gc=False):
    """One event of a room. ``at`` in seconds of the core's clock."""

    at: float
    text: str


@dataclass(slots=True)
class _RoomTrace:
    """One room's lines. ``left_out``: how many are missing between the first and the last."""

    first: list[TraceLine] = field(default_factory=list)
    last: deque[TraceLine] | None = None
    left_out: int = 0

    def add(self, line: TraceLine) -> None:
        if len(self.first) < FIRST_LINES:
            self.first.append(line)
            return
        if self.last is None:
            self.last = deque(maxlen=LAST_LINES)
        self.left_out += len(self.last) == LAST_LINES
        self.last.append(line)

    def lines(self) -> list[TraceLine]:
        if self.last is None:
            return list(self.first)
        gap = [TraceLine(self.last[0].at, f"({self.left_out} lines left out)")] if self.left_out else []
        return [*self.first, *gap, *self.last]


class Trace:
    """The first and last lines of the last rooms."""

    def __init__(self) -> None:
        self._rooms: OrderedDict[int, _RoomTrace] = OrderedDict()

    def record(self, room: int, at: float, text: str) -> None:
        found = self._rooms.get(room)
        if found is None:
            found = self._rooms[room] = _RoomTrace()
            if len(self._rooms) > MAX_ROOMS:
                self._rooms.popitem(last=False)
        found.add(TraceLine(at, text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 1] + "…"))

    def __len__(self) -> int:
        """Rooms that are remembered."""
        return len(self._rooms)

    def of(self, room: int) -> list[TraceLine]:
        found = self._rooms.get(room)
        return found.lines() if found is not None else []

"""The answers that a decode server is giving, by the room that their router knows them by.

This file must not know HTTP or engines.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from kvbaton.errors import LocalProtocolError
from kvbaton.serving.server.request_parsing import Accepted


class Running:
    """``sources``: of each data-parallel rank, the control addresses of the ranks from which another decode server can
    take answers over; none where none can."""

    def __init__(self, sources: Sequence[Sequence[str]] = ()) -> None:
        self.sources = tuple(tuple(addresses) for addresses in sources)
        self._by_room: dict[int, tuple[str, ...]] = {}

    @contextmanager
    def named(self, accepted: Accepted) -> Iterator[None]:
        """For the length of the block the request is known by the room of its first part."""
        requests = list(accepted.requests.values())
        room = requests[0].room if requests else None
        if room is None:
            yield
            return
        self._by_room[room] = tuple(request.request_id for request in requests)
        try:
            yield
        finally:
            self._by_room.pop(room, None)

    def of(self, room: int) -> tuple[str, ...]:
        """The engine's names for what the router knows by ``room``. Raises LocalProtocolError."""
        if room not in self._by_room:
            raise LocalProtocolError("no answer is being given in this room; it may just have ended", room=room)
        return self._by_room[room]

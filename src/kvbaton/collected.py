"""What an engine takes between its steps: rooms that have ended, units that are free, peers that are lost."""

from __future__ import annotations

from collections import deque
from typing import TypeVar

from kvbaton.errors import LocalProtocolError
from kvbaton.handles import Finished, Freed, RoomHandle
from kvbaton.protocol.effects import PeerLost

#: Lost peers that are remembered for an engine that does not ask; the oldest are forgotten.
MAX_LOST_PEERS = 1024

T = TypeVar("T")


class Collected:
    """Filled by the driver's thread, taken by the engine's. ``wanted``: rooms are kept for an engine that takes them;
    one that does not would let them grow without bound."""

    def __init__(self, *, wanted: bool) -> None:
        self._wanted = wanted
        self._finished: deque[RoomHandle] = deque()
        self._freed: dict[RoomHandle, None] = {}
        self._lost_peers: deque[PeerLost] = deque(maxlen=MAX_LOST_PEERS)

    def __len__(self) -> int:
        """Rooms whose units are free, and whose engine has not taken notice."""
        return len(self._freed)

    def note_status(self, side: RoomHandle) -> None:
        if self._wanted and side.note_freed():
            self._freed[side] = None

    def note_end(self, side: RoomHandle) -> None:
        if self._wanted:
            self._finished.append(side)

    def note_lost(self, peer: PeerLost) -> None:
        self._lost_peers.append(peer)

    def take_finished(self) -> list[Finished]:
        """Raises LocalProtocolError where they are not wanted; so does :meth:`take_freed`."""
        self._check()
        ended = _take(self._finished)
        for side in ended:
            self._freed.pop(side, None)
        return [side.finished() for side in ended]

    def take_freed(self) -> list[Freed]:
        """Those that are free still: the engine may have withdrawn their chunks since, and submitted others."""
        self._check()
        freed = [side for side in list(self._freed) if side.freed]
        for side in freed:
            del self._freed[side]
        return [Freed(side.room, side.role, side.tag) for side in freed]

    def take_lost_peers(self) -> list[PeerLost]:
        return _take(self._lost_peers)

    def _check(self) -> None:
        if not self._wanted:
            raise LocalProtocolError("this manager does not collect finished rooms; pass collect_finished=True")


def _take(items: deque[T]) -> list[T]:
    taken = []
    while items:
        taken.append(items.popleft())
    return taken

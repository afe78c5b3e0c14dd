"""What the engine learns from a driver: the status of its rooms, lost peers, and one wake-up a turn for all of it."""

from __future__ import annotations

from collections.abc import Callable

from msgspec.structs import replace

from kvbaton.errors import InternalError, KVBatonError
from kvbaton.protocol.effects import KVPoll, PeerLost, Report


class Reports:
    """On the driver's thread. ``on_report`` and ``on_peer_lost`` must not wait, ``on_news`` wakes the engine."""

    def __init__(
        self,
        on_report: Callable[[Report], None],
        on_peer_lost: Callable[[PeerLost], None],
        on_news: Callable[[], None],
    ) -> None:
        self._on_report = on_report
        self._on_peer_lost = on_peer_lost
        self._on_news = on_news
        self._news = False
        self._spoiled: dict[int, KVBatonError] = {}  # target rooms whose bytes could not be copied to their pages

    def spoil(self, room: int, error: Exception) -> None:
        """What is not copied to its pages must not be served, whatever the core says of the room."""
        self._spoiled[room] = InternalError(
            f"what has arrived could not be copied to its pages: {error}; restart this rank", room=room
        )

    def report(self, report: Report) -> None:
        status = report.status
        spoiled = self._spoiled.get(report.room) if report.role == "target" else None
        if spoiled is not None and status.ended:
            if not status.leased:
                del self._spoiled[report.room]
            if status.poll is KVPoll.Success:
                report = replace(report, status=replace(status, poll=KVPoll.Failed, error=spoiled))
        self._news = True
        self._on_report(report)

    def lost(self, peer: PeerLost) -> None:
        self._news = True
        self._on_peer_lost(peer)

    def flush(self) -> None:
        """Wake the engine, if anything was reported since the last time."""
        if self._news:
            self._news = False
            self._on_news()

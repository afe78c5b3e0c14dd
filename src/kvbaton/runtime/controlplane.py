"""The links at work: what comes over them becomes events, and what one turn says to a peer goes in one message.

To the links this is what the data plane is to the transport. It knows no message by its content.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial

from kvbaton.control.base import Arrived, LinkChange, LinkId, Links
from kvbaton.errors import KVBatonError
from kvbaton.protocol.events import Dialed, DialFailed, Event, LinkRefused, LinkUp, MessageArrived
from kvbaton.runtime.guard import Guard

#: How long deadlines wait for a reader that is behind, in seconds of its work: a flood does not stop the clock.
BEHIND_SECONDS = 2.0


class ControlPlane:
    """See the module. ``wake`` may be called from any thread, everything else belongs to the driver's. ``happened`` is
    told what follows, in order."""

    def __init__(
        self,
        links: Links,
        *,
        happened: Callable[[Event], None],
        guard: Guard,
        counters: Counter[str],
        clock: Callable[[], float],
    ) -> None:
        self._links = links
        self._happened = happened
        self._guard = guard
        self._clock = clock
        self._behind_since: float | None = None
        self._counters = counters
        self._outbox: dict[LinkId, list[bytes]] = {}  # what this turn says, by link

    def sizes(self) -> dict[str, int]:
        return {f"links_{name}": size for name, size in self._links.sizes().items()}

    def receive(self) -> bool:
        """What has come by now, or a batch of it. Returns whether something has."""
        came = False
        for item in self._links.receive():
            came = True
            if isinstance(item, Arrived):
                self._happened(MessageArrived(item.link, item.payload))
            elif item.change is LinkChange.UP:
                self._happened(LinkUp(item.link))
            elif item.change is LinkChange.REFUSED:
                self._happened(LinkRefused(item.link))
        if not self._links.unread:
            self._behind_since = None
        elif self._behind_since is None:
            self._behind_since = self._clock()
        return came

    @property
    def unread(self) -> bool:
        """More has come than was read."""
        return self._behind_since is not None

    @property
    def behind(self) -> bool:
        """A rank that stood still would take those for dead whose pings it has not read yet. So deadlines have to wait,
        but not for ever."""
        return self._behind_since is not None and self._clock() < self._behind_since + BEHIND_SECONDS

    def dial(self, address: str) -> None:
        try:
            self._happened(Dialed(address, self._links.dial(address)))
        except KVBatonError as error:
            self._happened(DialFailed(address, error))

    def say(self, link: LinkId, payload: bytes) -> None:
        """Have a message sent with the others of this turn."""
        self._outbox.setdefault(link, []).append(payload)

    def send(self) -> None:
        """All that was said to each peer since the last time. What fails towards one is said to the others."""
        outbox, self._outbox = self._outbox, {}
        for link, payloads in outbox.items():
            self._guard.attempt(partial(self._send, link, payloads))

    def _send(self, link: LinkId, payloads: list[bytes]) -> None:
        if not self._links.send(link, *payloads):
            self._counters["messages_dropped"] += 1

    def close_link(self, link: LinkId) -> None:
        self._links.close_link(link)

    def wake(self) -> None:
        self._links.wake()

    def wait(self, seconds: float | None) -> None:
        """Until something comes, somebody wakes it, or so many seconds have passed."""
        self._links.wait(seconds)

    def stop_listening(self) -> None:
        self._links.stop_listening()

    def close(self) -> None:
        """Nobody hears of this rank any more. Idempotent."""
        self._links.close()

"""Writes that wait to be posted: fair between peers, bounded in flight for each.

One slow peer fills its own window and nobody else's. A write that may not be posted yet (it needs a staging slot, and
none is free) is overtaken by those behind it: the writes of a peer need no order. Plain data, no transport.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from kvbaton.errors import ConfigError
from kvbaton.protocol.effects import PostWrite
from kvbaton.protocol.events import WriteId


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """Most that may be in flight towards one peer. A single write that exceeds it goes alone."""

    bytes: int = 256 << 20
    entries: int = 131_072

    def __post_init__(self) -> None:
        if self.bytes < 1 or self.entries < 1:
            raise ConfigError(f"a posting window must be positive, got {self.bytes} bytes and {self.entries} entries")


@dataclass(slots=True)
class _Peer:
    waiting: deque[PostWrite] = field(default_factory=deque)
    bytes: int = 0
    entries: int = 0
    in_flight: dict[WriteId, PostWrite] = field(default_factory=dict)


class PostingQueue:
    """See the module. A write is waiting, then taken (in flight), then settled."""

    def __init__(self, window: Window, may_post: Callable[[PostWrite], bool] = lambda _: True) -> None:
        self._window = window
        self._may_post = may_post
        self._peers: OrderedDict[str, _Peer] = OrderedDict()

    def __len__(self) -> int:
        """Peers that something waits for or is in flight to."""
        return len(self._peers)

    def offer(self, write: PostWrite) -> None:
        self._peers.setdefault(write.peer, _Peer()).waiting.append(write)

    def take(self) -> PostWrite | None:
        """The next write to post: peers take turns, a peer whose window is full is passed over."""
        for name in list(self._peers):
            peer = self._peers[name]
            place = self._next(peer)
            if place is None:
                continue
            write = peer.waiting[place]
            del peer.waiting[place]
            peer.bytes += write.bytes
            peer.entries += len(write.source_entries)
            peer.in_flight[write.write] = write
            self._peers.move_to_end(name)
            return write
        return None

    def _next(self, peer: _Peer) -> int | None:
        """Place of the first write that may be posted; None if there is none, or the window has no room for it."""
        place = next((i for i, write in enumerate(peer.waiting) if self._may_post(write)), None)
        return place if place is not None and self._fits(peer, peer.waiting[place]) else None

    def _fits(self, peer: _Peer, write: PostWrite) -> bool:
        if not peer.in_flight:
            return True
        return (
            peer.bytes + write.bytes <= self._window.bytes
            and peer.entries + len(write.source_entries) <= self._window.entries
        )

    def settled(self, write: PostWrite) -> None:
        """A write that was taken is not in flight any more."""
        peer = self._peers.get(write.peer)
        if peer is None or peer.in_flight.pop(write.write, None) is None:
            return
        peer.bytes -= write.bytes
        peer.entries -= len(write.source_entries)
        self._forget_if_idle(write.peer, peer)

    def cancel(self, writes: Iterable[WriteId]) -> list[WriteId]:
        """Drop those of ``writes`` that still wait; returns them. What is in flight stays."""
        unwanted = set(writes)
        dropped = []
        for name, peer in list(self._peers.items()):
            kept: deque[PostWrite] = deque()
            for write in peer.waiting:
                if write.write in unwanted:
                    dropped.append(write.write)
                else:
                    kept.append(write)
            peer.waiting = kept
            self._forget_if_idle(name, peer)
        return dropped

    def drop_peer(self, name: str) -> None:
        """Forget everything towards a peer that was fenced."""
        self._peers.pop(name, None)

    def _forget_if_idle(self, name: str, peer: _Peer) -> None:
        if not peer.waiting and not peer.in_flight:
            self._peers.pop(name, None)

    @property
    def ready(self) -> bool:
        """Whether ``take`` would return a write."""
        return any(self._next(peer) is not None for peer in self._peers.values())

    @property
    def waiting(self) -> int:
        return sum(len(peer.waiting) for peer in self._peers.values())

"""Writes that wait to be posted: fair between peers, bounded in flight for each.

One slow peer fills its own window and nobody else's. A staged write needs a free staging slot to be posted; where there
is none it is overtaken by direct writes behind it, since the writes of a peer need no order. Nothing here costs more
when more writes or peers wait: only the oldest direct and the oldest staged write of a peer are ever looked at, and a
peer that is passed over is not looked at again before something of it settles, is cancelled or offered, or a slot is
free. Plain data, no transport.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice

from kvbaton.errors import ConfigError
from kvbaton.protocol.effects import PostWrite
from kvbaton.protocol.events import WriteId

#: Most writes that are looked at for a post that another one begins.
MAX_TAKEN_ALONG = 64


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
    """Writes towards one peer: waiting, oldest first, without and with staging; and in flight."""

    direct: OrderedDict[WriteId, PostWrite] = field(default_factory=OrderedDict)
    staged: OrderedDict[WriteId, PostWrite] = field(default_factory=OrderedDict)
    bytes: int = 0
    entries: int = 0
    in_flight: set[WriteId] = field(default_factory=set)

    def waiting(self, write: PostWrite) -> OrderedDict[WriteId, PostWrite]:
        return self.direct if write.staged is None else self.staged

    def oldest(self, *, slot_free: bool) -> PostWrite | None:
        """The first write that may be posted. Ids grow, so they tell which was offered first."""
        direct = next(iter(self.direct.values()), None)
        staged = next(iter(self.staged.values()), None) if slot_free else None
        if direct is None or (staged is not None and staged.write < direct.write):
            return staged
        return direct


class PostingQueue:
    """See the module. A write is waiting, then taken (in flight), then settled."""

    def __init__(self, window: Window, slot_free: Callable[[], bool] = lambda: True) -> None:
        self._window = window
        self._slot_free = slot_free
        self._peers: dict[str, _Peer] = {}
        self._turns: OrderedDict[str, None] = OrderedDict()  # peers whose oldest write may be posted, for all we know
        self._for_slot: OrderedDict[str, None] = OrderedDict()  # peers all of whose waiting writes need a slot
        self._waiting: dict[WriteId, str] = {}

    def __len__(self) -> int:
        """Peers that something waits for or is in flight to."""
        return len(self._peers)

    def offer(self, write: PostWrite) -> None:
        peer = self._peers.setdefault(write.peer, _Peer())
        peer.waiting(write)[write.write] = write
        self._waiting[write.write] = write.peer
        self._line_up(write.peer, peer)

    def take(self) -> PostWrite | None:
        """The next write to post: peers take turns, a peer whose window is full is passed over."""
        write = self._next()
        if write is None:
            return None
        peer = self._peers[write.peer]
        self._take(peer, write)
        self._leave_lines(write.peer)
        if peer.direct or peer.staged:
            self._turns[write.peer] = None
        return write

    def take_along(self, first: PostWrite, alike: Callable[[PostWrite], bool], limit: Window) -> list[PostWrite]:
        """Further writes, ``alike``, that go in one post with ``first``, which is taken: as many as wait for the same
        peer without staging, fit its window, and are with ``first`` within ``limit``."""
        peer = self._peers[first.peer]
        size, entries = first.bytes, len(first.source_entries)
        taken: list[PostWrite] = []
        for write in list(islice(peer.direct.values(), MAX_TAKEN_ALONG)):
            if not alike(write):
                continue
            size, entries = size + write.bytes, entries + len(write.source_entries)
            if size > limit.bytes or entries > limit.entries or not self._fits(peer, write):
                break
            self._take(peer, write)
            taken.append(write)
        if taken and not (peer.direct or peer.staged):
            self._leave_lines(first.peer)
        return taken

    def _take(self, peer: _Peer, write: PostWrite) -> None:
        self._drop_waiting(peer, write)
        peer.bytes += write.bytes
        peer.entries += len(write.source_entries)
        peer.in_flight.add(write.write)

    def _next(self) -> PostWrite | None:
        """The write whose turn it is; a slot that is free goes to whoever waits for one. Each peer that is passed over
        leaves its line, so it was lined up for every look at it."""
        slot_free = self._slot_free()
        for line in (self._for_slot, self._turns) if slot_free else (self._turns,):
            while line:
                name = next(iter(line))
                peer = self._peers[name]
                write = peer.oldest(slot_free=slot_free)
                if write is not None and self._fits(peer, write):
                    return write
                del line[name]  # its window is full until one of its writes settles
                if write is None:
                    self._for_slot[name] = None
        return None

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
        if peer is None or write.write not in peer.in_flight:
            return
        peer.in_flight.remove(write.write)
        peer.bytes -= write.bytes
        peer.entries -= len(write.source_entries)
        self._tidy(write.peer, peer)

    def cancel(self, writes: Iterable[WriteId]) -> list[WriteId]:
        """Drop those of ``writes`` that still wait; returns them. What is in flight stays."""
        dropped = []
        for write in writes:
            name = self._waiting.pop(write, None)
            if name is not None:
                peer = self._peers[name]
                if peer.direct.pop(write, None) is None:
                    del peer.staged[write]
                self._tidy(name, peer)
                dropped.append(write)
        return dropped

    def drop_peer(self, name: str) -> None:
        """Forget everything towards a peer that was fenced."""
        peer = self._peers.pop(name, None)
        self._leave_lines(name)
        for write in (*peer.direct, *peer.staged) if peer is not None else ():
            del self._waiting[write]

    def _drop_waiting(self, peer: _Peer, write: PostWrite) -> None:
        del peer.waiting(write)[write.write]
        del self._waiting[write.write]

    def _tidy(self, name: str, peer: _Peer) -> None:
        """Something towards a peer has ended: it gets a turn if something waits, and is forgotten if it is idle."""
        if peer.direct or peer.staged:
            self._line_up(name, peer)
            return
        self._leave_lines(name)
        if not peer.in_flight:
            del self._peers[name]

    def _line_up(self, name: str, peer: _Peer) -> None:
        if peer.direct:
            self._for_slot.pop(name, None)
        if name not in self._for_slot:
            self._turns.setdefault(name)

    def _leave_lines(self, name: str) -> None:
        self._for_slot.pop(name, None)
        self._turns.pop(name, None)

    @property
    def ready(self) -> bool:
        """Whether ``take`` would return a write."""
        return self._next() is not None

    @property
    def waiting(self) -> int:
        return len(self._waiting)

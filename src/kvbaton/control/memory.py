"""Links inside one process: a :class:`Network` in which several :class:`MemoryLinks` find each other by address.

A double for tests that behaves like the real thing, threads included: bounded queues, re-dialling, REFUSED when the
listener is gone, and :meth:`Network.cut` for a partition. Every method may be called from any thread; one lock
guards the whole network.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from dataclasses import dataclass, field

from kvbaton.control.base import MAX_MESSAGE_BYTES, Arrived, Changed, LinkChange, LinkId, Links
from kvbaton.errors import ConfigError

#: Most messages that wait at one rank, and on one link that is not up.
QUEUE_MESSAGES = 1024
#: Most items that one :meth:`Links.receive` returns.
BATCH = 256
_SCHEME = "memory://"


@dataclass(eq=False, slots=True)
class _End:
    """One end of a link. ``peer`` is the other end while it is up; ``address`` is empty at the accepting end."""

    owner: MemoryLinks
    link: LinkId
    address: str
    peer: _End | None = None
    backlog: deque[bytes] = field(default_factory=deque)


class Network:
    """A set of addresses that can reach each other."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._listeners: dict[str, MemoryLinks] = {}
        self._dialled: list[_End] = []
        self._cut: set[str] = set()
        self._names = itertools.count(1)

    def listen(self, address: str = "") -> MemoryLinks:
        """A rank listening at ``address`` (``memory://...``; empty: a fresh one). Raises ConfigError if it is taken."""
        with self.lock:
            address = address or f"{_SCHEME}{next(self._names)}"
            if not address.startswith(_SCHEME) or address in self._listeners:
                raise ConfigError(f"address {address!r} is taken, or does not start with {_SCHEME}")
            links = self._listeners[address] = MemoryLinks(self, address)
            self._connect_waiting(address)
            return links

    def cut(self, address: str) -> None:
        """Partition: links to ``address`` go DOWN, what is sent over them waits, until :meth:`heal`."""
        with self.lock:
            self._cut.add(address)
            self._break(address)

    def heal(self, address: str) -> None:
        """Undo :meth:`cut`."""
        with self.lock:
            self._cut.discard(address)
            if address in self._listeners:
                self._connect_waiting(address)
                return
            for end in self._dialled:
                if end.address == address:
                    end.owner.put(Changed(end.link, LinkChange.REFUSED))

    def dialled(self, end: _End) -> None:
        """Connect a new dialling end, now or when somebody listens."""
        self._dialled.append(end)
        if end.address in self._cut:
            return
        if end.address in self._listeners:
            self._connect(end)
        else:
            end.owner.put(Changed(end.link, LinkChange.REFUSED))

    def hung_up(self, end: _End) -> None:
        """Forget a dialling end."""
        self._dialled.remove(end)
        if end.peer is not None:
            end.peer.peer = None

    def gone(self, address: str) -> None:
        """The listener at ``address`` has closed."""
        del self._listeners[address]
        for end in self._break(address):
            if address not in self._cut:
                end.owner.put(Changed(end.link, LinkChange.REFUSED))

    def _break(self, address: str) -> list[_End]:
        ends = [end for end in self._dialled if end.address == address and end.peer is not None]
        for end in ends:
            if end.peer is not None:
                end.peer.peer = None
            end.peer = None
            end.owner.put(Changed(end.link, LinkChange.DOWN))
        return ends

    def _connect_waiting(self, address: str) -> None:
        for end in self._dialled:
            if end.address == address and end.peer is None and address not in self._cut:
                self._connect(end)

    def _connect(self, end: _End) -> None:
        end.peer = self._listeners[end.address].accept()
        end.peer.peer = end
        end.owner.put(Changed(end.link, LinkChange.UP))
        while end.backlog:
            end.peer.owner.put(Arrived(end.peer.link, end.backlog.popleft()))


class MemoryLinks(Links):
    """See the module; made by :meth:`Network.listen`."""

    def __init__(self, network: Network, address: str) -> None:
        self._network = network
        self._address = address
        self._changed = threading.Condition(network.lock)
        self._inbox: deque[Arrived | Changed] = deque()
        self._ends: dict[LinkId, _End] = {}
        self._ids = itertools.count(1)
        self._woken = False
        self._listening = True
        self._closed = False

    def __repr__(self) -> str:
        return f"<MemoryLinks {self._address} links={len(self._ends)} inbox={len(self._inbox)} closed={self._closed}>"

    @property
    def address(self) -> str:
        return self._address

    def dial(self, address: str) -> LinkId:
        if not address.startswith(_SCHEME) or address == _SCHEME:
            raise ConfigError(f"address {address!r} does not start with {_SCHEME}")
        with self._network.lock:
            self._check_open()
            end = self._new_end(address)
            self._network.dialled(end)
            return end.link

    def accept(self) -> _End:
        """The network's call: a new accepted end."""
        return self._new_end("")

    def _new_end(self, address: str) -> _End:
        end = _End(self, LinkId(next(self._ids)), address)
        self._ends[end.link] = end
        return end

    def put(self, item: Arrived | Changed) -> bool:
        """The network's call: queue an item. A message is refused where :data:`QUEUE_MESSAGES` wait already."""
        if self._closed or (isinstance(item, Arrived) and len(self._inbox) >= QUEUE_MESSAGES):
            return False
        self._inbox.append(item)
        self._changed.notify_all()
        return True

    def send(self, link: LinkId, *payloads: bytes) -> bool:
        sent = [self._send(link, payload) for payload in payloads]  # behind one that is dropped as well
        return all(sent)

    def _send(self, link: LinkId, payload: bytes) -> bool:
        with self._network.lock:
            end = self._ends.get(link)
            if end is None or len(payload) > MAX_MESSAGE_BYTES:
                return False
            if end.peer is not None:
                if end.peer.link not in end.peer.owner._ends:
                    return True  # the accepting end was closed there: ignored, and nobody is told
                return end.peer.owner.put(Arrived(end.peer.link, payload))
            if not end.address or len(end.backlog) >= QUEUE_MESSAGES:
                return False
            end.backlog.append(payload)
            return True

    def receive(self) -> list[Arrived | Changed]:
        with self._network.lock:
            batch = [self._inbox.popleft() for _ in range(min(BATCH, len(self._inbox)))]
            return [item for item in batch if item.link in self._ends]

    @property
    def unread(self) -> bool:
        return bool(self._inbox)

    def wait(self, timeout_seconds: float | None) -> None:
        with self._network.lock:
            self._changed.wait_for(lambda: self._inbox or self._woken or self._closed, timeout_seconds)
            self._woken = False

    def wake(self) -> None:
        with self._network.lock:
            self._woken = True
            self._changed.notify_all()

    def close_link(self, link: LinkId) -> None:
        with self._network.lock:
            end = self._ends.pop(link, None)
            if end is not None and end.address:
                self._network.hung_up(end)

    def stop_listening(self) -> None:
        with self._network.lock:
            if self._listening:
                self._listening = False
                self._network.gone(self._address)

    def close(self) -> None:
        with self._network.lock:
            if self._closed:
                return
            for link in list(self._ends):
                self.close_link(link)
            self._closed = True
            self._inbox.clear()
            self.stop_listening()
            self._changed.notify_all()

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigError(f"links of {self._address} are closed")

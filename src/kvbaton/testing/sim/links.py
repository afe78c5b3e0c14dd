"""The simulated links of one process: what is dialled, accepted and received; what is done to it is the network's."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable

from kvbaton.control.base import Arrived, Changed, LinkId, Links
from kvbaton.testing.sim.network import QUEUE_MESSAGES, End, SimNetwork


class SimLinks(Links):
    """The links of one process. ``arrived`` is called when there is something to receive.

    ``batch``: most items that one :meth:`receive` returns; 1 makes a slow reader.
    """

    def __init__(self, network: SimNetwork, name: str, address: str, arrived: Callable[[], None]) -> None:
        self.name = name
        self.ends: dict[LinkId, End] = {}
        self.inbox: deque[Arrived | Changed] = deque()
        self.batch = 256
        self._network = network
        self._address = address
        self._arrived = arrived
        self._ids = itertools.count(1)
        self._closed = False
        network.listen(self)

    @property
    def address(self) -> str:
        return self._address

    def dial(self, address: str) -> LinkId:
        end = self._new_end(address)
        self._network.dialled(end)
        return end.link

    def accept(self) -> End:
        return self._new_end("")

    def _new_end(self, address: str) -> End:
        end = End(self, LinkId(next(self._ids)), address)
        self.ends[end.link] = end
        return end

    def put(self, item: Arrived | Changed) -> None:
        if isinstance(item, Arrived) and len(self.inbox) >= QUEUE_MESSAGES:
            self._network.clockwork.fault("inbox full", self.name)
            return
        self.inbox.append(item)
        self._arrived()

    def send(self, link: LinkId, *payloads: bytes) -> bool:
        return all(self._send(link, payload) for payload in payloads)

    def _send(self, link: LinkId, payload: bytes) -> bool:
        end = self.ends.get(link)
        if end is None or self._closed:
            return False
        if end.peer is not None:
            self._network.transmit(end, end.peer, payload)
            return True
        if not end.address or len(end.backlog) >= QUEUE_MESSAGES:
            return False
        end.backlog.append(payload)
        return True

    def receive(self) -> list[Arrived | Changed]:
        batch = [self.inbox.popleft() for _ in range(min(self.batch, len(self.inbox)))]
        return [item for item in batch if item.link in self.ends]

    @property
    def unread(self) -> bool:
        return bool(self.inbox)

    def wait(self, timeout_seconds: float | None) -> None:
        """Nobody waits here: the simulator decides when a driver turns."""

    def wake(self) -> None:
        self._arrived()

    def close_link(self, link: LinkId) -> None:
        end = self.ends.pop(link, None)
        if end is not None and end.peer is not None and end.address:
            end.peer.peer = None

    def stop_listening(self) -> None:
        """Nobody stands up at the address of a process that has not ended: it may stay as it is."""

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._network.gone(self, hole=False)

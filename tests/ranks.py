"""A rank with a small pool in this process, for tests of the facade."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count

import numpy as np
from numpy.typing import NDArray

from kvbaton.control.memory import Network
from kvbaton.layout import CacheLayout, Region, aux_pool, kv_pool, pool_bytes
from kvbaton.manager import KVManager, KVPoll, KVReceiver, KVSender, Span, new_instance
from kvbaton.protocol.settings import Settings
from kvbaton.transports import make_transport

AUX_BYTES = 64
SLOTS = 8


class RankHarness:
    """A manager with a small pool of its own in this process."""

    def __init__(
        self,
        name: str,
        network: Network,
        transport: str,
        settings: Settings | None,
        fill: int | None,
        *,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """``clock``: its time; then it has no thread, and its driver turns when it is told to."""
        pool = kv_pool(range(2), pages=64, page_size=16, heads=2, head_bytes=64, dtype="float32")
        rng = np.random.default_rng(fill)
        self.kv: NDArray[np.uint8] = np.zeros(pool_bytes(pool), np.uint8)
        self.aux: NDArray[np.uint8] = np.zeros(SLOTS * AUX_BYTES, np.uint8)
        if fill is not None:
            self.kv[:] = rng.integers(1, 256, len(self.kv), dtype=np.uint8)
            self.aux[:] = rng.integers(1, 256, len(self.aux), dtype=np.uint8)
        self.layout = CacheLayout(
            "model",
            (Region(self.kv.ctypes.data, len(self.kv)), Region(self.aux.ctypes.data, len(self.aux))),
            (pool, aux_pool(slots=SLOTS, slot_bytes=AUX_BYTES, region=1)),
        )
        self.network = network
        instance = new_instance()
        self.transport = make_transport(transport, instance)
        self.manager = KVManager(
            self.layout,
            self.transport,
            network.listen(),
            instance=instance,
            group=name,
            settings=settings,
            collect_finished=True,
            clock=clock if clock is not None else time.monotonic,
        )
        if clock is None:
            self.manager.start()

    def page(self, page: int) -> NDArray[np.uint8]:
        """All bytes of one page, over layers, K and V."""
        return self.kv.reshape(4, 64, -1)[:, page]

    def slot(self, slot: int) -> NDArray[np.uint8]:
        return self.aux.reshape(SLOTS, -1)[slot]

    def wait_until(self, condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
        """Sleep on the manager's wake-up until ``condition`` holds; fail with the counters when it does not."""
        deadline = time.monotonic() + seconds
        while True:
            self.manager.wakeup.clear()
            if condition():
                return
            left = deadline - time.monotonic()
            assert left > 0, f"never: {what}; {self.manager.counters()}"
            self.manager.wakeup.wait(min(left, 0.5))


MakeRank = Callable[..., RankHarness]


ROOMS = count(1)


def begin(source: RankHarness, target: RankHarness, room: int | None = None) -> tuple[KVSender, KVReceiver]:
    """A room of 40 tokens: pages (4, 6, 2) and slot 3 to pages (5, 3, 1) and slot 2."""
    room = room if room is not None else next(ROOMS)
    sender = source.manager.sender(room)
    receiver = target.manager.receiver(room, [source.manager.address])
    receiver.publish([Span("kv", 0, 40, (5, 3, 1)), Span("aux", 0, 0, (2,))], token_count=40)
    source.wait_until(lambda: sender.poll() is not KVPoll.Bootstrapping, "the room opens")
    return sender, receiver


def finish(source: RankHarness, target: RankHarness, sender: KVSender, receiver: KVReceiver) -> None:
    source.wait_until(lambda: sender.released, "the sender ends")
    target.wait_until(lambda: receiver.released, "the receiver ends")

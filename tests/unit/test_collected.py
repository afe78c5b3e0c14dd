"""What an engine takes between its steps, where driver and engine look at one room at once."""

from __future__ import annotations

from collections.abc import Callable

from kvbaton.collected import Collected
from kvbaton.handles import ALWAYS_READY, Freed, KVSender, Span
from kvbaton.layout import CacheLayout, Region, kv_pool, pool_bytes
from kvbaton.pieces import LayerRules
from kvbaton.plan.costs import HOST_COSTS
from kvbaton.protocol.effects import KVPoll, RoomStatus

POOL = kv_pool(range(1), pages=4, page_size=4, heads=1, head_bytes=8, dtype="u1")
LAYOUT = CacheLayout("model", (Region(4096, pool_bytes(POOL)),), (POOL,))


class Racing(KVSender):
    """Right behind the engine's next look at whether its units are free, the driver does ``then``."""

    then: Callable[[], None] | None = None

    @property
    def freed(self) -> bool:
        found, then, self.then = super().freed, self.then, None
        if then is not None:
            then()
        return found


def test_units_that_are_withdrawn_while_they_become_free_are_told_free_when_they_are_again() -> None:
    """The engine would free the pages that it has submitted in their place, while they are read."""
    collected = Collected(wanted=True)
    rules = LayerRules(LAYOUT, "never", HOST_COSTS)
    sender = Racing(7, LAYOUT, lambda _event, _fence: None, lambda: 0.0, "tag", rules)

    def settle(seen: int, *, leased: bool = False) -> None:
        sender.on_status(RoomStatus(poll=KVPoll.Transferring, seen=seen, leased=leased))
        collected.note_status(sender)

    sender.submit([Span("kv", 0, 8, (0, 1))], last=True, ready=ALWAYS_READY)
    settle(1, leased=True)
    sender.then = lambda: settle(1)
    assert sender.withdraw()
    assert collected.take_freed() == []
    settle(2)
    sender.submit([Span("kv", 0, 8, (2, 3))], last=True, ready=ALWAYS_READY)
    assert collected.take_freed() == []
    settle(3, leased=True)
    assert collected.take_freed() == []
    settle(3)
    assert collected.take_freed() == [Freed(7, "source", "tag")]
    assert collected.take_freed() == []

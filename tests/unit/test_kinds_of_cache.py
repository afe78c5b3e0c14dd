"""Every kind of cache between real managers, over memory and over real NIXL: the scenarios that broke SGLang, again."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from groups import Cut, Group
from kinds import DENSE, EVERYTHING, GQA, Request

from kvbaton.control.memory import Network
from kvbaton.layout import Coordinates
from kvbaton.manager import ALWAYS_READY, KVManager, KVPoll, KVReceiver, KVSender, new_instance
from kvbaton.transports import make_transport


class Managers:
    """A manager for every rank of a request's two groups, in this process."""

    def __init__(self, request: Request, transport: str) -> None:
        self.request = request
        network = Network()
        self.sources = self._start("p", request.source, transport, network)
        self.targets = self._start("d", request.target, transport, network)

    def _start(self, name: str, group: Group, transport: str, network: Network) -> list[KVManager]:
        managers = []
        for i, layout in enumerate(group.layouts):
            instance = new_instance()
            manager = KVManager(
                layout,
                make_transport(transport, instance),
                network.listen(),
                instance=instance,
                group=name,
                group_size=len(group.layouts),
                coordinates=Coordinates(pp=i // group.cut.tp, tp=i % group.cut.tp),
            )
            manager.start()
            managers.append(manager)
        return managers

    def close(self) -> None:
        for manager in (*self.sources, *self.targets):
            manager.close()

    def open(self, room: int) -> tuple[list[KVSender], list[KVReceiver]]:
        senders = [manager.sender(room) for manager in self.sources]
        addresses = [manager.address for manager in self.sources]
        receivers = [manager.receiver(room, addresses) for manager in self.targets]
        for manager, receiver in zip(self.targets, receivers, strict=True):
            receiver.publish(self.request.grants(manager.layout), token_count=self.request.prompt.tokens)
        return senders, receivers

    def submit(self, senders: list[KVSender], fence: Callable[[], bool] = ALWAYS_READY) -> None:
        for manager, sender in zip(self.sources, senders, strict=True):
            for number in range(len(self.request.chunks)):
                last = number == len(self.request.chunks) - 1
                sender.submit(self.request.chunk(manager.layout, number), last=last, ready=fence)

    def expect_success(self, senders: list[KVSender], receivers: list[KVReceiver]) -> None:
        sides = [*zip(self.sources, senders, strict=True), *zip(self.targets, receivers, strict=True)]
        for manager, side in sides:
            wait_until(manager, lambda side=side: side.released)  # type: ignore[misc]
            assert side.poll() is KVPoll.Success, (side, side.error)


def wait_until(manager: KVManager, condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Sleep on the manager's wake-up until ``condition`` holds."""
    rounds = int(seconds / 0.1)
    for _ in range(rounds):
        manager.wakeup.clear()
        if condition():
            return
        manager.wakeup.wait(0.1)
    raise AssertionError(f"never: {manager.counters()}")


@pytest.fixture
def between(transport: str) -> Iterator[Callable[[Request], Managers]]:
    made: list[Managers] = []

    def make(request: Request) -> Managers:
        made.append(Managers(request, transport))
        return made[-1]

    yield make
    for managers in made:
        managers.close()


SCENARIOS = {
    "25699: a dense model has no state part": (DENSE, Cut(), Cut()),
    "22145: several TP writers with one PP rank": (DENSE, Cut(tp=4), Cut()),
    "22145: unequal TP, more ranks than KV heads": (GQA, Cut(tp=4), Cut(tp=2)),
    "22145: unequal TP, more ranks than KV heads on decode": (GQA, Cut(tp=1), Cut(tp=4)),
    "18939: kv, scales, window, latents, index, state and aux in one request": (
        EVERYTHING,
        Cut(tp=2, pp=2, page_size=8, order="NHD"),
        Cut(tp=2, page_size=4, fusion="page"),
    ),
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_sglang_scenario(scenario: str, between: Callable[[Request], Managers]) -> None:
    model, source, target = SCENARIOS[scenario]
    request = Request(model, source, target, tokens=61, chunks=(16, 48), real=True)
    managers = between(request)
    senders, receivers = managers.open(1)
    managers.submit(senders)
    managers.expect_success(senders, receivers)
    assert request.differences() == []


def test_sglang_23967_a_slow_room_holds_up_no_other(between: Callable[[Request], Managers]) -> None:
    """The first room's data is not in memory yet; sixteen others come and go past it."""
    request = Request(DENSE, Cut(tp=2), Cut(), chunks=(16,), real=True)
    managers = between(request)
    ready = [False]
    slow = managers.open(1)
    managers.submit(slow[0], fence=lambda: ready[0])
    for room in range(2, 18):
        others = managers.open(room)
        managers.submit(others[0])
        managers.expect_success(*others)
    assert slow[1][0].poll() not in (KVPoll.Success, KVPoll.Failed)
    ready[0] = True
    managers.expect_success(*slow)
    assert request.differences() == []


def test_a_full_hit_moves_state_and_aux_alone(between: Callable[[Request], Managers]) -> None:
    request = Request(EVERYTHING, Cut(), Cut(), tokens=48, prefix=48, real=True)
    managers = between(request)
    senders, receivers = managers.open(1)
    managers.submit(senders)
    managers.expect_success(senders, receivers)
    assert request.differences() == []
    state, aux = (managers.targets[0].layout.pool(name) for name in ("state", "aux"))
    moved = sum(
        plane.item_bytes * plane.axis.width * pool.rows_of(plane) for pool in (state, aux) for plane in pool.planes
    )
    assert receivers[0].bytes == moved

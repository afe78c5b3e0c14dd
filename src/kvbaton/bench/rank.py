"""One process of a benchmark: a source or a target rank that obeys commands on a pipe.

It holds one pool, registered with kvbaton's transport and with the baseline's raw agent, so that all ways of moving
the same bytes are measured in the same processes over the same memory.
"""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

import numpy as np

from kvbaton.bench.leanest import Entries, Leanest
from kvbaton.bench.scenario import BenchScenario, buffer
from kvbaton.discovery.registry import Sizes
from kvbaton.errors import ExpiredError, KVBatonError
from kvbaton.layout import CacheLayout, Coordinates
from kvbaton.manager import ALWAYS_READY, KVManager, KVPoll, KVReceiver, Span
from kvbaton.plan.pair import pair_plan
from kvbaton.protocol.settings import Settings
from kvbaton.transports.interfaces import restrict

TIMEOUT_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchRankSpec:
    """Which rank a process is."""

    side: Literal["source", "target"]
    rank: int
    scenario: BenchScenario
    transport: str


class BenchRank:
    """See the module. Every public method is a command; its result goes back on the pipe."""

    def __init__(self, spec: BenchRankSpec) -> None:
        scenario = spec.scenario
        self._spec = spec
        self._scenario = scenario
        self._tp = scenario.source_tp if spec.side == "source" else scenario.target_tp
        length = scenario.memory_bytes(self._tp, spec.rank)
        self._memory = buffer(length, seed=scenario.seed + 1 + spec.rank if spec.side == "source" else None)
        self._layout = scenario.layout(self._memory.ctypes.data, self._tp, spec.rank)
        self._pages = scenario.pages_of(spec.side)
        self._other_pages = scenario.pages_of("target" if spec.side == "source" else "source")
        self._manager = KVManager.open(
            self._layout,
            role="prefill" if spec.side == "source" else "decode",
            backend=spec.transport,
            group=spec.side,
            sizes=Sizes(tp=self._tp),
            coordinates=Coordinates(tp=spec.rank),
            settings=Settings(staging=scenario.staging),
        )
        self._leanest = Leanest(f"raw-{self._manager.instance}", self._layout.regions[0])
        self._raw_rooms: list[dict[str, Entries]] = []
        self._raw_peers: list[str] = []
        self._expected_notifications = 0
        self._next_room = 1

    def describe(self) -> dict[str, Any]:
        return {"address": self._manager.address, "layout": self._layout, "metadata": self._leanest.metadata()}

    def connect(self, peers: list[dict[str, Any]]) -> None:
        """Source: prepare the baseline's tables towards every target."""
        pairs: list[tuple[str, Any]] = []
        for peer in peers:
            layout: CacheLayout = peer["layout"]
            parts = pair_plan(self._layout, layout).parts
            part = parts[0] if parts else None
            name = self._leanest.connect(peer["metadata"], part, layout.regions[0], self._whole_bytes)
            self._raw_peers.append(name)
            if part is not None:
                pairs.append((name, part))
        for mine, theirs in zip(self._pages, self._other_pages, strict=True):
            room = {}
            for name, part in pairs:
                room[name] = part.entries(part.blocks(0, self._scenario.tokens), mine, 0, theirs, 0)
            self._raw_rooms.append(room)

    def expect_writers(self, sources: list[dict[str, Any]]) -> None:
        """Target: learn whom to tell that a baseline round may begin, and how many notifications it brings."""
        self._raw_peers = [self._leanest.add_peer(peer["metadata"]) for peer in sources]
        writers = sum(bool(pair_plan(peer["layout"], self._layout).parts) for peer in sources)
        self._expected_notifications = writers * self._scenario.rooms

    @property
    def _whole_bytes(self) -> int:
        return self._layout.regions[0].length // self._scenario.rooms

    # ---- the contestants ----------------------------------------------------------------------------------------

    def memcpy(self) -> float:
        """Seconds to copy one room's bytes inside this process, by the best run of three."""
        source = self._memory[: self._whole_bytes]
        target = np.empty_like(source)
        target.fill(0)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            np.copyto(target, source)
            times.append(time.perf_counter() - start)
        return min(times) * self._scenario.rooms

    def raw_send(self) -> None:
        self._leanest.await_notifications(self._scenario.target_tp, TIMEOUT_SECONDS)
        self._leanest.write_wholes(self._raw_peers[0], self._scenario.rooms)

    def raw_receive(self) -> float:
        start = time.perf_counter()
        self._leanest.notify(self._raw_peers)
        self._leanest.await_notifications(self._scenario.rooms, TIMEOUT_SECONDS)
        return time.perf_counter() - start

    def leanest_send(self) -> None:
        self._leanest.await_notifications(self._scenario.target_tp, TIMEOUT_SECONDS)
        self._leanest.write_rooms(self._raw_rooms)

    def leanest_receive(self) -> float:
        start = time.perf_counter()
        self._leanest.notify(self._raw_peers)
        self._leanest.await_notifications(self._expected_notifications, TIMEOUT_SECONDS)
        return time.perf_counter() - start

    def kvbaton_send(self) -> int:
        """Serve one round as an engine would: submit each room when its targets are ready for it."""
        first = self._next_room
        self._next_room += self._scenario.rooms
        senders = {first + i: self._manager.sender(first + i) for i in range(self._scenario.rooms)}
        unsent = dict(senders)
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while senders:
            self._manager.wakeup.clear()
            for room, sender in list(unsent.items()):
                if sender.poll() is KVPoll.WaitingForInput:
                    pages = tuple(self._pages[room - first].tolist())
                    sender.submit([Span("kv", 0, self._scenario.tokens, pages)], last=True, ready=ALWAYS_READY)
                    del unsent[room]
            for room, sender in list(senders.items()):
                if sender.released:
                    if sender.error is not None:
                        raise sender.error
                    del senders[room]
            if senders and not self._manager.wakeup.wait(1.0) and time.monotonic() > deadline:
                raise ExpiredError(f"{len(senders)} rooms are not sent: {self._manager.trace(next(iter(senders)))}")
        return self._scenario.rooms

    def kvbaton_receive(self, addresses: list[str]) -> float:
        """Seconds from the first publish to the last success."""
        first = self._next_room
        self._next_room += self._scenario.rooms
        waiting = list(range(self._scenario.rooms))
        receivers = {i: self._manager.receiver(first + i, addresses) for i in waiting}
        spans = [Span("kv", 0, self._scenario.tokens, tuple(pages.tolist())) for pages in self._pages]
        running: dict[int, KVReceiver] = {}
        deadline = time.monotonic() + TIMEOUT_SECONDS
        start = time.perf_counter()
        while waiting or running:
            self._manager.wakeup.clear()
            for i, receiver in list(running.items()):
                if receiver.released:
                    if receiver.error is not None:
                        raise receiver.error
                    del running[i]
            while waiting and len(running) < self._scenario.concurrency:
                i = waiting.pop(0)
                receivers[i].publish([spans[i]], token_count=self._scenario.tokens)
                running[i] = receivers[i]
            if running and not self._manager.wakeup.wait(1.0) and time.monotonic() > deadline:
                raise ExpiredError(f"{len(running)} rooms did not arrive")
        return time.perf_counter() - start

    # ---- checks -------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        self._memory.fill(0)

    def verify(self, source_layouts: list[CacheLayout]) -> int:
        """Bytes that arrived right; raises KVBatonError at the first wrong room. Recomputes every source's memory."""
        checked = 0
        for rank, layout in enumerate(source_layouts):
            memory = buffer(layout.regions[0].length, seed=self._scenario.seed + 1 + rank)
            for part in pair_plan(layout, self._layout).parts:
                blocks = part.blocks(0, self._scenario.tokens)
                for room, (theirs, mine) in enumerate(zip(self._other_pages, self._pages, strict=True)):
                    source, target = part.entries(blocks, theirs, 0, mine, 0)
                    source_at = part.source.table.addresses(source) - layout.regions[0].address
                    target_at = part.target.table.addresses(target) - self._layout.regions[0].address
                    length = int(part.lane_bytes[0])
                    index = np.arange(length)
                    for s, t in zip(np.array_split(source_at, 8), np.array_split(target_at, 8), strict=True):
                        if not np.array_equal(memory[s[:, None] + index], self._memory[t[:, None] + index]):
                            raise KVBatonError(f"room {room}: bytes from source rank {rank} are wrong")
                    checked += length * len(source)
        return checked

    def idle_cpu(self, seconds: float) -> float:
        """Share of one core that this whole process uses while it does nothing."""
        before = resource.getrusage(resource.RUSAGE_SELF)
        start = time.perf_counter()
        time.sleep(seconds)
        after = resource.getrusage(resource.RUSAGE_SELF)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return used / (time.perf_counter() - start)

    def evidence(self) -> str:
        return self._manager.evidence()

    def stop(self) -> int:
        """Close; the number of rooms that are still leased."""
        leased = self._manager.leased_rooms
        self._manager.close()
        return leased


def serve(spec: BenchRankSpec, pipe: Connection) -> None:
    """Main of a rank's process: obey until told to stop. Errors go back on the pipe."""
    restrict(["127.0.0.1"])
    rank = BenchRank(spec)
    pipe.send(("ok", rank.describe()))
    while True:
        command, arguments = pipe.recv()
        try:
            pipe.send(("ok", getattr(rank, command)(*arguments)))
        except KVBatonError as error:
            pipe.send(("error", f"{command}: {error}"))
        if command == "stop":
            return

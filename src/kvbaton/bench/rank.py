"""One process of a benchmark: a source or a target rank that obeys commands on a pipe.

It holds one pool, registered with kvbaton's transport and with the baseline's raw agent, so that all ways of moving
the same bytes are measured in the same processes over the same memory.
"""

from __future__ import annotations

import math
import os
import resource
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kvbaton.bench.leanest import Entries, Leanest
from kvbaton.bench.scenario import HEADS, BenchScenario, buffer
from kvbaton.discovery.registry import Sizes
from kvbaton.errors import ExpiredError, KVBatonError
from kvbaton.layout import CacheLayout, Coordinates, Region
from kvbaton.manager import ALWAYS_READY, KVManager, KVPoll, KVReceiver, KVSender, Span
from kvbaton.plan.pair import pair_plan
from kvbaton.protocol.settings import Settings
from kvbaton.transports.interfaces import restrict

TIMEOUT_SECONDS = 120.0
Offsets = NDArray[np.int64]
#: Rooms that are open and wait are numbered from here.
FIRST_OPEN_ROOM = 1 << 40


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
            settings=_settings(scenario),
        )
        others = scenario.target_tp if spec.side == "source" else scenario.source_tp
        self._bounce = buffer(scenario.room_bytes * others // self._tp if scenario.gathers else 1, seed=None)
        self._leanest = Leanest(
            f"raw-{self._manager.instance}",
            self._layout.regions[0],
            Region(self._bounce.ctypes.data, len(self._bounce)),
        )
        self._raw_rooms: list[list[dict[str, Entries]]] = []
        self._heads: list[tuple[range, range]] = []
        self._raw_peers: list[str] = []
        self._expected_notifications = 0
        self._next_room = 1
        self._open: list[KVReceiver | KVSender] = []

    def describe(self) -> dict[str, Any]:
        return {
            "address": self._manager.address,
            "layout": self._layout,
            "metadata": self._leanest.metadata(),
            "bounce": self._bounce.ctypes.data,
        }

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
        if self._scenario.gathers:
            self._connect_bounces(peers)
        size = self._scenario.page_size
        for mine, theirs in zip(self._pages, self._other_pages, strict=True):
            chunks = []
            for pages in self._scenario.page_ranges():
                tokens = pages.start * size, pages.stop * size
                chunks.append({name: part.entries(part.blocks(*tokens), mine, 0, theirs, 0) for name, part in pairs})
            self._raw_rooms.append(chunks)

    def expect_writers(self, sources: list[dict[str, Any]]) -> None:
        """Target: learn whom to tell that a baseline round may begin, and how many notifications it brings."""
        self._raw_peers = [self._leanest.add_peer(peer["metadata"]) for peer in sources]
        if self._scenario.gathers:
            self._heads = [self._shared_heads(rank) for rank in range(self._scenario.source_tp)]
        writers = sum(bool(pair_plan(peer["layout"], self._layout).parts) for peer in sources)
        self._expected_notifications = writers * self._scenario.rooms

    def _connect_bounces(self, targets: list[dict[str, Any]]) -> None:
        """One write a target: each rank's bounce buffer has a place for every rank of the other side."""
        self._heads = [self._shared_heads(rank) for rank in range(self._scenario.target_tp)]
        for rank, (name, target) in enumerate(zip(self._raw_peers, targets, strict=True)):
            mine = self._bounced(rank)
            at = target["bounce"] + self._spec.rank * mine.nbytes
            self._leanest.connect_bounce(name, self._layout.regions[0], mine.ctypes.data, at, mine.nbytes)

    def _shared_heads(self, other: int) -> tuple[range, range]:
        """Heads that this rank shares with one of the other side, as each of them counts its own."""
        tps, ranks = (self._scenario.source_tp, self._scenario.target_tp), (self._spec.rank, other)
        here, there = (tps, ranks) if self._spec.side == "source" else (tps[::-1], ranks)
        mine, theirs = (HEADS // tp * rank for tp, rank in zip(here, there, strict=True))
        start, stop = max(mine, theirs), min(mine + HEADS // here[0], theirs + HEADS // here[1])
        return range(start - mine, stop - mine), range(start - theirs, stop - theirs)

    def _bounced(self, other: int) -> NDArray[np.uint8]:
        """The place in our bounce buffer for a rank of the other side: ``[layers, 2, pages, tokens, heads, bytes]``."""
        scenario = self._scenario
        heads = len(self._heads[other][0])
        shape = (
            scenario.layers,
            2,
            scenario.pages,
            scenario.page_size,
            heads,
            scenario.item_bytes // HEADS // scenario.page_size,
        )
        size = math.prod(shape)
        return self._bounce[other * size : (other + 1) * size].reshape(shape)

    def _cache(self) -> NDArray[np.uint8]:
        """Our pool: ``[layers, 2, pages, tokens, heads, bytes]``."""
        scenario = self._scenario
        shape = (scenario.layers, 2, scenario.pages, scenario.page_size, HEADS // self._tp, -1)
        return self._memory[: scenario.layers * 2 * scenario.pages * scenario.item_bytes // self._tp].reshape(shape)

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
        if not self._scenario.gathers:
            self._leanest.write_rooms(self._raw_rooms)
            return
        cache, pages = self._cache(), self._pages[0]
        for rank, (name, (heads, _)) in enumerate(zip(self._raw_peers, self._heads, strict=True)):
            bounced = self._bounced(rank)
            for layer, shares in zip(cache[..., heads.start : heads.stop, :], bounced, strict=True):
                shares[...] = layer[:, pages]
            self._leanest.write_bounce(name)

    def leanest_receive(self) -> float:
        start = time.perf_counter()
        self._leanest.notify(self._raw_peers)
        self._leanest.await_notifications(self._expected_notifications, TIMEOUT_SECONDS)
        if self._scenario.gathers:
            cache, pages = self._cache(), self._pages[0]
            for rank, (heads, _) in enumerate(self._heads):
                for layer, shares in zip(cache[..., heads.start : heads.stop, :], self._bounced(rank), strict=True):
                    layer[:, pages] = shares
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
                    self._submit(sender, self._pages[room - first])
                    del unsent[room]
            for room, sender in list(senders.items()):
                if sender.released:
                    if sender.error is not None:
                        raise sender.error
                    del senders[room]
            if senders and not self._manager.wakeup.wait(1.0) and time.monotonic() > deadline:
                raise ExpiredError(f"{len(senders)} rooms are not sent: {self._manager.trace(next(iter(senders)))}")
        return self._scenario.rooms

    def _submit(self, sender: KVSender, pages: NDArray[np.int64]) -> None:
        size = self._scenario.page_size
        for chunk in self._scenario.page_ranges():
            units = tuple(pages[chunk.start : chunk.stop].tolist())
            span = Span("kv", chunk.start * size, chunk.stop * size, units)
            sender.submit([span], last=chunk.stop == self._scenario.pages, ready=ALWAYS_READY)

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

    # ---- rooms that wait ------------------------------------------------------------------------------------------

    def open_senders(self, count: int) -> None:
        """Begin rooms, up to ``count`` of them, that nothing is submitted for."""
        for number in range(len(self._open), count):
            self._open.append(self._manager.sender(FIRST_OPEN_ROOM + number))

    def open_receivers(self, count: int, addresses: list[str]) -> None:
        """The other half. Nothing arrives, so all of them grant the same page."""
        for number in range(len(self._open), count):
            receiver = self._manager.receiver(FIRST_OPEN_ROOM + number, addresses)
            receiver.publish([Span("kv", 0, self._scenario.page_size, (0,))], token_count=self._scenario.page_size)
            self._open.append(receiver)
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while any(side.poll() is not KVPoll.WaitingForInput for side in self._open):
            if time.monotonic() > deadline:
                raise ExpiredError("not all rooms are open")
            self._manager.wait(0.1)

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
                    if not self._equal(memory, source_at, target_at, length):
                        raise KVBatonError(f"room {room}: bytes from source rank {rank} are wrong")
                    checked += length * len(source)
        return checked

    def _equal(self, memory: NDArray[np.uint8], source_at: Offsets, target_at: Offsets, length: int) -> bool:
        """Whether pieces of ``length`` bytes at these offsets are the same in ``memory`` and here."""
        index = np.arange(length)
        pairs = zip(np.array_split(source_at, 8), np.array_split(target_at, 8), strict=True)
        return all(np.array_equal(memory[s[:, None] + index], self._memory[t[:, None] + index]) for s, t in pairs)

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


def _settings(scenario: BenchScenario) -> Settings:
    most = scenario.rooms + scenario.open_rooms
    default = Settings()
    return Settings(
        staging=scenario.staging,
        rooms=max(default.rooms, most),
        rooms_per_peer=max(default.rooms_per_peer, most),
    )


def serve(spec: BenchRankSpec, pipe: Connection) -> None:
    """Main of a rank's process: obey until told to stop. Errors go back on the pipe."""
    if spec.scenario.plane == "tcp":
        os.environ["UCX_TLS"] = "tcp"  # before NIXL is loaded, which is when UCX reads it
    restrict(["127.0.0.1"])
    rank = BenchRank(spec)
    pipe.send(("ok", rank.describe(), 0.0))
    while True:
        command, arguments = pipe.recv()
        used = time.process_time()
        try:
            value = getattr(rank, command)(*arguments)
            pipe.send(("ok", value, time.process_time() - used))
        except KVBatonError as error:
            pipe.send(("error", f"{command}: {error}", 0.0))
        if command == "stop":
            return

"""Rooms between two processes: memory of one device to memory of another, every byte compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from kvbaton import KVManager, KVReceiver, Span
from kvbaton.bench.leanest import Leanest
from kvbaton.errors import ExpiredError, InternalError, KVBatonError
from kvbaton.protocol.settings import Settings
from lab.gpu.pool import PAGE_BYTES, PAGE_SIZE, Device, DevicePool, content, make_pool
from lab.gpu.source import ROOM_SECONDS, Sent, SourceProcess, SourceSpec

SEED = 7
ROUNDS = 7


class Target:
    """The decode rank of a check, in this process."""

    def __init__(self, device: Device, pages: int, *, staging: Any = "auto") -> None:
        self.device = device
        self.pool: DevicePool = make_pool(device, pages)
        self.manager = KVManager.open(self.pool.layout, role="decode", settings=Settings(staging=staging))
        self.leanest = Leanest(f"raw-{self.manager.instance}", self.pool.layout.regions[0])
        self._room = 0
        self.sent: list[Sent] = []

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.manager.close()

    def receive(self, sources: Sequence[SourceProcess], theirs: tuple[int, ...], mine: tuple[int, ...]) -> float:
        """One room of whole pages; seconds from ``publish`` to success. Raises KVBatonError."""
        self._room += 1
        tokens = len(mine) * PAGE_SIZE
        for source in sources:
            source.order("send", self._room, theirs, tokens)
        receiver = self.manager.receiver(self._room, [source.address for source in sources])
        start = time.perf_counter()
        receiver.publish([Span("kv", 0, tokens, mine)], token_count=tokens)
        seconds = self.await_end(receiver, start)
        self.sent = [source.result() for source in sources]
        if receiver.error is not None:
            raise receiver.error
        return seconds

    def checked(self, sources: Sequence[SourceProcess], theirs: tuple[int, ...], mine: tuple[int, ...]) -> float:
        """:meth:`receive`, and every byte compared. Raises KVBatonError where one is wrong, or no path was seen."""
        seconds = self.receive(sources, theirs, mine)
        wrong = self.differing_bytes(theirs, mine, self.pool.layout.pools[0].units)
        if wrong:
            raise KVBatonError(f"{wrong} of {len(mine) * PAGE_BYTES} bytes are wrong")
        if not all(sent.path for sent in self.sent):
            raise KVBatonError("the transport does not say how the bytes travelled")
        return seconds

    @property
    def paths(self) -> list[str]:
        """How the bytes of the last room travelled."""
        return sorted({sent.path for sent in self.sent})

    def receive_broken(self, source: SourceProcess, pages: tuple[int, ...]) -> tuple[float, str, str]:
        """One room whose source's fence raises: seconds, what the receiver says, what the sender says."""
        self._room += 1
        tokens = len(pages) * PAGE_SIZE
        source.order("send_broken", self._room, pages, tokens)
        receiver = self.manager.receiver(self._room, [source.address])
        start = time.perf_counter()
        receiver.publish([Span("kv", 0, tokens, pages)], token_count=tokens)
        seconds = self.await_end(receiver, start)
        if receiver.error is None:
            raise InternalError(f"room {self._room} ended well though the fence of its source raises")
        return seconds, str(receiver.error), str(source.result())

    def await_end(self, receiver: KVReceiver, start: float) -> float:
        deadline = time.monotonic() + ROOM_SECONDS
        while not receiver.released:
            self.manager.wakeup.wait(0.1)
            self.manager.wakeup.clear()
            if time.monotonic() > deadline:
                raise ExpiredError("; ".join(self.manager.trace(receiver.room)), room=receiver.room)
        return time.perf_counter() - start

    def differing_bytes(self, theirs: tuple[int, ...], mine: tuple[int, ...], pages: int) -> int:
        """Of pages ``mine`` from what ``theirs`` hold at the source."""
        expected = content(pages, seed=SEED).flatten(2)[:, list(theirs)]
        found = self.pool.page_view()[:, list(mine)].cpu()
        return int((expected != found).sum())

    def raw(self, source: SourceProcess, theirs: tuple[int, ...], mine: tuple[int, ...]) -> dict[str, list[float]]:
        """Seconds of NIXL alone, without protocol or proof: as one run, and with a descriptor for each page."""
        source.order("connect_raw", self.leanest.metadata(), self.pool.layout, len(mine) * PAGE_BYTES)
        peer = source.result()
        self.leanest.add_peer(source.metadata)
        orders: dict[str, tuple[object, ...]] = {
            "raw_write": ("write_raw", peer),
            "raw_pages": ("write_pages", peer, theirs, mine),
        }
        times: dict[str, list[float]] = {name: [] for name in orders}
        for _ in range(ROUNDS + 1):
            for name, (command, *arguments) in orders.items():
                source.order(str(command), *arguments)
                self.leanest.await_notifications(1, ROOM_SECONDS)
                times[name].append(source.result())
        return {name: found[1:] for name, found in times.items()}


def shuffled(count: int, pages: int, seed: int) -> tuple[int, ...]:
    """``count`` of ``pages`` pages, in no order."""
    return tuple(torch.randperm(pages, generator=torch.Generator().manual_seed(seed))[:count].tolist())


def check_transfer(source_device: Device, target_device: Device, pages: int) -> dict[str, object]:
    """Half of a pool's pages, shuffled, as the cost model has it and directly, against NIXL alone and one copy within
    the device. Raises KVBatonError."""
    theirs, mine = shuffled(pages // 2, pages, 1), shuffled(pages // 2, pages, 2)
    size = len(mine) * PAGE_BYTES
    found: dict[str, object] = {"bytes": size}
    times: dict[str, list[float]] = {}
    ways = {"room": "auto", "direct": "never"} if source_device == target_device else {"room": "auto"}
    for name, staging in ways.items():
        with (
            Target(target_device, pages, staging=staging) as target,
            SourceProcess(SourceSpec(device=source_device, pages=pages, seed=SEED)) as source,
        ):
            found[f"{name}_first_ms"] = target.checked([source], theirs, mine) * 1e3
            times[name] = [target.receive([source], theirs, mine) for _ in range(ROUNDS)]
            found |= {"path": target.paths, f"{name}_staged": sum(sent.staged for sent in target.sent) / size}
            if name == "room":
                raw = target.raw(source, theirs, mine)
    return {**found, **_figures(size, {**times, **raw, "device_copy": _copy_seconds(target_device, size)})}


def check_unequal(device: Device, pages: int) -> dict[str, object]:
    """TP 2 → 1 in NHD, directly and through staging: the kernels that gather and scatter. Raises KVBatonError."""
    theirs, mine = shuffled(pages // 2, pages, 3), shuffled(pages // 2, pages, 4)
    size = len(mine) * PAGE_BYTES
    found: dict[str, list[float]] = {}
    for mode in ("never", "always"):
        with ExitStack() as stack:
            target = stack.enter_context(Target(device, pages, staging=mode))
            specs = [SourceSpec(device=device, pages=pages, seed=SEED, tp_size=2, tp_rank=rank) for rank in range(2)]
            sources = [stack.enter_context(SourceProcess(spec)) for spec in specs]
            target.checked(sources, theirs, mine)
            name = "direct" if mode == "never" else "staged"
            found[name] = [target.receive(sources, theirs, mine) for _ in range(ROUNDS)]
            staged = sum(sent.staged for sent in target.sent)
            if staged != (0 if mode == "never" else size):
                raise KVBatonError(f"staging {mode}: {staged} of {size} bytes went through staging")
    return {"bytes": size, **_figures(size, {**found, "device_copy": _copy_seconds(device, size)})}


def check_broken_fence(device: Device) -> dict[str, object]:
    """A fence that raises fails its room at once on both sides, with its reason. Raises KVBatonError."""
    pages = 8
    with (
        Target(device, pages) as target,
        SourceProcess(SourceSpec(device=device, pages=pages, seed=SEED)) as source,
    ):
        target.receive([source], tuple(range(pages)), tuple(range(pages)))
        seconds, received, sent = target.receive_broken(source, tuple(range(pages)))
        if target.manager.leased_rooms:
            raise InternalError("the room is leased though it was released")
    return {"seconds": seconds, "decode": received, "prefill": sent}


def _copy_seconds(device: Device, size: int) -> list[float]:
    """Seconds of a plain copy of ``size`` bytes within the device's memory."""
    here, there = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    times = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        there.copy_(here)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times[1:]


def _figures(size: int, times: dict[str, list[float]]) -> dict[str, object]:
    """Medians in ms and GB/s, and ratios to the first."""
    medians = {name: statistics.median(found) for name, found in times.items()}
    base, first = next(iter(medians.items()))
    return {
        **{f"{name}_ms": seconds * 1e3 for name, seconds in medians.items()},
        **{f"{name}_gb_s": size / seconds / 1e9 for name, seconds in medians.items()},
        "ratios": {f"{base}/{name}": first / seconds for name, seconds in medians.items() if name != base},
    }

"""The prefill rank of a check, in a process of its own: it serves rooms, writes whole runs, or breaks its device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch

from kvbaton import ALWAYS_READY, KVManager, KVPoll, Span
from kvbaton.bench.leanest import Leanest
from kvbaton.discovery.registry import Sizes
from kvbaton.errors import ExpiredError, InternalError
from kvbaton.layout import CacheLayout, Coordinates
from kvbaton.plan.pair import PartPlan, pair_plan
from kvbaton.transports.interfaces import restrict
from lab.gpu.pool import Device, content, heads_of, make_pool

ROOM_SECONDS = 60.0
START_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSpec:
    """Which rank, over what memory. ``pages``: of the pool; ``seed``: of its content."""

    device: Device
    pages: int
    seed: int
    tp_size: int = 1
    tp_rank: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Sent:
    """``path``: as UCX tells it; ``staged``: of ``bytes``, those that were gathered first."""

    path: str
    bytes: int
    staged: int


class SourceProcess:
    """The parent's end. A context manager: leaving it ends the process."""

    def __init__(self, spec: SourceSpec) -> None:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(target=_serve, args=(theirs, spec), daemon=True)
        self._process.start()
        theirs.close()
        self.address: str
        self.metadata: bytes
        self.address, self.metadata = self.result(START_SECONDS)

    def __enter__(self) -> SourceProcess:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def order(self, command: str, *arguments: object) -> None:
        self._pipe.send((command, arguments))

    def result(self, seconds: float = ROOM_SECONDS) -> Any:
        """Raises ExpiredError, InternalError with what the process says."""
        if not self._pipe.poll(seconds):
            raise ExpiredError(f"the prefill rank says nothing for {seconds:g} s")
        try:
            ok, value = self._pipe.recv()
        except EOFError:
            raise InternalError(f"the prefill rank ended with {self._process.exitcode}") from None
        if not ok:
            raise InternalError(f"the prefill rank: {value}")
        return value


class _Source:
    def __init__(self, spec: SourceSpec) -> None:
        self._spec = spec
        self._pool = make_pool(spec.device, spec.pages, tp_size=spec.tp_size, tp_rank=spec.tp_rank)
        place = Coordinates(tp=spec.tp_rank)
        mine = heads_of(content(spec.pages, seed=spec.seed), place, spec.tp_size)
        self._pool.memory.copy_(mine.view(-1))
        if spec.device == "cuda":
            torch.cuda.synchronize()
        self._manager = KVManager.open(
            self._pool.layout, role="prefill", group="source", sizes=Sizes(tp=spec.tp_size), coordinates=place
        )
        self._leanest = Leanest(f"raw-{self._manager.instance}", self._pool.layout.regions[0])
        self._part: PartPlan

    def describe(self) -> tuple[str, bytes]:
        return self._manager.address, self._leanest.metadata()

    def send(self, room: int, pages: tuple[int, ...], tokens: int) -> Sent:
        """Serve one room whose pages are computed; how its bytes travelled."""
        before = self._manager.counters()
        self._serve(room, pages, tokens, ALWAYS_READY)
        after = self._manager.counters()
        posted, staged = (after.get(name, 0) - before.get(name, 0) for name in ("bytes_posted", "bytes_staged"))
        return Sent(path=self._manager.evidence(), bytes=posted, staged=staged)

    def send_broken(self, room: int, pages: tuple[int, ...], tokens: int) -> str:
        """Serve one room whose kernel fails: what its sender says of it."""
        try:
            self._serve(room, pages, tokens, _failing_fence(self._spec.device))
        except Exception as error:  # noqa: BLE001 - the error is what is asked for
            return str(error)
        raise InternalError(f"room {room} ended well though its fence raises")

    def _serve(self, room: int, pages: tuple[int, ...], tokens: int, ready: Callable[[], bool]) -> None:
        sender = self._manager.sender(room)
        deadline = time.monotonic() + ROOM_SECONDS
        submitted = False
        while not sender.released:
            self._manager.wakeup.wait(0.1)
            self._manager.wakeup.clear()
            if not submitted and sender.poll() is KVPoll.WaitingForInput:
                sender.submit([Span("kv", 0, tokens, pages)], last=True, ready=ready)
                submitted = True
            if time.monotonic() > deadline:
                raise ExpiredError("; ".join(self._manager.trace(room)), room=room)
        if sender.error is not None:
            raise sender.error

    def connect_raw(self, metadata: bytes, layout: CacheLayout, chunk: int) -> str:
        self._part = pair_plan(self._pool.layout, layout).parts[0]
        return self._leanest.connect(metadata, self._part, layout.regions[0], chunk)

    def write_pages(self, peer: str, mine: tuple[int, ...], theirs: tuple[int, ...]) -> float:
        """Seconds of one write of a descriptor for each page and tensor, until it is complete."""
        source, target = (np.array(pages, dtype=np.int64) for pages in (mine, theirs))
        entries = self._part.entries(range(len(mine)), source, 0, target, 0)
        start = time.perf_counter()
        self._leanest.write_rooms([[{peer: entries}]])
        return time.perf_counter() - start

    def write_raw(self, peer: str) -> float:
        """Seconds of one write, until it is complete."""
        start = time.perf_counter()
        self._leanest.write_wholes(peer, 1)
        return time.perf_counter() - start


def _failing_fence(device: Device) -> Callable[[], bool]:
    """An event behind a kernel that reads outside its tensor: its query raises, as after any CUDA error."""
    if device == "cpu":

        def query() -> bool:
            raise RuntimeError("CUDA error: made for the dry run")

        return query
    torch.zeros(4, device="cuda")[torch.tensor([1 << 40], device="cuda")]  # asserts on the device, later
    event = torch.cuda.Event()
    event.record()
    query_event: Callable[[], bool] = event.query
    return query_event


def _serve(pipe: Connection, spec: SourceSpec) -> None:
    restrict(["127.0.0.1"])
    try:
        source = _Source(spec)
        pipe.send((True, source.describe()))
        while True:
            command, arguments = pipe.recv()
            pipe.send((True, getattr(source, command)(*arguments)))
    except EOFError:
        return
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent names it
        pipe.send((False, f"{type(error).__name__}: {error}"))

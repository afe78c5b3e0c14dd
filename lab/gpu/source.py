"""The prefill rank of a check, in a process of its own: it serves rooms, writes whole runs, or breaks its device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from kvbaton import ALWAYS_READY, KVManager, KVPoll, Span
from kvbaton.bench.leanest import Leanest
from kvbaton.discovery.registry import Sizes
from kvbaton.errors import ExpiredError, InternalError
from kvbaton.layout import Coordinates
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

    def describe(self) -> tuple[str, bytes]:
        return self._manager.address, self._leanest.metadata()

    def send(self, room: int, pages: tuple[int, ...], tokens: int) -> str:
        """Serve one room whose pages are computed; how its bytes travelled."""
        self._serve(room, pages, tokens, ALWAYS_READY)
        return self._manager.evidence()

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

    def connect_raw(self, metadata: bytes, region: Any, chunk: int) -> str:
        return self._leanest.connect(metadata, None, region, chunk)

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

"""The same hand-off where computing is an accelerator's: each layer takes a given time and none of the host's cores.

On a machine without one, an engine and the network share the same cores, so that what is hidden is computed later. Here
the prefill rank sleeps for each layer instead; moving it is real NIXL, and every byte is compared.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvbaton.bench.scenario import buffer
from kvbaton.errors import ExpiredError, InternalError
from kvbaton.layout import CacheLayout, Region, kv_pool, pool_bytes
from kvbaton.manager import ALWAYS_READY, KVManager, KVPoll, Span
from kvbaton.transports.interfaces import restrict
from lab.layers.case import WAYS, Case, Way

PATIENCE_SECONDS = 60.0
PAGE_SIZE, HEADS, HEAD_BYTES = 16, 8, 256
SEED = 5


def make_layout(address: int, layers: int, tokens: int) -> CacheLayout:
    pool = kv_pool(
        range(layers),
        pages=-(-tokens // PAGE_SIZE),
        page_size=PAGE_SIZE,
        heads=HEADS,
        head_bytes=HEAD_BYTES,
        dtype="bytes",
        region=0,
    )
    return CacheLayout("accelerator", (Region(address, pool_bytes(pool)),), (pool,))


class _Rank:
    """One side in its process; public methods are commands."""

    def __init__(self, role: str, layers: int, tokens: int, stack: ExitStack) -> None:
        length = pool_bytes(make_layout(0, layers, tokens).pools[0])
        self._memory = buffer(length, seed=SEED if role == "prefill" else None)
        self._wanted: NDArray[np.uint8] | None = None
        self._layers = layers
        layout = make_layout(self._memory.ctypes.data, layers, tokens)
        self._manager = stack.enter_context(KVManager.open(layout, role=role))  # type: ignore[arg-type]

    def address(self) -> str:
        return self._manager.address

    def send(self, room: int, tokens: int, layer_seconds: float, ahead: bool) -> tuple[float, float, int]:
        """Compute as soon as decode is there. Exposed seconds, the processor's, and the writes that were posted."""
        cpu = time.process_time()
        sender, before = self._manager.sender(room), self._manager.counters().get("writes_posted", 0)
        self._await(lambda: sender.poll() >= KVPoll.WaitingForInput)
        spans = (Span("kv", 0, tokens, tuple(range(-(-tokens // PAGE_SIZE)))),)
        due = time.perf_counter()
        for layer in range(self._layers):
            due += layer_seconds
            time.sleep(max(0.0, due - time.perf_counter()))
            if ahead:
                sender.submit(spans, layers=(layer, layer + 1), last=False, ready=ALWAYS_READY)
        sender.submit(spans, last=True, ready=ALWAYS_READY)
        self._await(lambda: sender.released)
        if sender.error is not None:
            raise sender.error
        writes = self._manager.counters()["writes_posted"] - before
        return sender.exposed_seconds, time.process_time() - cpu, writes

    def receive(self, room: int, tokens: int, address: str) -> tuple[float, float, int]:
        """When everything was there, the processor's seconds, and the bytes."""
        cpu = time.process_time()
        receiver = self._manager.receiver(room, [address])
        receiver.publish([Span("kv", 0, tokens, tuple(range(-(-tokens // PAGE_SIZE))))], token_count=tokens)
        self._await(lambda: receiver.released)
        if receiver.error is not None:
            raise receiver.error
        return time.perf_counter(), time.process_time() - cpu, receiver.bytes

    def check(self, tokens: int) -> bool:
        """Whether the pages are the source's; clears them."""
        if self._wanted is None:
            self._wanted = buffer(len(self._memory), seed=SEED)
        shape = (self._layers * 2, -1, PAGE_SIZE * HEADS * HEAD_BYTES)
        pages = slice(-(-tokens // PAGE_SIZE))
        mine, wanted = (memory.reshape(shape)[:, pages] for memory in (self._memory, self._wanted))
        equal = np.array_equal(mine, wanted)
        mine.fill(0)
        return equal

    def _await(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                raise ExpiredError("the other rank did not come")
            self._manager.wait(0.05)


def _serve(role: str, layers: int, tokens: int, network: str, pipe: Connection) -> None:
    if network:
        os.environ["UCX_TLS"] = network
    restrict(["127.0.0.1"])
    with ExitStack() as stack:
        rank = _Rank(role, layers, tokens, stack)
        pipe.send(rank.address())
        while True:
            try:
                command, arguments = pipe.recv()
            except EOFError:
                return
            pipe.send(getattr(rank, command)(*arguments))


class _Pair:
    def __init__(self, layers: int, tokens: int, network: str, stack: ExitStack) -> None:
        self._pipes: dict[str, Connection] = {}
        self._room = 0
        context = multiprocessing.get_context("spawn")
        for role in ("prefill", "decode"):
            self._pipes[role], theirs = context.Pipe()
            process = context.Process(target=_serve, args=(role, layers, tokens, network, theirs), daemon=True)
            process.start()
            theirs.close()
            stack.callback(process.join, 10.0)
            stack.callback(self._pipes[role].close)
        self._address, _ = self.recv("prefill"), self.recv("decode")

    def recv(self, role: str) -> Any:
        if not self._pipes[role].poll(2 * PATIENCE_SECONDS):
            raise ExpiredError(f"the {role} rank did not answer")
        return self._pipes[role].recv()

    def ask(self, role: str, command: str, *arguments: object) -> Any:
        self._pipes[role].send((command, arguments))
        return self.recv(role)

    def play(self, case: Case, layer_seconds: float, way: Way) -> None:
        """One room, noted in ``case``."""
        tokens = case.tokens
        self._room += 1
        begun = time.perf_counter()
        self._pipes["decode"].send(("receive", (self._room, tokens, self._address)))
        exposed, cpu, writes = self.ask("prefill", "send", self._room, tokens, layer_seconds, way == "ahead")
        there, cpu_there, case.bytes = self.recv("decode")
        if not self.ask("decode", "check", tokens):
            raise InternalError(f"{tokens} tokens, {way}: wrong bytes")
        case.note(way, there - begun, exposed, cpu + cpu_there, writes)


def measure(
    lengths: list[int], shares: list[float], *, layers: int, rounds: int, network: str, progress: Callable[[str], None]
) -> list[Case]:
    """For each length and each share that moving is to have of computing: ``rounds`` rounds in turns."""
    found = []
    with ExitStack() as stack:
        pair = _Pair(layers, max(lengths), network, stack)
        for tokens in lengths:
            progress(f"{tokens} tokens: moving alone")
            alone = Case(tokens=tokens)
            for _ in range(rounds + 1):
                pair.play(alone, 0.0, "without")
            moving = statistics.median(alone.exposed["without"][1:])
            for share in shares:
                case = Case(tokens=tokens, moving=moving, computing=moving / share)
                for number in range(rounds):
                    progress(f"{tokens} tokens, moving {share:g} of computing, round {number}/{rounds}")
                    for way in WAYS if number % 2 else WAYS[::-1]:
                        pair.play(case, case.computing / layers, way)
                found.append(case)
    return found

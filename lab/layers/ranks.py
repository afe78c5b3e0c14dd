"""One engine of the measurement in a process of its own: a prefill engine or the decode engine, over real NIXL."""

from __future__ import annotations

import os
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

from kvbaton.errors import KVBatonError
from kvbaton.manager import KVManager
from kvbaton.protocol.settings import Settings
from kvbaton.serving.engine.decode import decode_scheduler
from kvbaton.serving.engine.memory import PoolConfig
from kvbaton.serving.engine.model import load_model
from kvbaton.serving.engine.pool import Pools
from kvbaton.serving.engine.prefill import prefill_scheduler
from kvbaton.serving.engine.request import Output, Request, Sampling
from kvbaton.serving.engine.scheduler import SchedulerConfig
from kvbaton.transports.interfaces import restrict

PATIENCE_SECONDS = 180.0
PAGE_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """``ahead``: whether a prefill engine sends its layers ahead; ``tokens``: the longest prompt, one chunk."""

    role: Literal["prefill", "decode"]
    model: str
    tokens: int
    threads: int
    network: str
    device: str = "cpu"
    ahead: bool = True


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Of one prompt on one side: when its first output came (of the clock that all processes share), the token, and
    what this rank has posted for it."""

    first_at: float
    token: int
    exposed_seconds: float
    bytes: int
    cpu_seconds: float
    writes: int


class EngineProcess:
    """Every public method is a command."""

    def __init__(self, spec: EngineSpec, stack: ExitStack) -> None:
        model = load_model(spec.model, threads=spec.threads, device=spec.device)
        pages = -(-spec.tokens // PAGE_SIZE) + 1
        sizes = PoolConfig(pages=pages, page_size=PAGE_SIZE, aux_slots=2, chunk_tokens=spec.tokens, staging_bytes=None)
        pools = Pools(model.geometry, sizes, model=model.fingerprint, device=spec.device)
        config = SchedulerConfig(chunked_prefill_size=spec.tokens)
        settings = Settings(layers_ahead="auto" if spec.ahead else "never")
        self._manager = stack.enter_context(KVManager.open(pools.layout, role=spec.role, settings=settings))
        make = prefill_scheduler if spec.role == "prefill" else decode_scheduler
        self._scheduler = stack.enter_context(make(model, pools, self._manager, config))

    def address(self) -> str:
        return self._manager.address

    def answer(self, room: int, prompt: tuple[int, ...], sources: tuple[str, ...]) -> Answer:
        """The first token of a prompt, once everything of it has ended here."""
        outputs: list[Output] = []
        over, first_at = threading.Event(), 0.0

        def take(output: Output) -> None:
            nonlocal first_at
            first_at = first_at or time.perf_counter()
            outputs.append(output)
            if output.final:
                over.set()

        before, cpu = self._manager.counters().get("writes_posted", 0), time.process_time()
        sampling = Sampling(max_tokens=1, temperature=0.0, ignore_eos=True)
        request = Request(request_id=f"r{room}", prompt_tokens=prompt, sampling=sampling, room=room, sources=sources)
        self._scheduler.submit(request, take)
        if not over.wait(PATIENCE_SECONDS):
            raise TimeoutError(f"no end of room {room}: {self._manager.trace(room)}")
        if outputs[-1].error is not None:
            raise outputs[-1].error
        self._scheduler.wait_quiet(PATIENCE_SECONDS)
        handoff = next((output.handoff for output in outputs if output.handoff is not None), None)
        return Answer(
            first_at=first_at,
            token=next(token for output in outputs for token in output.tokens),
            exposed_seconds=handoff.exposed_seconds if handoff is not None else 0.0,
            bytes=handoff.bytes if handoff is not None else 0,
            cpu_seconds=time.process_time() - cpu,
            writes=self._manager.counters().get("writes_posted", 0) - before,
        )


def serve(spec: EngineSpec, pipe: Connection) -> None:
    """Main of a process: obey until the pipe ends. Errors go back on it."""
    if spec.network:
        os.environ["UCX_TLS"] = spec.network
    restrict(["127.0.0.1"])
    with ExitStack() as stack:
        engine = EngineProcess(spec, stack)
        pipe.send(("ok", engine.address()))
        while True:
            try:
                command, arguments = pipe.recv()
            except EOFError:
                return
            try:
                result: tuple[str, Any] = ("ok", getattr(engine, command)(*arguments))
            except (KVBatonError, TimeoutError) as error:
                result = ("error", f"{command}: {error}")
            pipe.send(result)

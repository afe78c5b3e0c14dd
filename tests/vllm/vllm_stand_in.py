"""A stand-in for vLLM: a scheduler, a block pool and a model that is arithmetic, calling the connector's halves in
vLLM's order and as strict as vLLM about what they report.

The cache of a token is a number that only its layer, its place and the token give; the state is a checksum of all
tokens before.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import numpy as np

from kvbaton import ALWAYS_READY, KVManager, Settings, layout
from kvbaton.engines.vllm.admission import Admission, Need
from kvbaton.engines.vllm.groups import CacheGroup, CacheGroups
from kvbaton.engines.vllm.scheduler import SchedulerHalf
from kvbaton.engines.vllm.worker import WorkerHalf, unit_maker

BLOCK, WINDOW, BLOCKS, LAYERS = 4, 8, 64, 3
#: Tokens of the longest prompt.
LONGEST = 48
FULL = CacheGroup(pool="full0", index=0, kind="full", block_size=BLOCK)
SWA = CacheGroup(pool="window0", index=1, kind="window", block_size=BLOCK, window=WINDOW)
STATE = CacheGroup(pool="state0", index=2, kind="state", block_size=BLOCK)
DENSE, HYBRID = CacheGroups((FULL,)), CacheGroups((FULL, SWA, STATE))
PATIENT = Settings(bootstrap_timeout=60.0, retry_seconds=0.05, layers_ahead="always")
HASTY = Settings(bootstrap_timeout=0.5, retry_seconds=0.05, layers_ahead="always")


class Status(Enum):
    WAITING = auto()
    WAITING_FOR_REMOTE_KVS = auto()
    RUNNING = auto()
    FINISHED_LENGTH_CAPPED = auto()
    FINISHED_ABORTED = auto()
    FINISHED_ERROR = auto()


@dataclass(eq=False)
class Request:
    """``local``: tokens of the prompt that the prefix cache holds."""

    request_id: str
    prompt: list[int]
    kv_transfer_params: dict[str, Any] | None = None
    local: int = 0
    num_computed_tokens: int = 0
    status: Status = Status.WAITING
    tables: list[list[int]] = field(default_factory=list)
    arrived: bool = False
    failed: bool = False
    answer: dict[str, Any] | None = None
    received: int = 0
    correct: bool | None = None
    loads: int = 0

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt)

    num_tokens = num_prompt_tokens


@dataclass(eq=False)
class Block:
    number: int
    references: int = 0


class Pool:
    """Blocks with reference counts, as vLLM's; block 0 is the null block."""

    def __init__(self, count: int) -> None:
        self.blocks = [Block(number) for number in range(count)]
        self.free = deque(range(1, count))

    def take(self, count: int) -> list[int]:
        taken = [self.free.popleft() for _ in range(count)]
        for number in taken:
            self.blocks[number].references = 1
        return taken

    def touch(self, blocks: list[Block]) -> None:
        for block in blocks:
            assert block.references > 0, "a block is kept aside that was freed already"
            block.references += 1

    def free_blocks(self, ordered_blocks: list[Block]) -> None:
        for block in ordered_blocks:
            assert block.references > 0, "a block is freed twice"
            block.references -= 1
            if not block.references:
                self.free.append(block.number)


def value(token: int, place: int, layer: int = 0) -> int:
    return (token * 1000 + place) * LAYERS + layer


def checksum(tokens: list[int]) -> int:
    return sum(value(token, place) for place, token in enumerate(tokens))


class StandIn:
    """One engine; ``calls``: what was called of the scheduler half, and what the calls carried."""

    def __init__(
        self,
        groups: CacheGroups,
        *,
        produces: bool,
        consumes: bool,
        recompute: bool = True,
        chunk: int = 8,
        settings: Settings = PATIENT,
        admission: Admission | None = None,
    ) -> None:
        self.groups, self.recompute, self.chunk = groups, recompute, chunk
        self.block = block = groups.groups[0].block_size
        self.pool = Pool(BLOCKS)
        self.caches = [np.zeros((LAYERS, BLOCKS, 1 if g.kind == "state" else block), np.int64) for g in groups.groups]
        pools = tuple(
            layout.pool_of_strides(
                group.pool,
                "state" if group.kind == "state" else "kv",
                [
                    layout.Strided(
                        layer=layer,
                        region=i,
                        offset=layer * self.caches[i][0].nbytes,
                        shape=shape,
                        strides=strides,
                        element_bytes=8,
                    )
                    for layer in range(LAYERS)
                ],
                dims="UC" if group.kind == "state" else "UNC",
                dtype="int64",
            )
            for i, group in enumerate(groups.groups)
            for shape, strides in [
                ((BLOCKS, 1), (1, 1)) if group.kind == "state" else ((BLOCKS, block, 1), (block, 1, 1))
            ]
        )
        regions = tuple(layout.Region(cache.ctypes.data, cache.nbytes) for cache in self.caches)
        self.manager = KVManager.open(
            layout.CacheLayout("stand-in", regions, pools),
            role="both" if produces and consumes else "prefill" if produces else "decode",
            backend="memory",
            settings=settings,
            collect_finished=True,
        )
        self.admission = admission or Admission(
            [need(group, chunk) for group in groups.groups],
            blocks=BLOCKS - 1,
            longest=LONGEST,
            both=produces and consumes,
        )
        self.half = SchedulerHalf(
            groups,
            produces=produces,
            consumes=consumes,
            group="stand-in",
            admission=self.admission,
            shorten=self._shorten,
        )
        self.half.set_sources([self.manager.address])
        self.half.quarantine.bind(self.pool)
        self.worker = WorkerHalf(
            self.manager, units=unit_maker([(g.pool, block, block) for g in groups.groups if g.kind != "state"])
        )
        self.requests: dict[str, Request] = {}
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.preempt_next: list[Request] = []
        self.calls: list[list[Any]] = []

    def close(self) -> None:
        self.manager.close()

    @staticmethod
    def _shorten(request: Any, tokens: int) -> bool:
        del request.prompt[len(request.prompt) - tokens :]
        return True

    # What a client does

    def add(self, request: Request) -> Request:
        self.half.add(request)
        self.requests[request.request_id] = request
        self.waiting.append(request)
        return request

    def abort(self, request: Request, status: Status = Status.FINISHED_ABORTED) -> None:
        parked = request.status is Status.WAITING_FOR_REMOTE_KVS and not request.arrived
        for queue in (self.waiting, self.running):
            if request in queue:
                queue.remove(request)
        self._finish(request, status, parked=parked)

    # A step, in vLLM's order

    def step(self) -> None:
        preempted = self._preempt()
        for request in list(self.running):  # where blocks are short, the last to come gives way
            while request in self.running and self._missing(request, self._next(request)) > len(self.pool.free):
                self.preempt_next.append(self.running[-1])
                preempted += self._preempt()
            if request in self.running:
                self._extend(request, self._next(request), request.num_computed_tokens)
        if not preempted:
            self._admit()
        scheduled: dict[str, int] = {}
        for request in self.running:
            computing = self._next(request) - request.num_computed_tokens
            if computing > 0:
                scheduled[request.request_id] = computing
                self._extend(request, self._next(request), request.num_computed_tokens)
        orders = self.half.step(scheduled, preempted, lambda name: self.requests[name].tables)
        self.calls.append(["build_connector_meta", sorted(scheduled.values())])
        self.worker.preempt(orders)
        self.worker.begin(orders)
        self._compute({self.requests[name]: computing for name, computing in scheduled.items()}, orders)
        self.worker.end(orders, ALWAYS_READY)
        results = self.worker.results(idle=orders.idle)
        leased = self.worker.leased()
        assert results.failed <= results.received
        for name in results.failed:
            self._fail(self.requests[name])
        for name, computing in scheduled.items():
            request = self.requests[name]
            request.num_computed_tokens += computing
            if request.num_computed_tokens == len(request.prompt):
                self.running.remove(request)
                self._finish(request, Status.FINISHED_LENGTH_CAPPED)
        self.half.update(results.received, results.failed, leased, met=self.worker.met(), sent=results.sent)
        self.calls.append(["update_connector_output", [len(results.sent), len(results.received), len(results.failed)]])
        for name in results.received:
            self._received(self.requests[name], failed=name in results.failed)
        for name in results.sent:
            request = self.requests[name]
            assert request.status in (Status.FINISHED_LENGTH_CAPPED, Status.FINISHED_ABORTED)
            self._free(request)

    def _next(self, request: Request) -> int:
        """Tokens that are computed after the next chunk."""
        return min(request.num_computed_tokens + self.chunk, len(request.prompt))

    def _preempt(self) -> list[str]:
        preempted, self.preempt_next = self.preempt_next, []
        for request in preempted:
            self.running.remove(request)
            self._free_blocks(request)
            request.num_computed_tokens = 0
            request.status = Status.WAITING
            self.waiting.append(request)
        return [request.request_id for request in preempted]

    def _admit(self) -> None:
        for request in list(self.waiting):
            if request.status is Status.WAITING_FOR_REMOTE_KVS:
                if not request.arrived:
                    continue
                request.status = Status.WAITING
                request.num_computed_tokens = 0 if request.failed else min(request.received, len(request.prompt) - 1)
                if request.failed:
                    self._free_blocks(request)
            computed = request.num_computed_tokens
            external: int | None = 0
            if computed == 0:
                external, parks = self._matched(request)
                if external is None:
                    continue
                assert request.local + external <= request.num_tokens
                if self._missing(request, len(request.prompt)) > len(self.pool.free):
                    return  # nobody overtakes
                computed = request.local + external
                self._extend(request, computed, computed)
                for layer in range(LAYERS):
                    self._write(request, 0, request.local, layer)
                if external and parks:
                    self._allocated(request, external)
                    request.loads += 1
                    request.received = computed
                    request.status = Status.WAITING_FOR_REMOTE_KVS
                    continue
            self._extend(request, min(computed + self.chunk, len(request.prompt)), computed)
            self._allocated(request, 0)
            request.num_computed_tokens = computed
            request.status = Status.RUNNING
            self.waiting.remove(request)
            self.running.append(request)

    def _matched(self, request: Request) -> tuple[int | None, bool]:
        found = self.half.matched(request, request.local)
        self.calls.append(["get_num_new_matched_tokens", [request.local, list(found)]])
        if found[0]:
            self.calls.append(["get_loaded_kv_cache_group_ids", None])
        return found

    def _allocated(self, request: Request, external: int) -> None:
        self.half.allocated(request, request.tables, external)
        self.calls.append(["update_state_after_alloc", [external, [len(table) for table in request.tables]]])

    # Blocks

    def _missing(self, request: Request, tokens: int) -> int:
        """Blocks to be taken before the request has them for ``tokens``."""
        tables = request.tables or [[] for _ in self.groups.groups]
        return sum(
            max(0, (1 if group.kind == "state" else -(-tokens // self.block)) - len(table))
            for group, table in zip(self.groups.groups, tables, strict=True)
        )

    def _extend(self, request: Request, tokens: int, computed: int) -> None:
        """Blocks for ``tokens``; those that a window has left behind after ``computed`` go."""
        request.tables = request.tables or [[] for _ in self.groups.groups]
        for group, table in zip(self.groups.groups, request.tables, strict=True):
            need = 1 if group.kind == "state" else -(-tokens // self.block)
            table.extend(self.pool.take(max(0, need - len(table))))
            if group.kind == "window":
                for i in range(max(0, computed - WINDOW + 1) // self.block):
                    self._drop(table, i)

    def _drop(self, table: list[int], i: int) -> None:
        if table[i]:
            self.pool.free_blocks([self.pool.blocks[table[i]]])
            table[i] = 0

    def _write(self, request: Request, start: int, stop: int, layer: int) -> None:
        for group, cache in zip(self.groups.groups, self.caches, strict=True):
            table = request.tables[group.index]
            if group.kind == "state":
                cache[layer, table[-1], 0] = checksum(request.prompt[:stop])
                continue
            for place in range(start, stop):
                cache[layer, table[place // self.block], place % self.block] = value(
                    request.prompt[place], place, layer
                )

    def _compute(self, batch: dict[Request, int], orders: Any) -> None:
        for request in batch:
            start = request.num_computed_tokens
            if start and request.correct is None and request.received and not request.failed:
                request.correct = self._intact(request, start)
        for layer in range(LAYERS):
            for request, computing in batch.items():
                self._write(request, request.num_computed_tokens, request.num_computed_tokens + computing, layer)
            if self.worker.sends_ahead(orders):
                self.worker.layer_done(orders, layer, ALWAYS_READY)

    def _intact(self, request: Request, tokens: int) -> bool:
        """Whether the cache holds what the token that follows needs."""
        for group, cache in zip(self.groups.groups, self.caches, strict=True):
            table = request.tables[group.index]
            if group.kind == "state":
                if (cache[:, table[-1], 0] != checksum(request.prompt[:tokens])).any():
                    return False
                continue
            first = max(0, tokens - (WINDOW - 1)) if group.kind == "window" else 0
            for place in range(first, min(tokens, len(request.prompt))):
                found = cache[:, table[place // self.block], place % self.block].tolist()
                if found != [value(request.prompt[place], place, layer) for layer in range(LAYERS)]:
                    return False
        return True

    # Ends

    def _finish(self, request: Request, status: Status, *, parked: bool = False) -> None:
        request.status = status
        delayed, request.answer = self.half.finished(request)
        told = [status.name, delayed, sorted(request.answer or ())]
        self.calls.append(["request_finished_all_groups", told])
        if not delayed and not parked:
            self._free(request)

    def _fail(self, request: Request) -> None:
        if request.status is not Status.WAITING_FOR_REMOTE_KVS:
            return
        request.failed = True
        if not self.recompute:
            self.waiting.remove(request)
            self._finish(request, Status.FINISHED_ERROR, parked=True)

    def _received(self, request: Request, *, failed: bool) -> None:
        if request.status is Status.WAITING_FOR_REMOTE_KVS:
            assert not request.arrived, "reported twice"
            request.arrived, request.failed = True, failed
        else:
            assert request.status in (Status.FINISHED_ABORTED, Status.FINISHED_ERROR)
            self._free(request)

    def _free(self, request: Request) -> None:
        self._free_blocks(request)
        del self.requests[request.request_id]  # a KeyError here is vLLM's assertion: EngineCore would be dead

    def _free_blocks(self, request: Request) -> None:
        for table in request.tables:
            self.pool.free_blocks([self.pool.blocks[block] for block in table if block])
        request.tables = []

    @property
    def in_use(self) -> int:
        return BLOCKS - 1 - len(self.pool.free)


def need(group: CacheGroup, chunk: int) -> Need:
    """What vLLM says of a group."""
    if group.kind == "state":
        return Need(BLOCK, 1, fixed=True)
    tokens = LONGEST if group.kind == "full" else min(LONGEST, WINDOW - 1 + chunk)
    return Need(BLOCK, -(-tokens // BLOCK) + (group.kind == "window"))


def run(*engines: StandIn, seconds: float = 50.0, until: Any = None) -> None:
    """Step until everything has ended, or ``until`` is true."""
    deadline = time.monotonic() + seconds
    done = until if until is not None else lambda: not any(engine.requests or engine.half.busy for engine in engines)
    while not done():
        assert time.monotonic() < deadline, [repr(r) for engine in engines for r in engine.requests.values()]
        for engine in engines:
            engine.step()

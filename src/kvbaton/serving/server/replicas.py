"""The data-parallel ranks of a server as one engine: each is a process of its own, with its own pools and peers.

Rules: a request goes to the rank that it names, or where its room belongs, else to the one whose turn it is or that has
least to do; it stays there. A rank that is lost ends what it had, and ``watch`` tells: a server without one of its
ranks cannot keep the promise that a room is where it belongs.

This file must not know how ranks are started, or what a request is about.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection

from kvbaton.discovery.placement import LoadBalance, checked_rank
from kvbaton.discovery.registry import Route
from kvbaton.errors import ConfigError, ExpiredError, InternalError, KVBatonError
from kvbaton.manager import TraceEvent
from kvbaton.plan.layout_file import RankLayout
from kvbaton.serving.engine.handoffs import Handoffs, sum_of
from kvbaton.serving.engine.orders import (
    EndAll,
    EndRequest,
    HandOn,
    ReplicaAnswer,
    ReplicaOrder,
    ReplicaOutput,
    ReplicaQuery,
    ReplicaReady,
    ReplicaReport,
    Stop,
    SubmitRequest,
)
from kvbaton.serving.engine.pipe import Pipe
from kvbaton.serving.engine.request import Output, Request
from kvbaton.serving.engine.stats import Stats

#: How long a rank may take to say how it fares.
ASK_SECONDS = 5.0
#: How long a rank may take to end once it was ordered to.
STOP_SECONDS = 20.0
logger = logging.getLogger(__name__)


class RemoteReplica:
    """The server's end of one rank. ``kill`` ends its process."""

    def __init__(self, rank: int, connection: Connection, kill: Callable[[], None]) -> None:
        self.rank = rank
        self.routes: tuple[Route, ...] = ()
        self.layouts: tuple[RankLayout, ...] = ()
        self.on_lost: Callable[[KVBatonError], None] = lambda _error: None
        self.lost: KVBatonError | None = None
        self._pipe: Pipe[ReplicaReport] = Pipe(connection, f"data-parallel rank {rank}", ReplicaReport, kill=kill)
        self._lock = threading.Lock()
        self._listeners: dict[str, Callable[[Output], None]] = {}
        self._questions: dict[int, Future[ReplicaAnswer]] = {}
        self._numbers = itertools.count(1)
        self._closing = False
        self._thread = threading.Thread(target=self._listen, name=f"kvbaton-dp-{rank}", daemon=True)

    def start(self, seconds: float) -> None:
        """Wait until it is ready, then listen. Raises InternalError, or what kept it from being ready."""
        ready = self._pipe.first(ReplicaReady, seconds)
        self.routes, self.layouts = ready.routes, ready.layouts
        self._thread.start()

    @property
    def alive(self) -> int:
        """Requests that have not ended."""
        return len(self._listeners)

    def has(self, request_id: str) -> bool:
        """Whether it is one of them."""
        return request_id in self._listeners

    def submit(self, request: Request, on_output: Callable[[Output], None]) -> None:
        """Raises InternalError when the rank is lost. What the rank refuses comes as an output."""
        with self._lock:
            if self.lost is not None:
                raise self.lost.again()
            self._listeners[request.request_id] = on_output
        self._order(SubmitRequest(request))

    def abort(self, request_id: str, reason: str) -> None:
        if self.has(request_id):
            self._order(EndRequest(request_id, reason))

    def hand_on(self, request_ids: Sequence[str], room: int) -> None:
        self._order(HandOn(tuple(request_ids), room))

    def end_all(self, error: KVBatonError) -> None:
        self._order(EndAll(error))

    def ask(self, room: int | None = None) -> ReplicaAnswer:
        """Raises ExpiredError when it does not answer, InternalError when it is lost."""
        pending: Future[ReplicaAnswer] = Future()
        number = next(self._numbers)
        with self._lock:
            if self.lost is not None:
                raise self.lost.again()
            self._questions[number] = pending
        self._order(ReplicaQuery(number, room))
        try:
            answer = pending.result(ASK_SECONDS)
        except TimeoutError:
            raise ExpiredError(f"{self._pipe.who} does not answer within {ASK_SECONDS:g} s") from None
        finally:
            with self._lock:
                self._questions.pop(number, None)
        if answer.error is not None:
            raise answer.error
        return answer

    def stop(self) -> None:
        """Tell it to end."""
        self._closing = True
        self._order(Stop())

    def close(self) -> None:
        """Wait, within a bound, until its pipe has ended. Idempotent."""
        if self._thread.ident is not None:
            self._thread.join(STOP_SECONDS)
        self._pipe.close()

    def _order(self, order: ReplicaOrder) -> None:
        """A rank that is gone is noticed by its listener, which ends what waits for it."""
        try:
            self._pipe.send(order)
        except InternalError as error:
            logger.debug("%s", error)

    def _listen(self) -> None:
        """The thread."""
        while True:
            report = self._pipe.recv()
            if isinstance(report, ReplicaOutput):
                self._pass_on(report)
            elif isinstance(report, ReplicaAnswer):
                with self._lock:
                    question = self._questions.get(report.number)
                if question is not None:
                    with suppress(InvalidStateError):
                        question.set_result(report)
            else:
                self._lose(self._pipe.lost(report))
                return

    def _pass_on(self, report: ReplicaOutput) -> None:
        with self._lock:
            listener = self._listeners.get(report.request_id)
            if report.output.final:
                self._listeners.pop(report.request_id, None)
        if listener is not None:
            output = replace(report.output, rank=self.rank) if self.rank else report.output
            _send(listener, output)

    def _lose(self, error: InternalError) -> None:
        with self._lock:
            self.lost = error
            listeners, questions = list(self._listeners.values()), list(self._questions.values())
            self._listeners.clear()
        for listener in listeners:
            _send(listener, Output(error=error.again()))
        for question in questions:
            with suppress(InvalidStateError):  # whoever asked has its answer, or has given up
                question.set_exception(error.again())
        if not self._closing:
            logger.error("%s", error)
            self.on_lost(error)


def _send(listener: Callable[[Output], None], output: Output) -> None:
    """A caller that cannot be reached (its event loop has ended) must not end the others."""
    try:
        listener(output)
    except Exception:  # foreign code at the top of our thread
        logger.exception("the caller of a request cannot be reached any more")


class Replicas:
    """All of them: the :class:`Replica` of a server with data parallelism.

    ``placed`` is called with the rank of each room, on the thread that submits.
    """

    def __init__(
        self, ranks: Sequence[RemoteReplica], balance: LoadBalance, placed: Callable[[int, int], None]
    ) -> None:
        self._ranks = tuple(ranks)
        self._balance = balance
        self._placed = placed
        self._turns = itertools.count()

    @property
    def routes(self) -> Sequence[Route]:
        return [route for rank in self._ranks for route in rank.routes]

    @property
    def layouts(self) -> Sequence[RankLayout]:
        """Of the first one: the others' are alike."""
        return self._ranks[0].layouts

    def submit(self, request: Request, on_output: Callable[[Output], None]) -> None:
        """Raises ConfigError for a rank that does not exist or an id in use, InternalError when the rank is lost."""
        if any(rank.has(request.request_id) for rank in self._ranks):
            raise ConfigError(f"request_id: {request.request_id!r} is in use by a request that has not ended")
        rank = self._choose(request.dp_rank)
        if request.room is not None:
            self._placed(request.room, rank.rank)
        rank.submit(request, on_output)

    def abort(self, request_id: str, reason: str = "aborted by the client") -> None:
        for rank in self._ranks:
            rank.abort(request_id, reason)

    def end_all(self, error: KVBatonError) -> None:
        for rank in self._ranks:
            rank.end_all(error)

    def hand_on(self, request_ids: Sequence[str], room: int) -> None:
        """They are of one HTTP request, and one group of ranks is to be their source: what is spread stays here."""
        for rank in self._ranks:
            if request_ids and all(rank.has(request_id) for request_id in request_ids):
                rank.hand_on(request_ids, room)
                return
        logger.info("%d requests stay here: no data-parallel rank has all of them", len(request_ids))

    def stats(self) -> Stats:
        """The sum."""
        return _sum([answer.stats for answer in self._ask_all() if answer.stats is not None])

    @property
    def failure(self) -> KVBatonError | None:
        return next((rank.lost for rank in self._ranks if rank.lost is not None), None)

    def handoffs(self) -> Handoffs | None:
        found = [answer.handoffs for answer in self._ask_all() if answer.handoffs is not None]
        return sum_of(found) if found else None

    def timeline(self, room: int) -> Sequence[TraceEvent]:
        events = [event for answer in self._ask_all(room) for event in answer.events]
        return sorted(events, key=lambda event: -event.seconds_ago)

    def watch(self, on_lost: Callable[[KVBatonError], None]) -> None:
        for rank in self._ranks:
            rank.on_lost = on_lost
            if rank.lost is not None:
                on_lost(rank.lost)

    def _choose(self, named: int | None) -> RemoteReplica:
        if named is not None:
            return self._ranks[checked_rank(named, len(self._ranks), "data_parallel_rank")]
        turn = next(self._turns) % len(self._ranks)
        if self._balance == "round_robin":
            return self._ranks[turn]
        return min(self._ranks[turn:] + self._ranks[:turn], key=lambda rank: rank.alive)

    def _ask_all(self, room: int | None = None) -> list[ReplicaAnswer]:
        return [rank.ask(room) for rank in self._ranks]


def _sum(several: Sequence[Stats]) -> Stats:
    queues = Counter[str]()
    for one in several:
        queues.update(one.queues)
    return Stats(
        pages_free=sum(one.pages_free for one in several),
        pages_used=sum(one.pages_used for one in several),
        pages_leased=sum(one.pages_leased for one in several),
        slots_used=sum(one.slots_used for one in several),
        running=sum(one.running for one in several),
        queues=dict(queues),
        prefix_lookups=sum(one.prefix_lookups for one in several),
        prefix_hit_tokens=sum(one.prefix_hit_tokens for one in several),
    )

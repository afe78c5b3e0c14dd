"""Data-parallel ranks behind one server: who gets a request, what comes back, and what becomes of it when one is lost.

Each rank is the real loop of its process, on a thread, around a scripted engine.
"""

from __future__ import annotations

import multiprocessing
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import pytest

from kvbaton.discovery.placement import LoadBalance
from kvbaton.discovery.registry import RegistryCoordinates, Route, Sizes
from kvbaton.errors import ConfigError, ExpiredError, InternalError, KVBatonError, OverloadedError
from kvbaton.manager import TraceEvent
from kvbaton.plan.layout_file import RankLayout
from kvbaton.serving.engine.handoffs import Handoffs, StagingUse
from kvbaton.serving.engine.pipe import tell_death
from kvbaton.serving.engine.request import HandedOnError, Output, Request
from kvbaton.serving.server.replica_process import ReplicaProcess
from kvbaton.serving.server.replicas import RemoteReplica, Replicas
from kvbaton.serving.testing.engine import ScriptedEngine, spell

PATIENCE_SECONDS = 20.0


class ScriptedReplica(ScriptedEngine):
    """A scripted engine that tells of hand-offs."""

    def __init__(self, rank: int, script: Callable[[Request], Iterable[Output]]) -> None:
        super().__init__(script)
        self.rank = rank
        self.trouble: KVBatonError | None = None
        self.on_lost: Callable[[KVBatonError], None] = lambda _error: None

    @property
    def routes(self) -> Sequence[Route]:
        route = Route(
            instance=f"i{self.rank}",
            group="g",
            address=f"tcp://127.0.0.1:{41000 + self.rank}",
            layout_digest="d",
            http_port=0,
            coordinates=RegistryCoordinates(dp=self.rank),
            sizes=Sizes(dp=2),
        )
        return [route]

    @property
    def layouts(self) -> Sequence[RankLayout]:
        return ()

    def handoffs(self) -> Handoffs:
        if self.trouble is not None:
            raise self.trouble
        return Handoffs(
            evidence="UCX: tcp" if self.rank else "",
            address=self.routes[0].address,
            group=f"g.dp{self.rank}",
            layout_digest="d",
            rank=0,
            live_rooms=1,
            leased_rooms=self.rank,
            quarantined_rooms=0,
            staging=StagingUse(policy="auto", slot_bytes=10, slots=4, slots_free=4 - self.rank),
            counters={"writes_posted": 3, f"only_{self.rank}": 1},
        )

    def timeline(self, room: int) -> Sequence[TraceEvent]:
        return [TraceEvent(3.0 - self.rank, f"room {room} on {self.rank}")]

    def watch(self, on_lost: Callable[[KVBatonError], None]) -> None:
        self.on_lost = on_lost


class Setup:
    """Ranks, the replicas that lead to them, and what was placed."""

    def __init__(self, ranks: int, balance: LoadBalance, script: Callable[[Request], Iterable[Output]]) -> None:
        self.engines = [ScriptedReplica(rank, script) for rank in range(ranks)]
        self.placed: list[tuple[int, int]] = []
        self.threads = []
        self.remotes = []
        self.raised: SimpleQueue[KVBatonError] = SimpleQueue()
        for engine in self.engines:
            here, there = multiprocessing.Pipe()
            process = ReplicaProcess(there, engine)
            self.threads.append(threading.Thread(target=self._live, args=(process, there), daemon=True))
            self.remotes.append(RemoteReplica(engine.rank, here, lambda: None))
        for thread, remote in zip(self.threads, self.remotes, strict=True):
            thread.start()
            remote.start(PATIENCE_SECONDS)
        self.replicas = Replicas(self.remotes, balance, lambda room, rank: self.placed.append((room, rank)))

    def _live(self, process: ReplicaProcess, connection: Connection) -> None:
        try:
            process.run()
        except KVBatonError as error:
            self.raised.put(error)
            tell_death(connection, error)
        finally:
            connection.close()

    def submit(self, request_id: str, *, room: int | None = None, dp_rank: int | None = None) -> SimpleQueue[Output]:
        """Everything that the request is answered with."""
        outputs: SimpleQueue[Output] = SimpleQueue()
        request = Request(request_id=request_id, prompt_tokens=(1, 2), room=room, sources=("a",), dp_rank=dp_rank)
        self.replicas.submit(request, outputs.put)
        return outputs

    def wait_for(self, rank: int, condition: Callable[[ScriptedReplica], bool]) -> None:
        engine = self.engines[rank]
        with engine._changed:
            assert engine._changed.wait_for(lambda: condition(engine), PATIENCE_SECONDS), repr(engine)

    def close(self) -> None:
        for remote in self.remotes:
            remote.stop()
        for remote in self.remotes:
            remote.close()
        for thread in self.threads:
            thread.join(PATIENCE_SECONDS)
            assert not thread.is_alive()


Make = Callable[..., Setup]


@pytest.fixture
def make() -> Iterator[Make]:
    setups = []

    def make(
        ranks: int = 2,
        balance: LoadBalance = "total_requests",
        script: Callable[[Request], Iterable[Output]] = lambda _request: (),
    ) -> Setup:
        setups.append(Setup(ranks, balance, script))
        return setups[-1]

    yield make
    for setup in setups:
        setup.close()


def heard(outputs: SimpleQueue[Output]) -> Output:
    return outputs.get(timeout=PATIENCE_SECONDS)


def test_a_request_goes_through_and_its_outputs_come_back_whole(make: Make) -> None:
    setup = make(script=lambda _request: spell("hey"))
    outputs = setup.submit("r", room=7, dp_rank=1)
    assert [heard(outputs) for _ in range(3)] == [replace(output, rank=1) for output in spell("hey")]
    assert setup.engines[1].requests == [
        Request(request_id="r", prompt_tokens=(1, 2), room=7, sources=("a",), dp_rank=1)
    ]
    assert setup.placed == [(7, 1)]
    setup.submit("r")  # the id is free again


def test_those_who_take_turns_take_turns(make: Make) -> None:
    setup = make(3, "round_robin")
    for number in range(6):
        setup.submit(f"r{number}", room=number)
    assert setup.placed == [(number, number % 3) for number in range(6)]


def test_the_rank_with_the_fewest_requests_gets_the_next(make: Make) -> None:
    setup = make(3, "total_requests")
    first = setup.submit("a", dp_rank=0)
    setup.submit("b", dp_rank=0)
    setup.submit("c", dp_rank=1)
    for number in range(3):
        setup.submit(f"r{number}", room=number)
    assert sorted(rank for _, rank in setup.placed) == [1, 2, 2]
    setup.wait_for(0, lambda engine: "a" in engine.live)
    setup.engines[0].emit("a", Output(finish_reason="stop"))
    assert heard(first).final
    setup.submit("last", room=9)
    assert setup.placed[-1] == (9, 0)


def test_a_rank_that_does_not_exist_and_an_id_in_use_are_refused(make: Make) -> None:
    setup = make()
    with pytest.raises(ConfigError, match=r"^data_parallel_rank: 2 is none of the 2"):
        setup.submit("r", dp_rank=2)
    setup.submit("r", dp_rank=1)
    with pytest.raises(ConfigError, match=r"^request_id: 'r' is in use"):
        setup.submit("r", dp_rank=0)


def test_what_an_engine_refuses_is_the_answer(make: Make) -> None:
    setup = make()
    setup.engines[0].refusal = OverloadedError("full", room=7)
    error = heard(setup.submit("r", dp_rank=0)).error
    assert (type(error), str(error)) == (OverloadedError, "full [room 7]")
    setup.engines[0].refusal = None
    setup.submit("r", dp_rank=0)


def test_an_abort_reaches_the_rank_that_has_the_request_and_no_other(make: Make) -> None:
    setup = make()
    outputs = setup.submit("r", dp_rank=1)
    setup.replicas.abort("r", "enough")
    setup.replicas.abort("nobody")
    assert str(heard(outputs).error) == "enough"
    assert [engine.aborted for engine in setup.engines] == [[], ["r"]]


def test_all_requests_of_all_ranks_can_be_ended_with_one_error(make: Make) -> None:
    setup = make()
    outputs = [setup.submit(f"r{rank}", dp_rank=rank) for rank in (0, 1)]
    setup.replicas.end_all(OverloadedError("stopping"))
    assert [str(heard(one).error) for one in outputs] == ["stopping", "stopping"]


def test_what_the_ranks_hold_is_told_as_one(make: Make) -> None:
    setup = make()
    setup.submit("r", dp_rank=1)
    setup.wait_for(1, lambda engine: bool(engine.live))
    stats = setup.replicas.stats()
    assert (stats.pages_free, stats.pages_used, stats.running, stats.queues) == (20, 2, 1, {"waiting": 0})
    assert (stats.prefix_lookups, stats.prefix_hit_tokens) == (6, 96)
    handoffs = setup.replicas.handoffs()
    assert handoffs == Handoffs(
        evidence="UCX: tcp",
        address="tcp://127.0.0.1:41000, tcp://127.0.0.1:41001",
        group="g.dp0, g.dp1",
        layout_digest="d",
        rank=0,
        live_rooms=2,
        leased_rooms=1,
        quarantined_rooms=0,
        staging=StagingUse(policy="auto", slot_bytes=10, slots=8, slots_free=7),
        counters={"writes_posted": 6, "only_0": 1, "only_1": 1},
    )
    assert [route.coordinates.dp for route in setup.replicas.routes] == [0, 1]
    assert setup.replicas.timeline(5) == [TraceEvent(3.0, "room 5 on 0"), TraceEvent(2.0, "room 5 on 1")]
    setup.engines[1].trouble = ExpiredError("the driver does not answer")
    with pytest.raises(ExpiredError, match="the driver does not answer"):
        setup.replicas.handoffs()


def test_a_caller_that_cannot_be_reached_is_left_alone_and_the_others_are_served(make: Make) -> None:
    """Its event loop may have ended."""

    def gone(_output: Output) -> None:
        raise RuntimeError("Event loop is closed")

    setup = make(script=lambda _request: spell("hey"))
    setup.replicas.submit(Request(request_id="gone", prompt_tokens=(1,), dp_rank=0), gone)
    outputs = setup.submit("r", dp_rank=0)
    assert [heard(outputs) for _ in range(3)] == spell("hey")


def test_a_rank_that_loses_a_process_ends_what_it_had_and_says_so_once(make: Make) -> None:
    setup = make()
    told: SimpleQueue[KVBatonError] = SimpleQueue()
    setup.replicas.watch(told.put)
    lost, kept = setup.submit("r", dp_rank=0), setup.submit("s", dp_rank=1)
    setup.wait_for(0, lambda engine: bool(engine.live))
    assert setup.replicas.failure is None
    setup.engines[0].on_lost(InternalError("rank 1 of this group is lost"))
    error = told.get(timeout=PATIENCE_SECONDS)
    assert "data-parallel rank 0 is lost: rank 1 of this group is lost" in str(error)
    assert str(heard(lost).error) == str(error)
    assert setup.replicas.failure is error
    with pytest.raises(InternalError, match="data-parallel rank 0 is lost"):
        setup.submit("t", dp_rank=0)
    with pytest.raises(InternalError, match="data-parallel rank 0 is lost"):
        setup.replicas.stats()
    late: SimpleQueue[KVBatonError] = SimpleQueue()
    setup.replicas.watch(late.put)  # who comes late hears of it as well
    assert late.get(timeout=0) is error
    setup.wait_for(1, lambda engine: bool(engine.live))
    setup.engines[1].emit("s", Output(finish_reason="stop"))
    assert heard(kept).final


def test_a_rank_that_is_lost_after_it_has_answered_is_told_all_the_same(make: Make) -> None:
    """The question was answered and not yet taken from the table: InvalidStateError ended the listener, and the server
    went on without its rank."""
    setup = make()
    told: SimpleQueue[KVBatonError] = SimpleQueue()
    setup.replicas.watch(told.put)
    answered: Future[Any] = Future()
    answered.set_result(None)
    setup.remotes[0]._questions[99] = answered
    setup.engines[0].on_lost(InternalError("rank 1 of this group is lost"))
    assert "data-parallel rank 0 is lost" in str(told.get(timeout=PATIENCE_SECONDS))


def test_each_caller_gets_an_error_of_its_own(make: Make) -> None:
    """One instance raised again and again collects every caller's traceback."""
    setup = make()
    told: SimpleQueue[KVBatonError] = SimpleQueue()
    setup.replicas.watch(told.put)
    setup.engines[0].on_lost(InternalError("rank 1 of this group is lost"))
    told.get(timeout=PATIENCE_SECONDS)
    raised = []
    for number in range(3):
        with pytest.raises(InternalError) as caught:
            setup.submit(f"r{number}", dp_rank=0)
        raised.append(caught.value)
    assert len({id(error) for error in raised}) == 3
    depths = [len(traceback.extract_tb(error.__traceback__)) for error in raised]
    assert len(set(depths)) == 1, depths


def test_a_rank_whose_engine_dies_ends(make: Make) -> None:
    setup = make()
    told: SimpleQueue[KVBatonError] = SimpleQueue()
    setup.replicas.watch(told.put)
    setup.engines[1].refusal = InternalError("the engine's scheduler died")
    assert "data-parallel rank 1 is lost: the engine's scheduler died" in str(told.get(timeout=PATIENCE_SECONDS))


def test_what_keeps_a_rank_from_being_ready_is_raised() -> None:
    here, there = multiprocessing.Pipe()
    tell_death(there, ConfigError("no such model"))
    with pytest.raises(ConfigError, match="no such model"):
        RemoteReplica(0, here, lambda: None).start(PATIENCE_SECONDS)
    here, there = multiprocessing.Pipe()
    with pytest.raises(InternalError, match="data-parallel rank 0 was not ready within 0 s"):
        RemoteReplica(0, here, lambda: None).start(0)
    there.close()
    with pytest.raises(InternalError, match="ended before it was ready"):
        RemoteReplica(0, here, lambda: None).start(PATIENCE_SECONDS)


def test_the_rank_that_has_an_answer_hands_it_on_and_what_is_spread_stays(make: Make) -> None:
    setup = make(2)
    answers = {name: setup.submit(name, room=number, dp_rank=number) for number, name in enumerate(("a", "b"))}
    for number, name in enumerate(answers):
        setup.wait_for(number, lambda engine, name=name: name in engine.live)
    setup.replicas.hand_on(["a", "b"], 70)
    setup.replicas.hand_on(["b"], 71)
    departing = answers["b"].get(timeout=PATIENCE_SECONDS)
    assert (departing.departing, departing.rank) == (True, 1)
    assert [engine.handed_on for engine in setup.engines] == [{}, {71: ("b",)}]
    setup.engines[1].emit("b", Output(error=HandedOnError("it is elsewhere")))
    last = answers["b"].get(timeout=PATIENCE_SECONDS)
    assert isinstance(last.error, HandedOnError)
    assert not setup.remotes[1].has("b")

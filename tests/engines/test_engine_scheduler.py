"""The scheduler's thread with roles made for the occasion: wake-ups, ends, death."""

from __future__ import annotations

import threading

import pytest
from engine_kit import Caller, call

from kvbaton.errors import AbortedError, ConfigError, InternalError, KVBatonError, OverloadedError
from kvbaton.serving.engine.job import Job
from kvbaton.serving.engine.limits import Limits
from kvbaton.serving.engine.request import Output, Request
from kvbaton.serving.engine.scheduler import STOPPING, Role, Scheduler, SchedulerConfig
from kvbaton.serving.engine.stats import Stats

LIMITS = Limits(max_positions=100, vocab_size=10, pool_tokens=100)


class Keeper(Role):
    """Answers a job when ``answer`` is called; counts how often it was asked to step."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.steps = 0
        self.open = False
        self.added = threading.Event()
        self.broken = False

    def add(self, job: Job) -> None:
        self.jobs.append(job)
        self.added.set()

    def end(self, job: Job, error: KVBatonError) -> None:
        self.jobs.remove(job)
        job.fail(error)

    def step(self) -> bool:
        self.steps += 1
        if self.broken:
            raise ZeroDivisionError("a bug")
        if not (self.open and self.jobs):
            return False
        self.jobs.pop().emit(Output(finish_reason="stop"))
        return True

    @property
    def busy(self) -> bool:
        return bool(self.jobs)

    def stats(self) -> Stats:
        return Stats(pages_free=0, pages_used=0, pages_leased=0, slots_used=0, running=len(self.jobs))


def make(role: Role, **config: int) -> tuple[Scheduler, threading.Event]:
    wakeup = threading.Event()
    return Scheduler(role, LIMITS, SchedulerConfig(**config), wakeup=wakeup, name="test"), wakeup


def ask(name: str = "r") -> Request:
    return Request(request_id=name, prompt_tokens=(1,))


def test_all_requests_can_be_ended_with_one_error_and_the_engine_goes_on() -> None:
    role = Keeper()
    with make(role)[0] as scheduler:
        callers = [call(scheduler, ask(name)) for name in "ab"]
        roomy = call(scheduler, Request(request_id="c", prompt_tokens=(1,), room=7))
        scheduler.end_all(OverloadedError("enough"))
        assert [str(caller.wait().last.error) for caller in (*callers, roomy)] == [
            "enough",
            "enough",
            "enough [room 7]",
        ]
        later = call(scheduler, ask("d"))
        scheduler.abort("d", "nobody waits")
        assert repr(later.wait().last.error) == repr(AbortedError("nobody waits"))


def test_an_idle_scheduler_does_not_step() -> None:
    role = Keeper()
    scheduler, wakeup = make(role)
    with scheduler:
        caller = call(scheduler, ask())
        assert role.added.wait(10)
        assert not scheduler.wait_quiet(0.05)
        before = role.steps
        assert not threading.Event().wait(0.1)
        assert role.steps - before <= 1
        role.open = True
        wakeup.set()
        assert caller.wait().last.finish_reason == "stop"
        assert scheduler.wait_quiet(10)


def test_close_ends_what_is_left_and_refuses_what_comes() -> None:
    role = Keeper()
    scheduler, _ = make(role)
    scheduler.start()
    callers = [call(scheduler, ask(name)) for name in "abc"]
    assert scheduler.close()
    assert [str(caller.wait().last.error) for caller in callers] == [STOPPING] * 3
    with pytest.raises(OverloadedError, match="closed"):
        call(scheduler, ask())
    assert scheduler.close()
    assert scheduler.drain(1)


def test_close_before_start() -> None:
    assert make(Keeper())[0].close()


def test_drain_refuses_and_waits() -> None:
    role = Keeper()
    scheduler, wakeup = make(role)
    with scheduler:
        caller = call(scheduler, ask())
        assert not scheduler.drain(0.05)
        with pytest.raises(OverloadedError, match="draining"):
            call(scheduler, ask("late"))
        assert scheduler.failure is None
        role.open = True
        wakeup.set()
        assert scheduler.drain(10)
        assert caller.wait().last.finish_reason == "stop"


def test_bounds() -> None:
    role = Keeper()
    scheduler, _ = make(role, max_requests=2)
    with scheduler:
        call(scheduler, ask("a"))
        with pytest.raises(ConfigError, match="request_id"):
            call(scheduler, ask("a"))
        call(scheduler, ask("b"))
        with pytest.raises(OverloadedError, match="2 requests"):
            call(scheduler, ask("c"))
    with pytest.raises(ConfigError, match="max_batch"):
        SchedulerConfig(max_batch=0)


def test_a_dead_thread_tells_every_caller(caplog: pytest.LogCaptureFixture) -> None:
    role = Keeper()
    scheduler, wakeup = make(role)
    scheduler.start()
    callers = [call(scheduler, ask(name)) for name in "ab"]
    assert scheduler.failure is None
    role.broken = True
    wakeup.set()
    for caller in callers:
        assert isinstance(caller.wait().last.error, InternalError)
    assert isinstance(scheduler.failure, InternalError)
    with pytest.raises(InternalError, match="scheduler died; restart"):
        call(scheduler, ask("late"))
    assert not scheduler.drain(1)
    assert not scheduler.close()
    assert "died" in caplog.text


def test_nothing_is_said_after_the_last_word() -> None:
    said: list[Output] = []
    job = Job(ask(), said.append, lambda _: None)
    job.emit(Output(text="a"))
    job.emit(Output(finish_reason="stop"))
    job.emit(Output(text="b"))
    job.fail(InternalError("late"))
    assert [output.text for output in said] == ["a", ""]
    assert "done" in repr(job)


def test_a_caller_may_ask_again_from_its_callback() -> None:
    role = Keeper()
    role.open = True
    scheduler, _ = make(role)
    again = Caller()
    with scheduler:
        scheduler.submit(ask(), lambda _: scheduler.submit(ask(), again))
        assert again.wait().last.finish_reason == "stop"

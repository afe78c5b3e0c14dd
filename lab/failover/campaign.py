"""A fault strikes one worker of a running deployment under load; every client's answer is judged."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvbaton.serving.fleet import Fleet, Server
from lab.failover.load import Expected, Outcome, ask, run_load
from lab.metrics import scraped

FAULTS = ("kill", "stop", "term")
VICTIMS = ("decode", "prefill")
#: Requests that are answered before a fault strikes, of all.
STRUCK_AFTER = 0.25
_COUNTERS = ("kvbaton_router_retries_total", "kvbaton_router_resumed_total", "kvbaton_router_handed_on_total")
_RECOMPUTED = "kvbaton_recomputed_tokens_total"


@dataclass(kw_only=True, slots=True)
class Result:
    """What a load of requests met. ``victims`` are those that the fault struck, one after the other."""

    fault: str
    victims: list[str]
    requests: int
    failures: Counter[str] = field(default_factory=Counter)
    longest_pause_seconds: float = 0.0
    retries: int = 0
    resumed: int = 0
    handed_on: int = 0
    recomputed_tokens: int = 0
    left_behind: str = ""

    @property
    def ok(self) -> bool:
        return not self.failures and not self.left_behind


async def strike(fleet: Fleet, fault: str, victim: Server, over: asyncio.Event) -> None:
    """The fault, and its end: who was killed stays away until the load is ``over``, as who was stopped does; who is
    told to end is started again."""
    if fault == "kill":
        await victim.kill()
        await over.wait()
        await victim.start()
    elif fault == "stop":
        victim.send_signal(signal.SIGSTOP)
        await over.wait()
        victim.send_signal(signal.SIGCONT)
    else:
        await victim.stop()
        await victim.start()
    await fleet.ready(victim)


async def run_fault(
    fleet: Fleet, fault: str, victims: Sequence[Server], expected: Sequence[Expected], requests: int, concurrency: int
) -> Result:
    """One load with one fault; with several victims one after the other, as in a rolling restart."""
    result = Result(fault=fault, victims=[victim.name for victim in victims], requests=requests)
    before = await _counts(fleet)
    due, over = asyncio.Event(), asyncio.Event()

    def answered(count: int) -> None:
        if count >= requests * STRUCK_AFTER:
            due.set()

    async def strikes() -> None:
        await due.wait()
        for victim in victims:
            await strike(fleet, fault, victim, over)

    async def ask_one(one: Expected, stream: bool) -> Outcome:
        return await ask(fleet.http, fleet.router.url, one, stream=stream)

    striking = asyncio.create_task(strikes())
    outcomes = await run_load(ask_one, expected, requests, concurrency, answered)
    over.set()
    await striking
    await fleet.ready(fleet.router)
    for outcome in outcomes:
        result.longest_pause_seconds = max(result.longest_pause_seconds, outcome.pause_seconds)
        if outcome.error:
            result.failures[outcome.error[:200]] += 1
    after = await _counts(fleet)
    result.retries, result.resumed, result.handed_on, result.recomputed_tokens = (
        sum(_grown(before[server, name], after[server, name]) for server in _counting(fleet))
        for name in (*_COUNTERS, _RECOMPUTED)
    )
    with contextlib.suppress(Exception):
        await fleet.all_returned(60.0)
        return result
    result.left_behind = "pages, slots or rooms are still held"
    return result


def _counting(fleet: Fleet) -> list[Server]:
    return [fleet.router, *fleet.decodes]


def _grown(before: int, after: int) -> int:
    """A server that was started again has begun at 0."""
    return after - before if after >= before else after


async def _counts(fleet: Fleet) -> Counter[tuple[Server, str]]:
    found = Counter[tuple[Server, str]]()
    for server in _counting(fleet):
        values = await scraped(fleet.http, server.url)
        for name in (*_COUNTERS, _RECOMPUTED):
            found[server, name] = int(values.get(name, 0))
    return found

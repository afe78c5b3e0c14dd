"""One prefill and several decode servers with prefix caches, behind a router for each policy; policies take turns.

A round asks new prompts, so that what a policy finds in a cache is what it has put there itself.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import aiohttp
import msgspec

from kvbaton.cli.router import POLICIES
from kvbaton.errors import TransferFailedError
from kvbaton.serving.demo.show import JSON
from kvbaton.serving.fleet import Fleet, Server, free_ports
from lab.metrics import summed
from lab.policies.workload import WORKLOADS, Asked

#: A decode server's pool: about eight beginnings of the workload beside what runs.
POOL_TOKENS = 8192
_DECODE_HEADER = "X-KVBaton-Decode"


@dataclass(kw_only=True, slots=True)
class Measured:
    """One policy under one workload; a figure for each round.

    Args:
        rates: requests answered per second.
        hits: share of the prompts' tokens that decode had in its cache.
        skews: what the busiest decode server wrote and read (tokens of its prompts that were no hits, and of its
            answers), over the mean of all.
        megabytes: handed over.
    """

    policy: str
    workload: str
    rates: list[float] = field(default_factory=list)
    hits: list[float] = field(default_factory=list)
    skews: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)
    loads: list[float] = field(default_factory=list)

    def row(self, first: Measured) -> list[str]:
        """``first``: the policy that rates are told in ratios to."""
        return [
            self.workload,
            self.policy,
            f"{median(self.hits):.0%}",
            f"{median(self.rates):.2f}",
            f"{median(one / other for one, other in zip(self.rates, first.rates, strict=True)):.2f}",
            f"{median(self.megabytes):.1f}",
            f"{median(self.skews):.2f}",
        ]


HEADINGS = ("workload", "policy", "hit rate", "requests/s", "/ round_robin", "MB handed over", "skew")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Answer:
    decode: str
    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int


async def compare(
    directory: Path, *, decodes: int, requests: int, concurrency: int, rounds: int, tell: Callable[[str], None]
) -> list[Measured]:
    """All policies, all workloads."""
    found = {(load, policy): Measured(policy=policy, workload=load) for load in WORKLOADS for policy in POLICIES}
    pool, caches = ("--max-total-tokens", str(POOL_TOKENS)), ("--disaggregation-decode-enable-radix-cache",)
    async with Fleet(directory, model="recall", decodes=decodes, extra=pool, decode_extra=caches) as fleet:
        routers = {policy: _router(fleet, policy, directory) for policy in POLICIES}
        try:
            await asyncio.gather(*(router.start() for router in routers.values()))
            await fleet.all_ready()
            await asyncio.gather(*(fleet.ready(router) for router in routers.values()))
            for number in range(rounds):
                for load, make in WORKLOADS.items():
                    for place, policy in enumerate(POLICIES):
                        asked = make(number * len(POLICIES) + place, requests)
                        await _measure(fleet, routers[policy], asked, concurrency, found[load, policy])
                        one = found[load, policy]
                        tell(f"round {number + 1}, {load}, {policy}: {', '.join(one.row(one)[2:])}")
        finally:
            await asyncio.gather(*(router.stop() for router in routers.values()))
    return list(found.values())


def _router(fleet: Fleet, policy: str, directory: Path) -> Server:
    (port,) = free_ports(1)
    arguments = [str(port) if one == str(fleet.router.port) else one for one in fleet.router.arguments]
    name = f"router-{policy}"
    return dataclasses.replace(
        fleet.router,
        name=name,
        arguments=(*arguments, "--policy", policy),
        port=port,
        log=directory / f"{name}.log",
        process=None,
    )


async def _measure(fleet: Fleet, router: Server, asked: list[Asked], concurrency: int, into: Measured) -> None:
    before, started = await _megabytes(fleet), time.monotonic()
    answers: list[_Answer] = []
    left = iter(asked)

    async def client() -> None:
        for one in left:
            answers.append(await _ask(fleet.http, router.url, one))

    await asyncio.gather(*(client() for _ in range(concurrency)))
    into.rates.append(len(answers) / (time.monotonic() - started))
    into.hits.append(sum(one.cached_tokens for one in answers) / sum(one.prompt_tokens for one in answers))
    work = Counter(dict.fromkeys((server.url for server in fleet.decodes), 0))
    for one in answers:
        work[one.decode] += one.prompt_tokens - one.cached_tokens + one.answer_tokens
    into.skews.append(max(work.values()) * len(work) / work.total())
    into.megabytes.append(await _megabytes(fleet) - before)
    into.loads.append(os.getloadavg()[0])


async def _ask(http: aiohttp.ClientSession, url: str, asked: Asked) -> _Answer:
    body = {"prompt": asked.prompt, "max_tokens": asked.max_tokens, "ignore_eos": True, "temperature": 0.0}
    async with http.post(f"{url}/v1/completions", data=msgspec.json.encode(body), headers=JSON) as response:
        payload = await response.read()
        if response.status != 200:
            raise TransferFailedError(f"{url} answered {response.status}: {payload[:300]!r}")
        usage = msgspec.json.decode(payload)["usage"]
        return _Answer(
            decode=response.headers[_DECODE_HEADER],
            prompt_tokens=usage["prompt_tokens"],
            cached_tokens=(usage["prompt_tokens_details"] or {}).get("cached_tokens", 0),
            answer_tokens=usage["completion_tokens"],
        )


async def _megabytes(fleet: Fleet) -> float:
    """Handed over so far, to all decode servers."""
    total = 0.0
    for server in fleet.decodes:
        total += (await summed(fleet.http, server.url)).get("kvbaton_handoff_bytes_sum", 0.0)
    return total / 1e6

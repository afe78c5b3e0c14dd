"""Honest requests that go on while somebody floods: how long each took, and what was wrong with its answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import aiohttp

from kvbaton.serving.demo.show import DemoAnswer, ask, concurrent_questions
from kvbaton.serving.fleet import Fleet

#: Honest requests at a time.
CONCURRENT = 4
QUESTIONS = concurrent_questions(16)
PATIENCE_SECONDS = 60.0


async def expected_answers(fleet: Fleet) -> list[DemoAnswer]:
    """What the fleet's single process answers."""
    if fleet.reference is None:
        raise ValueError("the fleet has no single process")
    return await asyncio.gather(*(ask(fleet.http, fleet.reference.url, question) for question in QUESTIONS))


@dataclass
class Honest:
    """A few clients that ask one question after the other."""

    fleet: Fleet
    expected: Sequence[DemoAnswer]
    seconds: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    async def ask_until(self, done: asyncio.Event) -> None:
        async def one(number: int) -> None:
            while not done.is_set():
                await self._ask(number % len(QUESTIONS))
                number += CONCURRENT

        await asyncio.gather(*(one(offset) for offset in range(CONCURRENT)))

    async def _ask(self, index: int) -> None:
        started = time.monotonic()
        try:
            asking = ask(self.fleet.http, self.fleet.router.url, QUESTIONS[index])
            answer = await asyncio.wait_for(asking, PATIENCE_SECONDS)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            answer = DemoAnswer(error=repr(error))
        self.seconds.append(time.monotonic() - started)
        if answer.error or answer.tokens != self.expected[index].tokens:
            self.wrong.append((answer.error or "other tokens than the single process's")[:200])


def p99(seconds: Sequence[float]) -> float:
    """The 99th percentile; 0 of nothing."""
    ordered = sorted(seconds)
    return ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))] if ordered else 0.0

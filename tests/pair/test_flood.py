"""Floods against a running pair while honest requests go on: all are answered right, memory stays bounded.

A little of each here, all at once; ``make flood`` sends all, and judges p99 during against p99 before.
"""

from __future__ import annotations

import asyncio

from kvbaton.serving.fleet import Fleet
from lab.flood.attacks import SMALL, attacks_on
from lab.flood.campaign import Result, run


def test_floods_keep_nobody_from_an_answer(fleet: Fleet, runner: asyncio.Runner) -> None:
    async def scenario() -> list[Result]:
        attacks = await attacks_on(fleet, SMALL, template=False)
        return await run(fleet, [attacks], SMALL, lambda _name: None, lambda _result: None, judge_p99=False)

    results = runner.run(scenario())
    assert not [(result.name, result.complaints, result.got) for result in results if not result.ok]

"""Where the processes of a deployment listen: on loopback only, unless somebody asked for more.

Those of groups and replicas: ``tests/processes/test_group.py``.
"""

from __future__ import annotations

import asyncio

import psutil
from listening import beyond_loopback, listeners

from kvbaton.serving.demo.show import ask, concurrent_questions
from kvbaton.serving.fleet import Fleet


def test_no_process_of_a_loopback_pair_listens_beyond_loopback(fleet: Fleet, runner: asyncio.Runner) -> None:
    """Nor does a server that runs both halves itself."""

    async def scenario() -> str:
        for question in concurrent_questions(2):
            answer = await ask(fleet.http, fleet.router.url, question)
            assert not answer.error, answer
            assert answer.bytes > 0, "it was not handed over"
        return str((await fleet.info(fleet.prefills[0]))["handoff"]["evidence"])

    ways = runner.run(scenario())
    assert "memory" in ways or "cma" in ways or "sysv" in ways, f"on one machine bytes go through memory: {ways}"
    for server in fleet.servers:
        assert server.process is not None
        first = psutil.Process(server.process.pid)
        assert listeners(first.pid), server.name
        assert not beyond_loopback([first.pid, *(child.pid for child in first.children(recursive=True))]), server.name

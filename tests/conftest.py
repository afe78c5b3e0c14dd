"""Fixtures that several suites share: ranks in this process, over memory or over real NIXL; a running pair."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import MakeRank, RankHarness

from kvbaton.control.memory import Network
from kvbaton.protocol.settings import Settings
from kvbaton.serving.fleet import Fleet


@pytest.fixture(scope="session")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="session")
def fleet(runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Real processes, real NIXL, real HTTP. Small chunks: a long prompt is many of them, so that there is a middle to
    be killed in."""
    directory: Path = tmp_path_factory.mktemp("fleet")
    fleet = Fleet(directory, model="recall", reference=True, extra=("--chunked-prefill-size", "32"))
    runner.run(fleet.__aenter__())
    try:
        runner.run(fleet.all_ready())
        yield fleet
    finally:
        runner.run(fleet.__aexit__(None, None, None))


@pytest.fixture(params=["memory", "nixl"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_rank(transport: str) -> Iterator[MakeRank]:
    network = Network()
    made: list[RankHarness] = []

    def make(name: str, *, fill: int | None = None, settings: Settings | None = None) -> RankHarness:
        rank = RankHarness(name, network, transport, settings, fill)
        made.append(rank)
        return rank

    yield make
    for rank in made:
        rank.manager.close()

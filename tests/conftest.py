"""Fixtures that several suites share: ranks in this process, over memory or over real NIXL."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ranks import MakeRank, RankHarness

from kvbaton.control.memory import Network
from kvbaton.protocol.settings import Settings


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

"""Fixtures that several suites share: ranks in this process, over memory or over real NIXL; and who runs what when.

With several workers a file is one worker's, so that what it sets up is set up once; so is all of ``tests/pair``, for
there is one pair, and of ``tests/engines``, whose models are made and loaded once. What takes longest begins first, so
that nobody waits at the end.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from ranks import MakeRank, RankHarness

from kvbaton.control.memory import Network
from kvbaton.protocol.settings import Settings

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).parent
FIRST = ("pair", "processes")
WHOLE = ("pair", "engines")
#: How fast a machine draws examples says nothing of what is tested with them.
settings.register_profile("kvbaton", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kvbaton")


def directory(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: directory(item.path) not in FIRST)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    from xdist.scheduler import LoadScopeScheduling

    class ByWhatTheyShare(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            """What is one worker's: tests with the same answer."""
            file = nodeid.partition("::")[0]
            part = directory(config.rootpath / file)
            return part if part in WHOLE else nodeid if part == "processes" else file

    config.option.loadscopereorder = False
    return ByWhatTheyShare(config, log)


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A command that runs in this process sets up the log of a process, on the standard error of its test."""
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)
    for handler in list(root.handlers):
        if type(handler) is logging.StreamHandler:
            root.removeHandler(handler)


@pytest.fixture(scope="session")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


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

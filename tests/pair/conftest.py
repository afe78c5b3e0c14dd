"""The one pair of a test run: real processes, real NIXL, real HTTP, and the single process that it must equal."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvbaton.serving.fleet import Fleet


@pytest.fixture(scope="session")
def fleet(runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Small chunks: a long prompt is many of them, so that there is a middle to be killed in."""
    directory: Path = tmp_path_factory.mktemp("fleet")
    fleet = Fleet(directory, model="recall", reference=True, extra=("--chunked-prefill-size", "32"))
    runner.run(fleet.__aenter__())
    try:
        runner.run(fleet.all_ready())
        yield fleet
    finally:
        runner.run(fleet.__aexit__(None, None, None))

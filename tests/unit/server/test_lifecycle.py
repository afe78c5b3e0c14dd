"""Signals, draining and the order of a server's end."""

import asyncio
import os
import signal
import subprocess
import sys

import aiohttp
import pytest
from aiohttp import web

from kvbaton.discovery import listening
from kvbaton.errors import ConfigError, OverloadedError
from kvbaton.serving.server import lifecycle
from kvbaton.serving.server.admission import AdmissionLimit
from kvbaton.serving.server.failure import DrainingError, errors
from kvbaton.serving.testing.http import run


class Served:
    """A server whose one route waits until it is told to go on."""

    def __init__(self, grace_period_secs: float) -> None:
        self.admission = AdmissionLimit(10)
        self.in_flight = asyncio.Event()
        self.go_on = asyncio.Event()
        self.cancelled = asyncio.Event()
        self._port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        app = web.Application(middlewares=[web.middleware(errors)])
        app.router.add_get("/work", self._work)
        app.router.add_get("/health", self._health)
        bound = lifecycle.reserve("127.0.0.1", 0)
        self.task = asyncio.create_task(
            lifecycle.run(
                app, self.admission, bound, grace_period_secs=grace_period_secs, listening=self._port.set_result
            )
        )

    async def url(self) -> str:
        return f"http://127.0.0.1:{await self._port}"

    async def _work(self, _request: web.Request) -> web.Response:
        with self.admission.entered():
            self.in_flight.set()
            try:
                await self.go_on.wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
            return web.Response(text="done")

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response(text="alive")


async def get(session: aiohttp.ClientSession, url: str) -> tuple[int, str]:
    async with session.get(url) as response:
        return response.status, await response.text()


def test_what_a_server_has_loaded_is_not_collected_again():
    """In a process of its own: what is frozen stays so."""
    program = (
        "import gc, kvbaton.serving.router.router\n"
        "from kvbaton.serving.server.lifecycle import keep_what_is_loaded\n"
        "before = len(gc.get_objects())\n"
        "keep_what_is_loaded()\n"
        "print(before, len(gc.get_objects()))"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    before, after = map(int, said.split())
    assert after < 1_000 < before


@pytest.mark.parametrize("number", lifecycle.SIGNALS)
def test_a_signal_lets_running_requests_finish_and_refuses_new_ones(number):
    async def test() -> None:
        served = Served(grace_period_secs=10)
        url = await served.url()
        async with aiohttp.ClientSession() as session:
            working = asyncio.create_task(get(session, f"{url}/work"))
            await served.in_flight.wait()
            os.kill(os.getpid(), number)
            while not served.admission.is_shut:
                await asyncio.sleep(0)
            assert (await get(session, f"{url}/work"))[0] == 503
            assert await get(session, f"{url}/health") == (200, "alive")
            served.go_on.set()
            assert await working == (200, "done")
            await served.task

    run(test())


@pytest.mark.parametrize("signals", [1, 2])
def test_what_outlives_the_grace_period_or_a_second_signal_is_cancelled(signals, monkeypatch):
    monkeypatch.setattr(listening, "CLEANUP_SECONDS", 0.05)

    async def test() -> None:
        served = Served(grace_period_secs=0.05 if signals == 1 else 1000)
        url = await served.url()
        async with aiohttp.ClientSession() as session:
            working = asyncio.create_task(get(session, f"{url}/work"))
            await served.in_flight.wait()
            for _ in range(signals):
                os.kill(os.getpid(), signal.SIGTERM)
                while not served.admission.is_shut:
                    await asyncio.sleep(0)
            await served.task
            assert served.cancelled.is_set()
            with pytest.raises(aiohttp.ClientError):
                await working

    run(test())


def test_a_gate_counts_and_refuses():
    async def test() -> None:
        admission = AdmissionLimit(2)
        with admission.entered(), admission.entered():
            assert admission.in_flight == 2
            with pytest.raises(OverloadedError), admission.entered():
                pass
            assert not await admission.emptied(0)
        assert admission.in_flight == 0
        assert await admission.emptied(1)
        admission.shut()
        with pytest.raises(DrainingError), admission.entered():
            pass

    run(test())


def test_an_address_that_cannot_be():
    with pytest.raises(ConfigError, match="cannot listen at 203\\.0\\.113\\.1:0"):
        lifecycle.reserve("203.0.113.1", 0)

"""What anybody may ask for, or ask for beside a request: it costs little however often it is asked, and keeps nobody
else waiting."""

from __future__ import annotations

import asyncio
import functools
import gzip
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import msgspec
import pytest
from aiohttp import web

from kvbaton.discovery import listening
from kvbaton.discovery.access import ROUTER_HEADER, token_of
from kvbaton.discovery.connections import Connections
from kvbaton.discovery.names import audience_of_url
from kvbaton.discovery.registry import Registration, Registry, Route, lock_of
from kvbaton.discovery.server import registry_app, start_registry
from kvbaton.serving.router.router import Router, RouterConfig
from kvbaton.serving.router.worker import Worker
from kvbaton.serving.server.api import ApiServer
from kvbaton.serving.server.lifecycle import port_of, reserve
from kvbaton.serving.server.request_parsing import ApiConfig, Mode
from kvbaton.serving.testing.engine import CharacterTokenizer, ScriptedEngine, spell
from kvbaton.serving.testing.http import run, serving

SECRET = "kX7-a-secret-that-must-stay-one-Q2w"
MANY = 50


def server(mode: Mode = "null", *, requests: int = 8, **arguments: object) -> ApiServer:
    config = ApiConfig(model="m", max_positions=64, mode=mode, max_requests=requests)
    return ApiServer(ScriptedEngine(lambda _request: spell("hi")), CharacterTokenizer(), config, **arguments)  # type: ignore[arg-type]


@asynccontextmanager
async def routing(worker: web.Application, *, requests: int = 1) -> AsyncIterator[tuple[Router, str]]:
    """A router whose two workers are one application."""
    async with serving(worker) as url:
        workers = (Worker("prefill", url, 8998), Worker("decode", url))
        router = Router(
            RouterConfig(workers=workers, max_concurrent_requests=requests, health_check_interval_secs=60.0)
        )
        async with serving(router.app) as front:
            await router.workers.probe_all()
            yield router, front


class Slow:
    """A worker that answers when it is told to."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.arrived, self.go_on = asyncio.Event(), asyncio.Event()
        self.app = web.Application()
        self.app.router.add_get("/ready", self._ready)
        self.app.router.add_route("*", "/{tail:.*}", self._answer)

    async def _ready(self, _http: web.Request) -> web.Response:
        return web.json_response({"ready": True})

    async def _answer(self, http: web.Request) -> web.Response:
        self.asked.append(http.path)
        self.arrived.set()
        await self.go_on.wait()
        return web.json_response({"data": []})


async def statuses(session: aiohttp.ClientSession, url: str, count: int, **body: object) -> list[int]:
    async def one() -> int:
        async with session.request("POST" if body else "GET", url, json=body or None) as response:
            await response.read()
            return response.status

    return await asyncio.gather(*(one() for _ in range(count)))


@pytest.mark.parametrize("mode", ["prefill", "decode"])
@pytest.mark.parametrize(("path", "body"), [("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [65]})])
def test_half_a_pair_tokenizes_for_its_router_only(mode: Mode, path: str, body: dict[str, object]) -> None:
    async def test() -> None:
        async with serving(server(mode, secret=SECRET).app) as url, aiohttp.ClientSession() as session:
            for headers, status in (
                ({}, 401),
                ({"Authorization": f"Bearer {SECRET}"}, 401),
                ({ROUTER_HEADER: token_of(SECRET, "story", audience_of_url(url))}, 401),
                ({ROUTER_HEADER: SECRET}, 200),
            ):
                async with session.post(url + path, json=body, headers=headers) as response:
                    assert response.status == status, headers

    run(test())


def test_tokenizing_is_within_the_bound_of_requests() -> None:
    async def test() -> None:
        async with serving(server(requests=0).app) as url, aiohttp.ClientSession() as session:
            assert await statuses(session, f"{url}/tokenize", 1, prompt="x") == [429]
            assert await statuses(session, f"{url}/detokenize", 1, tokens=[65]) == [429]

    run(test())


def test_a_flood_of_slow_tokenizing_keeps_no_probe_waiting() -> None:
    async def test() -> None:
        slow = Slow()
        async with routing(slow.app) as (router, url), aiohttp.ClientSession() as session:
            flood = asyncio.create_task(statuses(session, f"{url}/tokenize", MANY, prompt="x"))
            await slow.arrived.wait()
            await router.workers.probe_all()
            assert all(worker.usable for worker in router.workers.all)
            slow.go_on.set()
            assert sorted(await flood) == [200, *[429] * (MANY - 1)]
            assert slow.asked == ["/tokenize"]

    run(test())


@pytest.mark.parametrize(
    ("path", "asked"), [("/get_server_info", 2), ("/v1/models", 1), ("/v1/models/m", 1), ("/model_info", 1)]
)
def test_the_router_asks_its_workers_once_for_all_who_ask_meanwhile(path: str, asked: int) -> None:
    """It has two, which are one application here."""

    async def test() -> None:
        slow = Slow()
        async with routing(slow.app) as (_, url), aiohttp.ClientSession() as session:
            flood = asyncio.create_task(statuses(session, url + path, MANY))
            async with asyncio.timeout(10):
                while len(slow.asked) < asked:
                    await asyncio.sleep(0)
            async with session.get(f"{url}/health") as response:  # it has taken them all in by now
                assert response.status == 200
            slow.go_on.set()
            await flood
            assert len(slow.asked) < MANY / 2

    run(test())


@pytest.mark.parametrize("path", ["/get_server_info", "/metrics"])
def test_a_server_looks_at_its_engine_once_for_all_who_ask_meanwhile(path: str) -> None:
    async def test() -> None:
        looked, go_on = [], threading.Event()

        def look() -> dict[str, object]:
            looked.append(path)
            assert go_on.wait(10)
            return {}

        api = server(info=look)
        api.metrics.counters("looks", "Looks.", "kind", lambda: dict.fromkeys(look(), 0.0))
        async with serving(api.app) as url, aiohttp.ClientSession() as session:
            flood = asyncio.create_task(statuses(session, url + path, MANY))
            async with asyncio.timeout(10):
                while not looked:
                    await asyncio.sleep(0)
                async with session.get(f"{url}/health") as response:
                    assert response.status == 200
            go_on.set()
            assert set(await flood) == {200}
            assert len(looked) < MANY / 2

    run(test())


def test_a_librarys_registry_is_served_like_every_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """It decompresses nothing, and closes connections that never bring a request."""
    monkeypatch.setattr(listening, "Connections", functools.partial(Connections, head_seconds=0.0))
    route = Route(instance="i", group="g", address="tcp://127.0.0.1:9", layout_digest="", http_port=1)
    body = gzip.compress(msgspec.json.encode(Registration(route=route, lock=lock_of("key"))))

    async def test() -> None:
        registry = Registry()
        with reserve("127.0.0.1", 0) as bound:
            port = port_of(bound)
        runner = await start_registry(registry_app(registry), host="127.0.0.1", port=port)
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
            async with (
                aiohttp.ClientSession() as session,
                session.put(f"http://127.0.0.1:{port}/route", data=body, headers=headers) as response,
            ):
                assert response.status == 400
                assert response.headers["Server"] == "kvbaton"
            assert len(registry) == 0
            assert await reader.read() == b"", "it is closed"
            writer.close()
        finally:
            await runner.cleanup()

    run(test())

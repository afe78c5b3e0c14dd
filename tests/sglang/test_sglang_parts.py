"""The parts of the transfer backend that need no rank: the plug-in, the options, the bootstrap server's client."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from enum import Enum
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry

from kvbaton.discovery.names import ServerNames
from kvbaton.discovery.server import middlewares
from kvbaton.engines.sglang import bootstrap, plugin, versions
from kvbaton.engines.sglang.metrics import NAME, HandoffEvents
from kvbaton.engines.sglang.options import Options
from kvbaton.errors import AuthenticationError, ConfigError, RegistryError

SECRET = "0123456789abcdef" * 4


class Backends(Enum):
    NIXL = "nixl"


def test_a_backend_is_found_by_its_value() -> None:
    member = plugin.add_member(Backends, "KVBATON", "kvbaton")
    assert plugin.add_member(Backends, "KVBATON", "kvbaton") is member
    assert Backends("kvbaton") is member
    assert Backends["KVBATON"] is member
    assert list(Backends) == [Backends.NIXL, member]
    assert member.name == "KVBATON"
    assert member != Backends.NIXL


def test_whoever_asks_for_it_hears_why_it_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions.metadata, "version", lambda _: "0.6.0")
    monkeypatch.setattr(plugin.sys, "argv", ["launch", plugin.FLAG, "nixl"])
    plugin.load()
    for asked in (["launch", plugin.FLAG, "kvbaton"], ["launch", f"{plugin.FLAG}=kvbaton"]):
        monkeypatch.setattr(plugin.sys, "argv", asked)
        with pytest.raises(SystemExit, match=r"written for SGLang 0\.5\.23, found 0\.6\.0"):
            plugin.load()


def test_pages_that_are_kept_aside_have_no_timer() -> None:
    queue = SimpleNamespace(deferred_kv_release_timeout=30.0)
    plugin.no_timer(queue, SimpleNamespace(kv_receiver=SimpleNamespace(kv_mgr=object())))
    assert queue.deferred_kv_release_timeout == 30.0
    plugin.no_timer(queue, SimpleNamespace(kv_receiver=SimpleNamespace(kv_mgr=SimpleNamespace(proves_release=True))))
    assert queue.deferred_kv_release_timeout == math.inf


def test_options() -> None:
    given = {"host": "10.0.0.5", "port": 14000, "weights": "r1", "heartbeat_interval": 2.0}
    options = Options.from_environment({"KVBATON_SGLANG": json.dumps(given)})
    assert (options.host, options.port, options.weights) == ("10.0.0.5", 14000, "r1")
    assert options.settings == {"heartbeat_interval": 2.0}
    assert Options.from_environment({}) == Options()
    for wrong in ("[]", "{", '{"hots": 1}', '{"port": "1"}', '{"port": 70000}', '{"rooms": -1}'):
        with pytest.raises(ConfigError, match="KVBATON_SGLANG"):
            Options.from_environment({"KVBATON_SGLANG": wrong})


@pytest.fixture
def server() -> Iterator[Any]:
    class Handler(BaseHTTPRequestHandler):
        asked: list[str] = []  # noqa: RUF012 - one server for each test
        answers: dict[str, Any] = {}  # noqa: RUF012

        def do_GET(self) -> None:
            self.asked.append(self.path)
            answer = next((a for part, a in self.answers.items() if part in self.path), None)
            self.send_response(200 if answer is not None else 404)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    http = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=http.serve_forever, daemon=True).start()
    yield SimpleNamespace(place=f"127.0.0.1:{http.server_port}", handler=Handler)
    http.shutdown()
    http.server_close()


def test_a_group_is_asked_once_and_forgotten_with_its_ranks(server: Any) -> None:
    server.handler.answers = {
        f"target_tp_rank={tp}&target_pp_rank={pp}": {"rank_ip": "127.0.0.1", "rank_port": 5000 + tp + 2 * pp}
        for tp in range(2)
        for pp in range(2)
    }
    groups = bootstrap.Groups(bootstrap.Client().ask)
    found = groups.sources(server.place, 1, tp_size=2, pp_size=2)
    assert found == tuple(f"tcp://127.0.0.1:{port}" for port in range(5000, 5004))
    assert groups.sources(server.place, 1, tp_size=2, pp_size=2) == found
    assert len(server.handler.asked) == 4
    assert all("prefill_dp_rank=1&" in path for path in server.handler.asked)
    assert groups.forget("tcp://127.0.0.1:9") == []
    assert groups.forget(found[2]) == [server.place]
    groups.sources(server.place, 1, tp_size=2, pp_size=2)
    assert len(server.handler.asked) == 8


@pytest.fixture
def guarded() -> Iterator[str]:
    """A bootstrap server as SGLang's, behind the doors of a secret."""
    app = web.Application()

    async def answer(request: web.Request) -> web.Response:
        return web.json_response({"got": (await request.read()).decode()})

    app.router.add_route("*", "/route", answer)
    app.middlewares.extend(middlewares(SECRET, ServerNames.of("127.0.0.1")))
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(app)
    loop.run_until_complete(runner.setup())
    site = web.TCPSite(runner, "127.0.0.1", 0)
    loop.run_until_complete(site.start())
    assert site._server is not None
    port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
    thread = Thread(target=loop.run_forever)
    thread.start()
    yield f"127.0.0.1:{port}"
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_with_a_secret_both_ends_prove_that_they_know_it(guarded: str, server: Any) -> None:
    url = f"http://{guarded}/route?prefill_dp_rank=0"
    client = bootstrap.Client(SECRET)
    assert client.ask(url) == {"got": ""}
    assert client.ask(url, body={"rank_port": 9}, method="PUT") == {"got": '{"rank_port": 9}'}
    for stranger in (bootstrap.Client(), bootstrap.Client(SECRET[::-1])):
        with pytest.raises(RegistryError, match="401"):
            stranger.ask(url)
        with pytest.raises(RegistryError, match="401"):
            stranger.ask(url, body={}, method="PUT")
    server.handler.answers = {"route": {"rank_ip": "127.0.0.1", "rank_port": 9}}
    with pytest.raises(AuthenticationError, match="does not know"):
        client.ask(f"http://{server.place}/route")


def test_what_does_not_answer_or_answers_nonsense_is_named(server: Any) -> None:
    groups = bootstrap.Groups(bootstrap.Client().ask)
    with pytest.raises(RegistryError, match="404"):
        groups.sources(server.place, 0, tp_size=1, pp_size=1)
    server.handler.answers = {"route": {"rank_ip": "somewhere", "rank_port": "x"}}
    with pytest.raises(RegistryError, match="does not say where"):
        groups.sources(server.place, 0, tp_size=1, pp_size=1)
    server.handler.answers = {"route": "hello"}
    with pytest.raises(RegistryError, match="how many"):
        groups.sizes(server.place)
    with pytest.raises(RegistryError, match="does not answer"):
        groups.sizes("127.0.0.1:9")


def test_what_the_hand_off_counts_is_written_once() -> None:
    registry = CollectorRegistry()
    events = HandoffEvents(registry)
    events.write({"writes_posted": 3, "writes_staged": 0})
    events.write({"writes_posted": 3})
    events.write({"writes_posted": 5, "writes_staged": 2})
    found = {
        event: registry.get_sample_value(f"{NAME}_total", {"event": event})
        for event in ("writes_posted", "writes_staged")
    }
    assert found == {"writes_posted": 5.0, "writes_staged": 2.0}

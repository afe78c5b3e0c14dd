"""The HTTP doors: who may name rooms and registries, bodies within bounds, connections that say nothing, no secrets."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import itertools
import re
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import msgspec
import pytest
from aiohttp import web

from kvbaton.discovery.access import ROUTER_HEADER, token_of
from kvbaton.discovery.client import RegistryClient
from kvbaton.discovery.connections import Connections, affordable
from kvbaton.discovery.names import audience_of_url
from kvbaton.discovery.registry import Registry, Route
from kvbaton.discovery.server import registry_app
from kvbaton.errors import ConfigError
from kvbaton.serving.router.router import Router, RouterConfig
from kvbaton.serving.router.worker import Worker
from kvbaton.serving.server.allow import AllowList
from kvbaton.serving.server.api import ApiServer
from kvbaton.serving.server.bodies import REST, Bodies
from kvbaton.serving.server.launch import ServeConfig, serve
from kvbaton.serving.server.openapi import document
from kvbaton.serving.server.request_parsing import MAX_CHARACTERS_PER_TOKEN, ApiConfig, Mode
from kvbaton.serving.testing.engine import CharacterTokenizer, ScriptedEngine, spell
from kvbaton.serving.testing.http import run, serving

SECRET = "a secret of enough characters"
ROUTE = Route(instance="i1", group="g", address="tcp://127.0.0.1:41000", layout_digest="d", http_port=30000)


def port_in(url: str) -> int:
    return int(url.rpartition(":")[2])


@asynccontextmanager
async def half(mode: Mode = "decode", *, secret: str | None = SECRET, allow: tuple[str, ...] = ()) -> AsyncIterator:
    """A server of one mode, the URL it answers at, and a session to ask it with."""
    engine = ScriptedEngine(lambda _request: spell("hi"))
    async with RegistryClient(secret=secret, attempts=1, timeout_seconds=2.0) as client:
        server = ApiServer(
            engine,
            CharacterTokenizer(),
            ApiConfig(model="m", max_positions=64, mode=mode, bootstrap_allow=AllowList.parse(allow)),
            registry=client if mode == "decode" else None,
            secret=secret,
        )
        async with serving(server.app) as url, aiohttp.ClientSession() as session:
            yield engine, url, session


async def ask(
    session: aiohttp.ClientSession, url: str, headers: dict | None = None, **fields: object
) -> tuple[int, str]:
    async with session.post(f"{url}/v1/completions", json={"prompt": "x", **fields}, headers=headers) as response:
        return response.status, await response.text()


# ---- who may name rooms


def test_with_a_secret_only_the_router_names_rooms():
    async def test() -> None:
        async with serving(registry_app(Registry(), secret=SECRET)) as registry:
            async with RegistryClient(secret=SECRET) as client:
                await client.register("127.0.0.1", port_in(registry), ROUTE)
            room = {"bootstrap_room": 7, "bootstrap_host": "127.0.0.1", "bootstrap_port": port_in(registry)}
            async with half() as (engine, url, session):
                for headers in (
                    None,
                    {ROUTER_HEADER: "wrong"},
                    {ROUTER_HEADER: token_of(SECRET, "look-up", "127.0.0.1:8998")},
                    {"Authorization": f"Bearer {SECRET}"},
                ):
                    status, text = await ask(session, url, headers, **room)
                    assert (status, "only this deployment's router" in text) == (401, True), headers
                    assert SECRET not in text
                assert not engine.requests
                for token in (token_of(SECRET, "router", audience_of_url(url)), SECRET):
                    status, _ = await ask(session, url, {ROUTER_HEADER: token}, **room)
                    assert status == 200
                assert engine.requests[0].sources == (ROUTE.address,)

    run(test())


def test_a_prefill_server_is_as_strict_and_aborts_too():
    async def test() -> None:
        async with half("prefill") as (engine, url, session):
            assert (await ask(session, url, bootstrap_room=7))[0] == 401
            async with session.post(f"{url}/abort_request", json={"rid": "r"}) as response:
                assert response.status == 401
            headers = {ROUTER_HEADER: token_of(SECRET, "router", audience_of_url(url))}
            assert (await ask(session, url, headers, bootstrap_room=7))[0] == 200
            engine.script = lambda _request: []
            asking = asyncio.create_task(ask(session, url, headers, bootstrap_room=8, rid="r"))
            await engine.until(lambda: bool(engine.live))
            async with session.post(f"{url}/abort_request", json={"rid": "r"}, headers=headers) as response:
                assert response.status == 200
            assert engine.aborted == [engine.requests[1].request_id]
            assert (await asking)[0] == 499

    run(test())


def test_the_router_shows_its_token_to_workers_and_nothing_of_the_client():
    async def test() -> None:
        seen = []

        async def worker(http: web.Request) -> web.Response:
            seen.append(http.headers)
            return web.json_response({"choices": []})

        async def ready(_http: web.Request) -> web.Response:
            return web.json_response({})

        app = web.Application()
        app.router.add_post("/v1/completions", worker)
        app.router.add_get("/ready", ready)
        async with serving(app) as one, serving_router(one, SECRET) as (url, session):
            forged = {
                ROUTER_HEADER: "forged",
                "X-Request-Id": "10.0.0.1:1",
                "Cookie": "c=1",
                "Authorization": "Bearer k",
                "X-Anything": "1",
            }
            assert (await ask(session, url, forged, bootstrap_host="10.0.0.1", kv_transfer_params={}))[0] == 200
        assert len(seen) == 2
        for headers in seen:
            assert headers[ROUTER_HEADER] == token_of(SECRET, "router", audience_of_url(one))
            assert headers["X-Request-Id"] == "10.0.0.1:1"  # a name in logs, and nothing follows from it
            assert not [name for name in ("Cookie", "X-Anything", "Authorization") if name in headers]
            assert SECRET not in str(headers)

    run(test())


@asynccontextmanager
async def serving_router(worker: str, secret: str | None) -> AsyncIterator[tuple[str, aiohttp.ClientSession]]:
    config = RouterConfig(
        workers=(Worker("prefill", worker, 8998), Worker("decode", worker)),
        health_check_interval_secs=60.0,
        secret=secret,
    )
    assert secret is None or secret not in repr(config)
    router = Router(config)
    async with serving(router.app) as url, aiohttp.ClientSession() as session:
        await router.workers.probe_all()
        yield url, session


def test_a_worker_with_another_secret_is_the_deployments_fault_not_the_clients():
    async def test() -> None:
        async with half() as (engine, worker, _), serving_router(worker, None) as (url, session):
            status, text = await ask(session, url)
            assert status == 503, text
            assert "does not take this router's secret; give both the same --secret-file" in text
            assert not engine.requests

    run(test())


def test_a_registry_that_does_not_know_us_is_unavailable():
    async def test() -> None:
        async with (
            serving(registry_app(Registry(), secret="another secret, just as long")) as registry,
            half() as (_, url, session),
        ):
            room = {"bootstrap_room": 7, "bootstrap_host": "127.0.0.1", "bootstrap_port": port_in(registry)}
            status, text = await ask(session, url, {ROUTER_HEADER: SECRET}, **room)
            assert (status, "does not let us in" in text) == (503, True)
            assert token_of(SECRET, "look-up", "127.0.0.1:8998") not in text

    run(test())


def test_half_a_pair_needs_a_secret_beyond_loopback():
    for mode in ("prefill", "decode"):
        config = ServeConfig(model="none", mode=mode, host="0.0.0.0", bootstrap_host="127.0.0.1", port=0)
        with pytest.raises(ConfigError, match=rf"a {mode} server would listen at 0\.0\.0\.0"):
            serve(config)


# ---- SSRF

HOSTS = [
    "2130706433",  # 127.0.0.1 in decimal
    "0x7f000001",
    "0177.0.0.1",
    "127.1",
    "0.0.0.0",
    "0",
    "::",
    "[::]",
    "::ffff:10.0.0.1",
    "[::ffff:169.254.169.254]",
    "fe80::1%eth0",
    "169.254.169.254",
    "metadata.google.internal",
    "localhost.evil.example",
    "127.0.0.1.nip.io",
    "127.0.0.1@evil.example",
    "evil.example#127.0.0.1",
    "127.0.0.1/../evil",
    "127.0.0.1:80@evil.example",
    "[[::1]]",
    "]127.0.0.1[",
    "localhost.",
    "LOCALHOST\n",
    " 127.0.0.1",
    "１２７.0.0.1",  # noqa: RUF001 - full-width digits are the attempt
    "ⓛocalhost",
    "evil.example\r\nHost: x",
]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("allow", [(), ("10.9.8.7:8998", "[fd00::1]")])
def test_a_request_leads_decode_nowhere_but_to_the_allow_list(host: str, allow: tuple[str, ...]):
    with pytest.raises(ConfigError, match="allow-list"):
        AllowList.parse(allow).check(host, 8998)


def test_the_allow_list_holds_over_http_and_nothing_is_asked():
    async def test() -> None:
        asked: list[str] = []

        async def listener(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            asked.append((await reader.read(100)).decode())
            writer.close()

        server = await asyncio.start_server(listener, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, half(secret=None, allow=("10.9.8.7",)) as (engine, url, session):
            for host in [*HOSTS, "127.0.0.1", "localhost", "::1"]:
                status, text = await ask(session, url, bootstrap_room=7, bootstrap_host=host, bootstrap_port=port)
                assert (status, "allow-list" in text) == (400, True), (host, text)
        assert not asked
        assert not engine.requests

    run(test())


def test_a_redirecting_registry_leads_nowhere():
    async def test() -> None:
        asked: list[str] = []

        async def inner(http: web.Request) -> web.Response:
            asked.append(http.path)
            return web.json_response({})

        target = web.Application()
        target.router.add_route("*", "/{tail:.*}", inner)
        async with serving(target) as victim:

            async def away(_http: web.Request) -> web.Response:
                raise web.HTTPTemporaryRedirect(f"{victim}/secret")

            app = web.Application()
            app.router.add_get("/route", away)
            async with serving(app) as registry, half(secret=None) as (_, url, session):
                room = {"bootstrap_room": 7, "bootstrap_host": "127.0.0.1", "bootstrap_port": port_in(registry)}
                status, text = await ask(session, url, **room)
                assert (status, "HTTP 307" in text) == (503, True), text
        assert not asked

    run(test())


@pytest.mark.parametrize("address", ["tcp://10.0.0.1:1", "tcp://evil.example:1", "http://x", "tcp://0.0.0.0:1"])
def test_an_address_from_a_poisoned_registry_is_dialled_only_on_loopback_or_with_the_secret(address: str):
    from kvbaton.control.zmq import ZmqLinks

    with ZmqLinks() as links, pytest.raises(ConfigError):
        links.dial(address)


# ---- bodies


@asynccontextmanager
async def reading(bodies: Bodies) -> AsyncIterator[tuple[str, aiohttp.ClientSession, asyncio.Event]]:
    release = asyncio.Event()

    async def read(http: web.Request) -> web.Response:
        async with bodies.read(http) as body:
            if http.query:
                await release.wait()
            return web.Response(text=str(len(body)))

    from kvbaton.serving.server.failure import errors

    app = web.Application(middlewares=[web.middleware(errors)])
    app.router.add_post("/", read)
    async with serving(app) as url, aiohttp.ClientSession() as session:
        yield url, session, release


def test_a_body_is_refused_by_its_length_before_it_is_sent():
    async def test() -> None:
        async with reading(Bodies(most_bytes=100)) as (url, _, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", port_in(url))
            writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 104857600\r\n\r\n")
            assert b" 413 " in await reader.readline()
            writer.close()

    run(test())


def test_a_body_without_a_length_is_refused_where_it_passes_the_bound():
    async def test() -> None:
        bodies = Bodies(most_bytes=100)

        async def endless() -> AsyncIterator[bytes]:
            for _ in range(100_000):
                yield b"x" * 1000

        async with reading(bodies) as (url, session, _):
            with contextlib.suppress(aiohttp.ClientError):
                async with session.post(url, data=endless()) as response:
                    assert response.status == 413
            assert bodies.held_bytes == 0

    run(test())


def test_a_compressed_body_is_not_taken():
    async def test() -> None:
        async with reading(Bodies()) as (url, session, _):
            bomb = gzip.compress(bytes(1 << 20))
            for encoding in ("gzip", "deflate", "br"):
                headers = {"Content-Encoding": encoding}
                async with session.post(url, data=bomb, headers=headers, compress=False) as response:
                    assert response.status == 415

    run(test())


def test_large_bodies_share_a_budget_and_small_ones_need_none():
    async def test() -> None:
        bodies = Bodies(most_bytes=1000, all_bytes=1500, small_bytes=100)
        async with reading(bodies) as (url, session, release):
            first = asyncio.create_task(session.post(f"{url}?hold=1", data=b"x" * 1000))
            while bodies.held_bytes < 1000:
                await asyncio.sleep(0)
            async with session.post(url, data=b"x" * 900) as response:
                assert response.status == 429
                assert "Retry-After" in response.headers
            async with session.post(url, data=b"x" * 100) as response:
                assert response.status == 200
            release.set()
            (await first).close()
            while bodies.held_bytes:
                await asyncio.sleep(0)
            async with session.post(url, data=b"x" * 900) as response:
                assert response.status == 200

    run(test())


def test_large_bodies_come_one_after_the_other_and_small_ones_between():
    async def test() -> None:
        bodies = Bodies(small_bytes=100, each_second=600)
        async with reading(bodies) as (url, session, _):
            async with session.post(url, data=b"x" * 900) as response:
                assert response.status == 200
            gone, next_one = (asyncio.create_task(session.post(url, data=b"x" * size)) for size in (100_000, 150))
            while bodies.held_bytes < 100_150:
                await asyncio.sleep(0)
            async with session.post(url, data=b"x" * 100) as response:
                assert response.status == 200
            assert not gone.done()
            assert not next_one.done()
            gone.cancel()  # who goes away takes no turn
            async with asyncio.timeout(15), await next_one as response:
                assert response.status == 200
            assert not bodies.held_bytes

    run(test())


def test_after_a_large_body_others_have_the_loop_for_longer_than_it_took():
    busy, handed_out = 0.05, []

    async def look(bodies: Bodies) -> None:
        await bodies._turn(1)
        handed_out.append(time.monotonic())
        while time.monotonic() < handed_out[-1] + busy:
            pass  # what is made of it, at once

    async def test() -> None:
        bodies = Bodies()
        await asyncio.gather(*(look(bodies) for _ in range(3)))
        assert all(later - before >= (1 + REST) * busy for before, later in itertools.pairwise(handed_out))

    run(test())


def test_a_body_that_never_ends_is_given_up():
    async def test() -> None:
        async with reading(Bodies(seconds=0.05)) as (url, _, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", port_in(url))
            writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc")
            assert b" 408 " in await reader.readline()
            writer.close()

    run(test())


def test_a_prompt_that_cannot_fit_is_not_tokenized():
    async def test() -> None:
        async with half("null", secret=None) as (engine, url, session):
            prompt = "x" * (64 * MAX_CHARACTERS_PER_TOKEN + 1)
            status, text = await ask(session, url, prompt=prompt)
            assert (status, "cannot be within 64 tokens" in text) == (400, True)
            status, text = await ask(session, url, stop=["s"] * 65)
            assert (status, "stop" in text) == (400, True)
            assert not engine.requests

    run(test())


# ---- connections


class Fake:
    """A connection that notes being closed."""

    closed = False

    def force_close(self) -> None:
        self.closed = True


def test_silent_connections_are_closed_in_time_and_oldest_first():
    now = [0.0]
    connections = Connections(most=3, head_seconds=10.0, clock=lambda: now[0])
    silent = [Fake() for _ in range(5)]
    connections.sweep(silent)
    assert [one.closed for one in silent] == [True, True, False, False, False]
    now[0] = 9.9
    connections.sweep(silent[2:])
    assert not silent[2].closed
    now[0] = 10.0
    connections.sweep(silent[2:])
    assert all(one.closed for one in silent)
    assert connections.closed == 5


def test_busy_connections_are_never_closed_and_idle_ones_after_silent_ones():
    async def test() -> None:
        connections = Connections(most=2, head_seconds=10.0, clock=lambda: 0.0)
        busy, idle, silent = Fake(), Fake(), Fake()
        admission = asyncio.Event()

        class Request:
            def __init__(self, protocol: Fake) -> None:
                self.protocol = protocol

        async def at_once(_http: object) -> web.Response:
            return web.Response()

        async def slowly(_http: object) -> web.Response:
            await admission.wait()
            return web.Response()

        await connections.watch(Request(idle), at_once)  # type: ignore[arg-type]
        task = asyncio.create_task(connections.watch(Request(busy), slowly))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        connections.sweep([busy, idle, silent])
        assert (busy.closed, idle.closed, silent.closed) == (False, False, True)
        more = [Fake() for _ in range(3)]
        connections.sweep([busy, idle, *more])
        assert not busy.closed
        assert all(one.closed for one in more)
        admission.set()
        await task

    run(test())


def test_a_full_port_lets_the_next_client_in(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kvbaton.discovery.connections.MAX_CONNECTIONS", 16)
    monkeypatch.setattr("kvbaton.discovery.connections.SWEEP_SECONDS", 0.01)
    assert affordable() == 16

    async def test() -> None:
        async with half("null", secret=None) as (_, url, session):
            held = [await asyncio.open_connection("127.0.0.1", port_in(url)) for _ in range(64)]
            assert (await ask(session, url))[0] == 200
            closed = await asyncio.gather(*(reader.read() for reader, _ in held[:40]))
            assert closed == [b""] * 40
            assert (await ask(session, url))[0] == 200
            for _, writer in held:
                writer.close()

    run(test())


def test_random_bytes_do_no_harm():
    async def test() -> None:
        async with half("null", secret=None) as (_, url, session):
            for noise in (b"\xff" * 5000, b"\x16\x03\x01" + bytes(500), b"POST / HTTP/9.9\r\n\r\n", b"\r\n" * 500):
                with socket.create_connection(("127.0.0.1", port_in(url))) as stranger:
                    stranger.sendall(noise)
            assert (await ask(session, url))[0] == 200

    run(test())


# ---- the document


def test_a_routers_document_says_nothing_of_what_it_drops():
    schemas = document("router")["components"]["schemas"]
    for name in ("CompletionRequest", "ChatRequest", "GenerateRequest"):
        (dropped,) = schemas[name]["patternProperties"]
        assert [field for field in schemas[name]["properties"] if re.search(dropped, field)] == [], name


def test_the_document_names_exactly_the_routes_that_are_served():
    async def test() -> None:
        async with half("decode") as (_, url, session):
            await compare(url, session, "decode")
        async with serving_router("http://127.0.0.1:1", None) as (url, session):
            await compare(url, session, "router")

    async def compare(url: str, session: aiohttp.ClientSession, kind: str) -> None:
        async with session.get(f"{url}/openapi.json") as response:
            served = msgspec.json.decode(await response.read())
        assert served == msgspec.json.decode(msgspec.json.encode(document(kind)))
        for path, methods in served["paths"].items():
            parameters = re.findall(r"{(\w+)}", path)
            for operation in methods.values():
                assert [one["name"] for one in operation.get("parameters", ())] == parameters, path
            for method in ("get", "post"):
                asked = url + path.replace("{room}", "1").replace("{id}", "1")
                async with session.request(method, asked, data=b"") as response:
                    body = await response.read()
                    assert (response.status == 405) != (method in methods), (path, method)
                    if method in methods:
                        assert str(response.status) in methods[method]["responses"], (path, method, body)

    def routes(app: web.Application) -> set[tuple[str, str]]:
        return {(r.method, r.resource.canonical) for r in app.router.routes() if r.method != "HEAD" and r.resource}

    async def listed() -> None:
        engine = ScriptedEngine(lambda _request: spell("hi"))
        app = ApiServer(engine, None, ApiConfig(model="m", max_positions=1)).app
        router = Router(RouterConfig(workers=(Worker("prefill", "http://p", 1), Worker("decode", "http://d"))))
        for served, kind in ((app, "null"), (router.app, "router")):
            paths = document(kind)["paths"]
            assert routes(served) == {(method.upper(), path) for path, methods in paths.items() for method in methods}
        await router.close()

    run(test())
    run(listed())

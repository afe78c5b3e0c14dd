"""Request ids: a client's own name for its request, by which nobody else ends it or learns that it is there."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from urllib.parse import urlsplit

import aiohttp
import pytest
from aiohttp import web

from kvbaton.discovery.access import ROUTER_HEADER, token_of
from kvbaton.discovery.client import RegistryClient
from kvbaton.discovery.names import audience_of_url
from kvbaton.discovery.registry import Registry, Route
from kvbaton.discovery.server import registry_app
from kvbaton.serving.router.router import Router, RouterConfig
from kvbaton.serving.router.worker import Worker
from kvbaton.serving.server.aliases import MIN_PROOF_CHARACTERS, Aliases
from kvbaton.serving.server.api import ApiServer
from kvbaton.serving.server.request_parsing import ApiConfig
from kvbaton.serving.testing.engine import CharacterTokenizer, ScriptedEngine, spell
from kvbaton.serving.testing.http import run, serving

SECRET = "kX7-a-secret-that-must-stay-one-Q2w"
ALICE = {"Authorization": "Bearer sk-alice-5c1b9b6f6f0f4c3e"}
MALLORY = {"Authorization": "Bearer sk-mallory-77b8c0a1d2e3f4"}
KINDS = ("serve", "router")
ROUTE = Route(instance="i1", group="g", address="tcp://127.0.0.1:41000", layout_digest="d", http_port=30000)


class Pair:
    """A server, or a router over a prefill and a decode server, and the engine that answers."""

    def __init__(self, url: str, engine: ScriptedEngine, session: aiohttp.ClientSession) -> None:
        self.url = url
        self.engine = engine
        self.session = session

    async def ask(self, rid: object, headers: dict[str, str] | None = None, **fields: object) -> tuple[int, dict]:
        body = {"prompt": "x", "rid": rid, **fields}
        async with self.session.post(f"{self.url}/v1/completions", json=body, headers=headers) as response:
            return response.status, await response.json()

    async def asking(self, rid: object, headers: dict[str, str] | None = None) -> asyncio.Task[tuple[int, dict]]:
        """A request that has come to the engine and goes on until it is ended."""
        before = len(self.engine.requests)
        task = asyncio.create_task(self.ask(rid, headers))
        await self.engine.until(lambda: len(self.engine.requests) > before)
        return task

    async def abort(self, rid: str, headers: dict[str, str] | None = None) -> int:
        async with self.session.post(f"{self.url}/abort_request", json={"rid": rid}, headers=headers) as response:
            return response.status


@asynccontextmanager
async def pair(kind: str, secret: str | None = None) -> AsyncIterator[Pair]:
    engine = ScriptedEngine(lambda _request: [])

    async def answer(http: web.Request) -> web.Response:
        await http.read()
        return web.json_response({})

    async with AsyncExitStack() as stack:
        registry = registry_app(Registry(own=[ROUTE]), secret=secret)
        client = await stack.enter_async_context(RegistryClient(secret=secret))
        config = ApiConfig(model="m", max_positions=64, mode="decode" if kind == "router" else "null")
        server = ApiServer(engine, CharacterTokenizer(), config, registry=client, secret=secret)
        url = await stack.enter_async_context(serving(server.app))
        if kind == "router":
            prefill = web.Application()
            prefill.router.add_post("/v1/completions", answer)
            prefill.router.add_get("/ready", answer)
            found_at = urlsplit(await stack.enter_async_context(serving(registry))).port or 0
            workers = (
                Worker("prefill", await stack.enter_async_context(serving(prefill)), found_at),
                Worker("decode", url),
            )
            router = Router(RouterConfig(workers=workers, health_check_interval_secs=60.0, secret=secret))
            url = await stack.enter_async_context(serving(router.app))
            await router.workers.probe_all()
        yield Pair(url, engine, await stack.enter_async_context(aiohttp.ClientSession()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rid", ["mine", "a-name-that-is-long-and-still-guessed-0001"])
def test_nobody_ends_another_clients_request(kind: str, rid: str) -> None:
    async def test() -> None:
        async with pair(kind) as server:
            asking = await server.asking(rid, ALICE)
            for headers in (MALLORY, None, {"Authorization": "Bearer x"}, {"Authorization": "sk-alice"}):
                there, nowhere = await server.abort(rid, headers), await server.abort(rid[:-1] + "!", headers)
                assert there == nowhere, "what is answered does not tell whether there is such a request"
            assert not asking.done()
            assert await server.abort(rid, ALICE) == 200
            status, body = await asking
            assert (status, body["error"]["code"]) == (499, "aborted")
            await server.engine.until(lambda: not server.engine.live)

    run(test())


@pytest.mark.parametrize("kind", KINDS)
def test_two_clients_may_use_one_name_and_learn_nothing_of_each_other(kind: str) -> None:
    async def test() -> None:
        async with pair(kind) as server:
            asking = await server.asking("mine", ALICE)
            server.engine.script = lambda _request: spell("hi")
            for headers in (MALLORY, None, ALICE):
                status, body = await server.ask("mine", headers)
                assert (status, body["id"]) == (200, "mine")
            assert not asking.done()
            inside = [request.request_id for request in server.engine.requests]
            assert len(set(inside)) == 4
            assert "mine" not in inside
            await server.abort("mine", ALICE)
            assert (await asking)[0] == 499

    run(test())


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_key_an_id_that_nobody_guesses_ends_its_request(kind: str) -> None:
    """As clients of SGLang do; a short one names the answer, and is refused for ending anything."""

    async def test() -> None:
        async with pair(kind) as server:
            rid = uuid.uuid4().hex
            asking, named = await server.asking(rid), await server.asking("short")
            assert await server.abort("short") == await server.abort("nobody") == 400
            assert await server.abort("short", {"Authorization": "Bearer EMPTY"}) == 400
            assert await server.abort(rid) == 200
            assert (await asking)[0] == 499
            assert not named.done()
            named.cancel()

    run(test())


@pytest.mark.parametrize("kind", KINDS)
def test_an_operator_ends_any_request(kind: str) -> None:
    async def test() -> None:
        async with pair(kind, SECRET) as server:
            asking = [await server.asking("mine", headers) for headers in (ALICE, MALLORY, None)]
            assert (
                await server.abort(
                    "mine", {"Authorization": f"Bearer {token_of(SECRET, 'router', audience_of_url(server.url))}"}
                )
                == 200
            )
            assert not any(one.done() for one in asking)
            assert await server.abort("mine", {"Authorization": f"Bearer {SECRET}"}) == 200
            assert [(await one)[0] for one in asking] == [499] * 3

    run(test())


@pytest.mark.parametrize("secret", [None, SECRET])
def test_half_a_pair_ends_requests_for_its_router_only(secret: str | None) -> None:
    async def test() -> None:
        engine = ScriptedEngine(lambda _request: [])
        config = ApiConfig(model="m", max_positions=64, mode="prefill")
        app = ApiServer(engine, CharacterTokenizer(), config, secret=secret).app
        async with serving(app) as url, aiohttp.ClientSession() as session:
            headers = {} if secret is None else {ROUTER_HEADER: token_of(secret, "router", audience_of_url(url))}
            server = Pair(url, engine, session)
            asking = asyncio.create_task(server.ask("mine", headers, bootstrap_room=7))
            await engine.until(lambda: bool(engine.live))
            assert await server.abort("mine") == (401 if secret else 400)
            assert engine.live
            if secret:
                assert await server.abort("mine", headers) == 200
                assert (await asking)[0] == 499
            asking.cancel()

    run(test())


@pytest.mark.parametrize("kind", KINDS)
def test_an_id_is_checked_where_it_comes_in_and_null_is_none(kind: str) -> None:
    async def test() -> None:
        async with pair(kind) as server:
            server.engine.script = lambda _request: spell("hi")
            for wrong in ("", "a b", "ä", "x" * 129, 7, [], {}, True):
                status, body = await server.ask(wrong)
                assert (status, body["error"]["param"]) == (400, "rid"), wrong
            assert not server.engine.requests
            ids = {(await server.ask(None))[1]["id"] for _ in range(2)}
            assert len(ids) == 2
            assert all(len(one) >= MIN_PROOF_CHARACTERS for one in ids)

    run(test())


@pytest.mark.parametrize("kind", KINDS)
def test_the_id_of_an_answer_ends_it_where_the_client_gave_none(kind: str) -> None:
    async def test() -> None:
        async with pair(kind) as server:
            server.engine.script = lambda _request: spell("a", finish_reason=None)
            body = {"prompt": "x", "stream": True}
            async with server.session.post(f"{server.url}/v1/completions", json=body) as response:
                told = await response.content.readuntil(b"\n\n")
                rid = told.partition(b'"id":"')[2].partition(b'"')[0].decode()
                assert await server.abort(rid) == 200
                assert b'"code":"aborted"' in await response.read()

    run(test())


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_that_is_ended_says_so(kind: str) -> None:
    async def test() -> None:
        async with pair(kind) as server:
            rid = uuid.uuid4().hex
            asking = await server.asking(rid)
            assert await server.abort(rid) == 200
            assert (await asking)[1]["error"]["message"].startswith("aborted through /abort_request")
            assert await server.abort(rid) == 200

    run(test())


def test_no_key_is_kept_and_nothing_stays() -> None:
    aliases, ended = Aliases(), []
    key = "sk-a-key-of-some-length-000"
    with aliases.named(key, "mine", lambda: ended.append(1)), aliases.named(key, "mine", lambda: ended.append(2)):
        assert key not in str(vars(aliases))
        assert len(aliases) == 2
        aliases.end(key, "mine")
    assert ended == [1, 2]
    aliases.end(key, "mine")
    assert (len(aliases), ended) == (0, [1, 2])

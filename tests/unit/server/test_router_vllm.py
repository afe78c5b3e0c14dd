"""The router in front of vLLM servers that run our connector: stand-ins that speak their HTTP, on loopback."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
from aiohttp import web

from kvbaton.engines.vllm.params import answer, decode_leg, prefill_leg
from kvbaton.serving.router.router import Router, RouterConfig
from kvbaton.serving.router.worker import Worker
from kvbaton.serving.testing.http import run, serving

SOURCES = ("tcp://127.0.0.1:7001", "tcp://127.0.0.1:7002")


class VllmServer:
    """Answers completions as vLLM does. ``params``: prefill's, from the leg that it was asked with; None: too short a
    prompt. ``status``: with which it refuses."""

    def __init__(self, params: Callable[[Any], Any] | None = None) -> None:
        self.params = params
        self.bodies: list[dict[str, Any]] = []
        self.status = 200
        self.released = asyncio.Event()
        self.released.set()
        self.app = web.Application()
        self.app.router.add_post("/v1/completions", self._completions)
        self.app.router.add_post("/v1/chat/completions", self._completions)
        self.app.router.add_get("/health", self._health)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        await self.released.wait()
        if self.status != 200:
            error = {"message": "it is broken", "type": "Internal Server Error", "param": None, "code": self.status}
            return web.json_response({"error": error}, status=self.status)
        told = {"object": "text_completion", "choices": [{"text": "hi", "index": 0}]}
        if self.params is not None:
            told["kv_transfer_params"] = self.params(prefill_leg(body["kv_transfer_params"]))
        return web.json_response(told)

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response()


def handed_over(leg: Any) -> dict[str, Any]:
    room = leg.room if leg.room is not None else 77
    return answer(room, SOURCES, group="g", request_id="r", tp_size=2)


class Setup:
    def __init__(self, router: Router, session: aiohttp.ClientSession, url: str) -> None:
        self.router, self.session, self.url = router, session, url

    async def post(self, status: int = 200, path: str = "/v1/completions", **fields: object) -> dict[str, Any]:
        async with self.session.post(self.url + path, json={"prompt": "x", **fields}) as response:
            body: dict[str, Any] = await response.json()
            assert response.status == status, body
            return body


@asynccontextmanager
async def routed(prefills: list[VllmServer], decodes: list[VllmServer]) -> AsyncIterator[Setup]:
    async with AsyncExitStack() as closing:
        urls = {server: await closing.enter_async_context(serving(server.app)) for server in [*prefills, *decodes]}
        workers = (*(Worker("prefill", urls[p]) for p in prefills), *(Worker("decode", urls[d]) for d in decodes))
        router = Router(RouterConfig(workers=workers, engine="vllm", health_check_interval_secs=60.0))
        url = await closing.enter_async_context(serving(router.app))
        await router.workers.probe_all()
        yield Setup(router, await closing.enter_async_context(aiohttp.ClientSession()), url)


def test_the_first_request_is_sequential_and_the_next_ones_are_concurrent() -> None:
    async def test() -> None:
        prefill, decode = VllmServer(handed_over), VllmServer()
        async with routed([prefill], [decode]) as setup:
            told = await setup.post(max_tokens=5, temperature=0)
            assert told["choices"][0]["text"] == "hi"
            assert "kv_transfer_params" not in told
            leg = decode_leg(decode.bodies[0]["kv_transfer_params"])
            assert leg is not None
            assert (leg.room, leg.sources, leg.begun) == (77, SOURCES, True)
            prefill.released.clear()  # decode is asked although prefill has not answered
            await setup.post(max_tokens=5)
            prefill.released.set()
            asked = prefill_leg(prefill.bodies[1]["kv_transfer_params"])
            leg = decode_leg(decode.bodies[1]["kv_transfer_params"])
            assert asked is not None
            assert leg is not None
            assert (leg.room, leg.sources) == (asked.room, SOURCES)

    run(test())


def test_prefill_computes_one_token_of_one_answer_and_decode_what_the_client_wants() -> None:
    async def test() -> None:
        prefill, decode = VllmServer(handed_over), VllmServer()
        async with routed([prefill], [decode]) as setup:
            wanted = {"max_tokens": 50, "n": 3, "stream": False, "logprobs": 2, "min_tokens": 7, "stop": ["a"]}
            for _ in range(2):
                await setup.post(**wanted)
            for body in prefill.bodies:
                assert (body["max_tokens"], body["n"], body["stream"]) == (1, 1, False)
                assert not {"logprobs", "min_tokens", "stop", "stream_options"} & set(body)
            for body in decode.bodies:
                assert {name: body[name] for name in wanted} == wanted
            await setup.post(path="/v1/chat/completions", messages=[], max_completion_tokens=9)
            assert prefill.bodies[-1]["max_completion_tokens"] == 1
            assert decode.bodies[-1]["max_completion_tokens"] == 9

    run(test())


def test_a_prompt_that_is_too_short_goes_to_decode_alone() -> None:
    async def test() -> None:
        prefill, decode = VllmServer(lambda _leg: None), VllmServer()
        async with routed([prefill], [decode]) as setup:
            await setup.post()
            assert "kv_transfer_params" not in decode.bodies[0]

    run(test())


def test_a_clients_own_parameters_of_the_transfer_are_dropped() -> None:
    async def test() -> None:
        prefill, decode = VllmServer(lambda _leg: None), VllmServer()
        async with routed([prefill], [decode]) as setup:
            await setup.post(kv_transfer_params={"do_remote_prefill": True, "kvbaton_sources": ["tcp://6.6.6.6:6"]})
            assert prefill.bodies[0]["kv_transfer_params"] == {"do_remote_decode": True}
            assert "kv_transfer_params" not in decode.bodies[0]

    run(test())


def test_a_failure_is_told_by_the_servers_name_and_forgets_what_was_known_of_prefill() -> None:
    async def test() -> None:
        prefill, decode = VllmServer(handed_over), VllmServer()
        async with routed([prefill], [decode]) as setup:
            await setup.post()
            decode.status = 500
            told = await setup.post(500)
            assert "it is broken" in told["error"]["message"]
            assert "decode http://" in told["error"]["message"]
            decode.status = 200
            await setup.post()  # prefill was perhaps started again: it is asked first
            leg = decode_leg(decode.bodies[-1]["kv_transfer_params"])
            assert leg is not None
            assert leg.room == 77

    run(test())


def test_another_prefill_is_taken_where_one_cannot_be_reached() -> None:
    async def test() -> None:
        prefill, decode = VllmServer(handed_over), VllmServer()
        async with routed([prefill], [decode]) as setup:
            gone = Worker("prefill", "http://127.0.0.1:9")
            gone.trouble = ""
            setup.router.workers._workers = (gone, *setup.router.workers._workers)
            for _ in range(3):
                assert (await setup.post())["choices"][0]["text"] == "hi"

    run(test())


def test_an_answer_that_is_no_completion_is_a_bad_gateway() -> None:
    async def test() -> None:
        prefill, decode = VllmServer(lambda _leg: ["nothing", "of", "ours"]), VllmServer()
        async with routed([prefill], [decode]) as setup:
            told = await setup.post(502)
            assert "must be vLLM with KVBatonConnector" in told["error"]["message"]

    run(test())

"""The router between real servers on loopback: both call, their failures, and workers that come and go."""

import asyncio
import contextlib
import json
import logging
import os
import resource
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from io import BytesIO
from pathlib import Path

import aiohttp
import msgspec
import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult

from kvbaton.discovery.client import RegistryClient
from kvbaton.discovery.registry import Registry, Route
from kvbaton.discovery.server import registry_app
from kvbaton.errors import ConfigError, PeerLostError
from kvbaton.serving.router.breaker import Breaker, BreakerSettings
from kvbaton.serving.router.calls import CallFailed, Pair, mint_room, strip
from kvbaton.serving.router.own_limits import affordable_requests
from kvbaton.serving.router.passing import PassedHeaders
from kvbaton.serving.router.router import MAX_BODY_BYTES, Router, RouterConfig
from kvbaton.serving.router.worker import State, Worker
from kvbaton.serving.router.workers import HealthChecks, Workers, parse_worker
from kvbaton.serving.server import lifecycle
from kvbaton.serving.server.api import ApiServer
from kvbaton.serving.server.lifecycle import listen, port_of, reserve
from kvbaton.serving.server.request_parsing import ApiConfig
from kvbaton.serving.testing.engine import CharacterTokenizer, ScriptedEngine, spell
from kvbaton.serving.testing.http import run, serving

ANSWER = {"object": "text_completion", "choices": [{"text": "hi", "index": 0}]}
EVENTS = b'data: {"choices":[{"text":"h"}]}\n\n', b'data: {"choices":[{"text":"i"}]}\n\n', b"data: [DONE]\n\n"


JSON = {"Content-Type": "application/json"}
#: Key and certificate of 127.0.0.1, signed by itself, for tests only: ``openssl req -x509 -newkey ec``.
CERTIFICATE = Path(__file__).with_name("worker.pem")


class Backend:
    """A worker whose behaviour a test writes: ``behave`` answers one request."""

    def __init__(self, behave: Callable[[web.Request, dict], Awaitable[web.StreamResponse]]) -> None:
        self.behave = behave
        self.bodies: list[dict] = []
        self.arrived = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.ready = 200
        self.frozen = asyncio.Event()
        self.probed: asyncio.Queue[None] = asyncio.Queue()
        self.app = web.Application(client_max_size=64 << 20)
        self.app.router.add_post("/v1/completions", self._completions)
        self.app.router.add_get("/ready", self._ready)
        self.app.router.add_get("/v1/models", self._models)
        self.app.router.add_get("/get_server_info", self._info)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.arrived.set()
        try:
            return await self.behave(request, body)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def _ready(self, _request: web.Request) -> web.Response:
        self.probed.put_nowait(None)
        if self.frozen.is_set():
            await asyncio.Event().wait()
        return web.json_response({"reason": "still loading"}, status=self.ready)

    async def _models(self, _request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m"}]})

    async def _info(self, _request: web.Request) -> web.Response:
        return web.json_response({"model": "m"})


async def answer(_request: web.Request, _body: dict) -> web.StreamResponse:
    return web.json_response(ANSWER)


async def stream(request: web.Request, _body: dict) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for piece in EVENTS:
        await response.write(piece)
    await response.write_eof()
    return response


async def hang(_request: web.Request, _body: dict) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


def fail(status: int, code: str, message: str):
    async def behave(_request: web.Request, _body: dict) -> web.StreamResponse:
        error = {"message": message, "type": "t", "code": code, "param": None}
        return web.json_response({"error": error}, status=status)

    return behave


async def vanish(request: web.Request, _body: dict) -> web.StreamResponse:
    """Close the connection without a word, as a killed process does."""
    assert request.transport is not None
    request.transport.abort()
    raise asyncio.CancelledError


def answer_after(prefills: list[Backend]):
    """What a decode server does: answers when one of ``prefills`` has been asked, unless that one failed."""

    async def behave(request: web.Request, body: dict) -> web.StreamResponse:
        def asked() -> list[Backend]:
            rooms = [(backend, sent["bootstrap_room"]) for backend in prefills for sent in backend.bodies]
            return [backend for backend, room in rooms if room == body["bootstrap_room"]]

        while not asked():
            await asyncio.sleep(0)
        return await (answer if asked()[0].behave is answer else hang)(request, body)

    return behave


class Setup:
    """A router in front of backends, and a session that speaks to it."""

    def __init__(self, router: Router, session: aiohttp.ClientSession, url: str, urls: dict[Backend, str]) -> None:
        self.router = router
        self.session = session
        self.url = url
        self.urls = urls

    async def post(self, status: int = 200, path: str = "/v1/completions", **fields: object) -> dict:
        async with self.session.post(self.url + path, json={"prompt": "x", **fields}) as response:
            body = await response.json()
            assert response.status == status, body
            assert ("Retry-After" in response.headers) == (status in (429, 503))
            return body

    async def get(self, path: str, status: int = 200) -> dict:
        async with self.session.get(self.url + path) as response:
            assert response.status == status
            return await response.json()

    async def metric(self, line: str) -> float:
        async with self.session.get(f"{self.url}/metrics") as response:
            found = [row for row in (await response.text()).splitlines() if row.startswith(line + " ")]
        return float(found[0].rpartition(" ")[2]) if found else 0.0


@asynccontextmanager
async def routed(prefills: list[Backend], decodes: list[Backend], **config: object) -> AsyncIterator[Setup]:
    async with AsyncExitStack() as closing:
        urls = {backend: await closing.enter_async_context(serving(backend.app)) for backend in [*prefills, *decodes]}
        workers = (
            *(Worker("prefill", urls[backend], 8998) for backend in prefills),
            *(Worker("decode", urls[backend]) for backend in decodes),
        )
        router = Router(RouterConfig(workers=workers, **{"health_check_interval_secs": 60.0, **config}))
        url = await closing.enter_async_context(serving(router.app))
        await router.workers.probe_all()
        session = await closing.enter_async_context(aiohttp.ClientSession())
        yield Setup(router, session, url, urls)


def test_both_legs_get_the_same_room_and_the_client_gets_decodes_answer():
    async def test() -> None:
        prefill, decode = Backend(answer), Backend(answer)
        async with routed([prefill], [decode]) as setup:
            assert await setup.post(temperature=0, stream_options=None) == ANSWER
            await prefill.arrived.wait()
            (one,), (two,) = prefill.bodies, decode.bodies
            room = one["bootstrap_room"]
            assert 0 < room < 1 << 63
            for body in (one, two):
                assert (body["prompt"], body["temperature"]) == ("x", 0)
                assert (body["bootstrap_host"], body["bootstrap_port"]) == ("127.0.0.1", 8998)
                assert body["bootstrap_room"] == room
            assert one["rid"] == two["rid"]
            await setup.post()
            assert await setup.metric("kvbaton_time_to_first_token_seconds_count") == 0
            assert prefill.bodies[1]["bootstrap_room"] != room
            assert await setup.metric('kvbaton_requests_total{outcome="ok",route="/v1/completions"}') == 2

    run(test())


def test_a_stream_passes_through_and_prefill_is_not_asked_to_stream():
    async def test() -> None:
        prefill, decode = Backend(answer), Backend(stream)
        async with routed([prefill], [decode]) as setup:
            fields = {"prompt": "x", "stream": True, "stream_options": {"include_usage": True}}
            async with setup.session.post(f"{setup.url}/v1/completions", json=fields) as response:
                assert response.headers["Content-Type"].startswith("text/event-stream")
                assert int(response.headers["X-KVBaton-Room"]) == decode.bodies[0]["bootstrap_room"]
                assert await response.read() == b"".join(EVENTS)
            assert await setup.metric("kvbaton_time_to_first_token_seconds_count") == 1
            assert decode.bodies[0]["stream"] is True
            assert prefill.bodies[0]["stream"] is False
            assert "stream_options" not in prefill.bodies[0]

    run(test())


def test_topology_from_a_client_is_dropped():
    async def test() -> None:
        prefill, decode = Backend(answer), Backend(answer)
        async with routed([prefill], [decode]) as setup:
            await setup.post(bootstrap_host="evil", bootstrap_port=1, bootstrap_room=7, kv_transfer_params={"a": 1})
            body = decode.bodies[0]
            assert body["bootstrap_host"] == "127.0.0.1"
            assert body["bootstrap_room"] != 7
            assert "kv_transfer_params" not in body

    run(test())


@pytest.mark.parametrize("streamed", [False, True])
def test_a_failing_prefill_is_the_clients_answer_at_once_and_ends_the_decode_leg(streamed):
    async def test() -> None:
        prefill, decode = Backend(fail(504, "expired", "nobody collected the prompt")), Backend(hang)
        async with routed([prefill], [decode]) as setup:
            error = (await setup.post(504, stream=streamed))["error"]
            assert error["code"] == "expired"
            assert error["message"] == f"prefill {setup.urls[prefill]}: nobody collected the prompt"
            await decode.cancelled.wait()
            assert await setup.metric('kvbaton_requests_total{outcome="expired",route="/v1/completions"}') == 1

    run(test())


def test_a_failing_decode_is_the_clients_answer_at_once_and_ends_the_prefill_leg():
    async def test() -> None:
        prefill, decode = Backend(hang), Backend(fail(503, "peer_lost", "it died"))
        async with routed([prefill], [decode]) as setup:
            error = (await setup.post(503))["error"]
            assert error["message"] == f"decode {setup.urls[decode]}: it died"
            await prefill.cancelled.wait()

    run(test())


def test_a_worker_whose_peer_broke_the_protocol_is_a_bad_gateway_when_no_pair_does_better():
    async def test() -> None:
        decodes = [Backend(fail(502, "protocol", "the aux row is another prompt's")) for _ in range(2)]
        async with routed([Backend(hang)], decodes) as setup:
            error = (await setup.post(502))["error"]
            assert error["code"] == "protocol"
            assert error["message"].startswith(f"decode {setup.urls[decodes[1]]}: ")
            assert [len(decode.bodies) for decode in decodes] == [1, 1]
            assert await setup.metric("kvbaton_router_retries_total") == 1

    run(test())


def test_the_clients_own_mistake_comes_back_as_the_worker_said_it():
    async def test() -> None:
        wrong = fail(400, "config", "top_p: must be above 0")
        async with routed([Backend(wrong)], [Backend(hang)]) as setup:
            assert (await setup.post(400))["error"]["message"] == "top_p: must be above 0"

    run(test())


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_goes_away_ends_both_legs(streamed):
    async def test() -> None:
        prefill, decode = Backend(hang), Backend(hang)
        async with routed([prefill], [decode]) as setup:
            url = f"{setup.url}/v1/completions"
            asking = asyncio.create_task(setup.session.post(url, json={"prompt": "x", "stream": streamed}))
            await prefill.arrived.wait()
            await decode.arrived.wait()
            asking.cancel()
            await prefill.cancelled.wait()
            await decode.cancelled.wait()
            assert await setup.router.admission.emptied(5)

    run(test())


def test_a_client_that_goes_away_within_a_stream_ends_the_decode_leg():
    async def test() -> None:
        async def begin(request: web.Request, body: dict) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            await response.write(EVENTS[0])
            return await hang(request, body)

        decode = Backend(begin)
        async with routed([Backend(answer)], [decode]) as setup:
            url = f"{setup.url}/v1/completions"
            response = await setup.session.post(url, json={"prompt": "x", "stream": True})
            assert await response.content.readuntil(b"\n\n") == EVENTS[0]
            response.close()
            await decode.cancelled.wait()
            assert await setup.router.admission.emptied(5)
            assert await setup.metric('kvbaton_requests_total{outcome="client_gone",route="/v1/completions"}') == 1

    run(test())


def test_a_decode_that_breaks_off_within_a_stream_is_an_error_event():
    async def test() -> None:
        read = asyncio.Event()

        async def break_off(request: web.Request, _body: dict) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            await response.write(EVENTS[0])
            await read.wait()
            assert request.transport is not None
            request.transport.close()
            return response

        async with routed([Backend(answer)], [decode := Backend(break_off)]) as setup:
            async with setup.session.post(
                f"{setup.url}/v1/completions", json={"prompt": "x", "stream": True}
            ) as response:
                assert await response.content.readuntil(b"\n\n") == EVENTS[0]
                read.set()
                blocks = (await response.read()).split(b"\n\n")
            error = json.loads(blocks[0].removeprefix(b"data: "))["error"]
            assert error["code"] == "peer_lost"
            assert setup.urls[decode] in error["message"]
            assert blocks[1:] == [b""]
            assert await setup.metric('kvbaton_requests_total{outcome="peer_lost",route="/v1/completions"}') == 1

    run(test())


def test_prefill_failing_after_decode_has_answered_changes_nothing():
    async def test() -> None:
        decoding = asyncio.Event()

        async def late(_request: web.Request, _body: dict) -> web.StreamResponse:
            await decoding.wait()
            return await fail(500, "internal", "too late to matter")(_request, _body)

        async def slow_stream(request: web.Request, _body: dict) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            await response.write(EVENTS[0])
            decoding.set()
            for piece in EVENTS[1:]:
                await response.write(piece)
            await response.write_eof()
            return response

        async with (
            routed([Backend(late)], [Backend(slow_stream)]) as setup,
            setup.session.post(f"{setup.url}/v1/completions", json={"prompt": "x", "stream": True}) as response,
        ):
            assert await response.read() == b"".join(EVENTS)

    run(test())


def test_workers_take_turns():
    async def test() -> None:
        prefills, decodes = [Backend(answer) for _ in range(2)], [Backend(answer) for _ in range(3)]
        async with routed(prefills, decodes) as setup:
            for _ in range(6):
                await setup.post()
            assert [len(backend.bodies) for backend in prefills] == [3, 3]
            assert [len(backend.bodies) for backend in decodes] == [2, 2, 2]

    run(test())


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("trouble", [vanish, fail(503, "draining", "stopping")])
def test_a_worker_that_is_gone_or_draining_is_replaced_once(role, trouble):
    async def test() -> None:
        bad, good, other = Backend(trouble), Backend(answer), Backend(answer)
        prefills, decodes = ([bad, good], [other]) if role == "prefill" else ([other], [bad, good])
        if role == "prefill":
            other.behave = answer_after(prefills)
        async with routed(prefills, decodes) as setup:
            bad.ready = 503
            assert await setup.post(rid="mine") == ANSWER
            assert good.bodies[0]["bootstrap_room"] != bad.bodies[0]["bootstrap_room"]
            assert good.bodies[0]["rid"] == other.bodies[-1]["rid"] == "mine"
            assert await setup.metric("kvbaton_router_retries_total") == 1
            line = f'kvbaton_router_worker_usable{{role="{role}",worker="{setup.urls[bad]}"}}'
            assert await setup.metric(line) == 0
            await setup.post()
            assert len(bad.bodies) == 1  # it is out until a probe succeeds
            bad.ready = 200
            await setup.router.workers.probe_all()
            await setup.post()
            assert len(bad.bodies) == 2

    run(test())


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("code", ["peer_lost", "disconnected", "registry"])
def test_a_worker_that_blames_its_peer_is_kept_and_the_other_one_is_replaced(role, code, caplog):
    """A killed decode: prefill's word of it is often there before decode's broken connection."""

    async def test() -> None:
        fails, hangs, good = Backend(fail(503, code, "the peer has gone")), Backend(hang), Backend(answer)
        prefills, decodes = ([fails], [hangs, good]) if role == "prefill" else ([hangs, good], [fails])

        async def behave(request: web.Request, body: dict) -> web.StreamResponse:
            await hangs.arrived.wait()
            if len(fails.bodies) > 1:
                return await answer(request, body)
            return await fail(503, code, "the peer has gone")(request, body)

        fails.behave = behave
        async with routed(prefills, decodes) as setup:
            hangs.ready = 503
            assert await setup.post() == ANSWER
            assert len(fails.bodies) == 2
            assert len(good.bodies) == 1
            states = {worker.url: worker.usable for worker in setup.router.workers.all}
            assert states[setup.urls[fails]]
            assert not states[setup.urls[hangs]]
            (taken_out,) = (record for record in caplog.records if "takes no requests now" in record.message)
            assert setup.urls[hangs] in taken_out.message

    run(test())


def test_each_leg_says_which_half_it_is_for_and_only_decode_is_told_the_models_name():
    async def test() -> None:
        roles: dict[str, str] = {}

        def noting(name: str):
            async def behave(request: web.Request, body: dict) -> web.StreamResponse:
                roles[name] = request.headers["X-KVBaton-Role"]
                return await answer(request, body)

            return behave

        prefill, decode = Backend(noting("p")), Backend(noting("d"))
        async with routed([prefill], [decode]) as setup:
            await setup.post(model="/b/m")
            await prefill.arrived.wait()
            assert roles == {"p": "prefill", "d": "decode"}
            assert "model" not in prefill.bodies[0]
            assert decode.bodies[0]["model"] == "/b/m"

    run(test())


def test_retries_share_no_id_where_a_client_says_that_it_has_none():
    async def test() -> None:
        prefill, decode = Backend(answer), Backend(answer)
        async with routed([prefill], [decode]) as setup:
            for _ in range(2):
                await setup.post(rid=None)
            rids = [body["rid"] for body in decode.bodies]
            assert len(set(rids)) == 2
            assert all(rid and "None" not in rid for rid in rids)

    run(test())


def test_without_another_worker_the_client_is_told_which_one_is_gone():
    async def test() -> None:
        async with routed([bad := Backend(vanish)], [decode := Backend(hang)]) as setup:
            error = (await setup.post(503))["error"]
            assert error["code"] == "peer_lost"
            assert error["message"].startswith(f"prefill {setup.urls[bad]}: the server cannot be reached or went away")
            await decode.cancelled.wait()

    run(test())


def test_every_other_pair_is_tried_before_the_client_hears_of_a_failure():
    async def test() -> None:
        bad = [Backend(vanish) for _ in range(3)]
        async with routed(bad, [Backend(hang)]) as setup:
            await setup.post(503)
            assert [len(backend.bodies) for backend in bad] == [1, 1, 1]

    run(test())


@pytest.mark.parametrize("code", ["disconnected", "peer_lost", "transfer_failed"])
def test_who_blames_its_peer_is_asked_again_beside_another(code):
    """A killed decode: prefill's report reaches the router before decode's broken connection does."""

    async def test() -> None:
        blames = fail(503, code, "the decode rank went away [while WaitingForInput]")
        gone, good = Backend(hang), Backend(answer)

        async def prefill(request: web.Request, body: dict) -> web.StreamResponse:
            met = [sent["bootstrap_room"] for sent in gone.bodies]
            return await (blames if body["bootstrap_room"] in met else answer)(request, body)

        async def ask_late(request: web.Request, body: dict) -> web.StreamResponse:
            while not gone.bodies:
                await asyncio.sleep(0)
            return await prefill(request, body)

        prefills = [Backend(ask_late), Backend(ask_late)]
        async with routed(prefills, [gone, good]) as setup:
            assert await setup.post() == ANSWER
            assert sum(len(backend.bodies) for backend in prefills) == 2
            assert len(good.bodies) == 1
            await gone.cancelled.wait()

    run(test())


def test_retries_have_a_budget():
    async def test() -> None:
        bad = [Backend(vanish) for _ in range(4)]
        async with routed(bad, [Backend(hang)], max_concurrent_requests=2) as setup:
            await setup.post(503)
            assert await setup.metric("kvbaton_router_retries_total") == 2

    run(test())


def test_a_journal_is_for_a_router_to_write():
    async def test() -> None:
        async with routed([prefill := Backend(answer)], [Backend(answer)]) as setup:
            error = (await setup.post(400, kvbaton_journal={"id": "x", "created": 1, "seed": 1}))["error"]
            assert error["param"] == "kvbaton_journal"
            assert not prefill.bodies
            assert await setup.post(kvbaton_journal=None) == ANSWER

    run(test())


def test_a_worker_that_is_down_is_skipped_and_comes_back_by_itself():
    async def test() -> None:
        port = _free_port()
        decode = Backend(answer)
        async with AsyncExitStack() as closing:
            prefill_url = await closing.enter_async_context(serving(Backend(answer).app))
            decode_url = await closing.enter_async_context(serving(decode.app))
            workers = (
                Worker("prefill", prefill_url),
                Worker("prefill", f"http://127.0.0.1:{port}"),
                Worker("decode", decode_url),
            )
            router = Router(RouterConfig(workers=workers, health_check_interval_secs=0.01))
            url = await closing.enter_async_context(serving(router.app))
            session = await closing.enter_async_context(aiohttp.ClientSession())
            setup = Setup(router, session, url, {})
            await setup.post()
            await setup.post()
            assert "cannot be reached" in workers[1].trouble
            late = Backend(answer)
            async with serving(late.app, port=port):
                for _ in range(2):  # the second probe has begun: the first one's answer has been taken in
                    await late.probed.get()
                await setup.post()
                await setup.post()
                assert late.bodies
            await setup.post()

    run(test())


def _free_port() -> int:
    with reserve("127.0.0.1", 0) as bound:
        return port_of(bound)


def test_the_first_request_after_a_restart_does_not_wait_for_a_probe():
    async def test() -> None:
        port = _free_port()
        async with serving(Backend(answer).app) as decode_url:
            workers = (Worker("prefill", f"http://127.0.0.1:{port}"), Worker("decode", decode_url))
            router = Router(RouterConfig(workers=workers, health_check_interval_secs=3600.0))
            async with serving(router.app) as url, aiohttp.ClientSession() as session:
                setup = Setup(router, session, url, {})
                error = (await setup.post(503))["error"]
                assert (
                    f"no prefill server takes requests (http://127.0.0.1:{port}: cannot be reached" in error["message"]
                )
                async with serving(Backend(answer).app, port=port):
                    assert await setup.post() == ANSWER

    run(test())


def test_readiness_follows_the_workers():
    async def test() -> None:
        prefill, decode = Backend(answer), Backend(answer)
        async with routed([prefill], [decode]) as setup:
            assert await setup.get("/health") == {"status": "ok"}
            assert await setup.get("/ready") == {"ready": True, "reason": ""}
            decode.ready = 503
            await setup.router.workers.probe_all()
            assert (await setup.get("/ready", 503))["reason"] == "no decode server takes requests"
            assert "still loading" in setup.router.workers.all[1].trouble
            assert "still loading" in (await setup.post(503))["error"]["message"]
            decode.ready = 200
            await setup.router.workers.probe_all()
            await setup.get("/ready")
            setup.router.admission.shut()
            assert (await setup.get("/ready", 503))["reason"] == "the router is stopping"
            assert (await setup.post(503))["error"]["code"] == "draining"

    run(test())


def test_silence_takes_a_worker_out_at_the_second_probe():
    async def test() -> None:
        decode = Backend(answer)
        async with serving(decode.app) as url, aiohttp.ClientSession() as session:
            worker = Worker("decode", url)
            workers = Workers((worker,), session, HealthChecks(timeout_secs=0.05))
            while not worker.usable:  # the first answer may take longer than that
                await workers.probe_all()
            decode.frozen.set()
            await workers.probe_all()
            assert worker.usable
            await workers.probe_all()
            assert (worker.state, worker.trouble) == (State.SILENT, "/ready does not answer")
            with pytest.raises(PeerLostError, match="does not answer"):
                await workers.find("decode")
            decode.frozen.clear()
            while not worker.usable:
                await workers.probe_all()

    run(test())


def test_a_worker_from_which_anything_comes_is_not_silent():
    async def test() -> None:
        backend = Backend(answer)
        async with serving(backend.app) as url, aiohttp.ClientSession() as session:
            worker = Worker("decode", url, state=State.READY)
            probes = Workers((worker,), session, HealthChecks(timeout_secs=0.1, failure_threshold=1))
            backend.frozen.set()
            probing = asyncio.create_task(probes.probe_all())
            await backend.probed.get()
            worker.heard()
            await probing
            assert worker.usable
            await probes.probe_all()
            assert worker.state is State.SILENT

    run(test())


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_what_a_silent_worker_was_asked_is_asked_elsewhere_at_once(role, streamed):
    """A stopped process: its port takes connections, and nothing comes."""

    async def test() -> None:
        frozen, good, other = Backend(hang), Backend(answer), Backend(hang)
        prefills, decodes = ([frozen, good], [other]) if role == "prefill" else ([other], [frozen, good])
        if role == "prefill":
            other.behave = answer_after(prefills)
        async with routed(prefills, decodes) as setup:
            asking = [asyncio.create_task(setup.post(stream=streamed)) for _ in range(4)]
            while len(frozen.bodies) < 2:
                await frozen.arrived.wait()
                frozen.arrived.clear()
            (worker,) = (w for w in setup.router.workers.all if w.url == setup.urls[frozen])
            worker.become(State.SILENT, "/ready does not answer")
            assert await asyncio.gather(*asking) == [ANSWER] * 4
            assert worker.legs == 0
            assert await setup.metric("kvbaton_router_retries_total") == 2

    run(test())


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_nobody_waits_for_another_probe_of_servers_that_are_all_silent(role):
    """A client of the only pair was told after the limits of two more probes."""

    async def test() -> None:
        silent, other = Backend(hang), Backend(hang)
        prefills, decodes = ([silent], [other]) if role == "prefill" else ([other], [silent])
        async with routed(prefills, decodes, health_check_timeout_secs=0.2) as setup:
            asking = asyncio.create_task(setup.post(503))
            await silent.arrived.wait()
            while not silent.probed.empty():
                silent.probed.get_nowait()
            silent.frozen.set()
            (worker,) = (w for w in setup.router.workers.all if w.url == setup.urls[silent])
            worker.become(State.SILENT, "/ready does not answer")
            assert setup.urls[silent] in (await asking)["error"]["message"]
            assert (await setup.post(503))["error"]["code"] == "peer_lost"
            assert silent.probed.qsize() <= 1  # of the round that looks after a worker that failed a request
            await setup.router.workers.probe_all()  # which ends by its limit

    run(test())


def test_a_stream_whose_decode_falls_silent_ends_with_an_error_event_at_once():
    async def test() -> None:
        async def freeze(request: web.Request, body: dict) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            await response.write(EVENTS[0])
            return await hang(request, body)

        async with routed([Backend(answer)], [decode := Backend(freeze)]) as setup:
            url = f"{setup.url}/v1/completions"
            async with setup.session.post(url, json={"prompt": "x", "stream": True}) as response:
                assert await response.content.readuntil(b"\n\n") == EVENTS[0]
                setup.router.workers.all[1].become(State.SILENT, "/ready does not answer")
                error = json.loads((await response.read()).removeprefix(b"data: "))["error"]
            assert error["code"] == "peer_lost"
            assert setup.urls[decode] in error["message"]

    run(test())


def test_a_request_that_takes_too_long_is_504_or_an_error_event():
    async def test() -> None:
        async def begin(request: web.Request, body: dict) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            await response.write(EVENTS[0])
            return await hang(request, body)

        prefill, decode = Backend(answer), Backend(hang)
        async with routed([prefill], [decode], request_timeout_secs=0.4) as setup:
            assert (await setup.post(504))["error"]["code"] == "expired"
            await decode.cancelled.wait()
            decode.behave = begin
            async with setup.session.post(
                f"{setup.url}/v1/completions", json={"prompt": "x", "stream": True}
            ) as response:
                blocks = (await response.read()).split(b"\n\n")
            assert json.loads(blocks[1].removeprefix(b"data: "))["error"]["code"] == "expired"
            assert blocks[2:] == [b""]

    run(test())


def test_garbage_never_reaches_a_worker():
    async def test() -> None:
        prefill, decode = Backend(answer), Backend(answer)
        async with routed([prefill], [decode]) as setup:
            for body in (b"", b"[]", b"nonsense", b"\xff", b'{"a":', b"3"):
                async with setup.session.post(f"{setup.url}/v1/completions", data=body, headers=JSON) as response:
                    assert response.status == 400
            large = BytesIO(b" " * (MAX_BODY_BYTES + 1))
            async with setup.session.post(f"{setup.url}/v1/completions", data=large, headers=JSON) as response:
                assert response.status == 413
            assert not prefill.bodies
            assert not decode.bodies

    run(test())


def test_a_large_prompt_passes():
    async def test() -> None:
        decode = Backend(answer)
        async with routed([Backend(answer)], [decode]) as setup:
            prompt = "x" * (2 << 20)
            large = BytesIO(json.dumps({"prompt": prompt}).encode())
            async with setup.session.post(f"{setup.url}/v1/completions", data=large, headers=JSON) as response:
                assert response.status == 200
            assert decode.bodies[0]["prompt"] == prompt

    run(test())


def test_merged_routes():
    async def test() -> None:
        prefill, decodes = Backend(answer), [Backend(answer), Backend(answer)]
        async with routed([prefill], decodes) as setup:
            assert (await setup.get("/v1/models"))["data"] == [{"id": "m"}]
            info = await setup.get("/get_server_info")
            assert info == await setup.get("/server_info")
            assert [worker["info"] for worker in info["decode"]] == [{"model": "m"}] * 2
            assert info["prefill"][0]["url"] == setup.urls[prefill]

    run(test())


def test_requests_at_once_are_bounded():
    async def test() -> None:
        decode = Backend(hang)
        async with routed([Backend(answer)], [decode], max_concurrent_requests=1) as setup:
            asking = asyncio.create_task(setup.session.post(f"{setup.url}/v1/completions", json={"prompt": "x"}))
            await decode.arrived.wait()
            assert (await setup.post(429))["error"]["code"] == "overloaded"
            asking.cancel()
            await decode.cancelled.wait()

    run(test())


def test_a_pair_of_api_servers_behind_a_router():
    async def test() -> None:
        registry = Registry()
        route = Route(instance="i", group="g", address="tcp://127.0.0.1:41000", layout_digest="", http_port=1)
        registry.register(route, 0.0)
        engines = {
            "prefill": ScriptedEngine(lambda _request: spell("h", finish_reason="length")),
            "decode": ScriptedEngine(lambda _request: spell("hello")),
        }
        async with AsyncExitStack() as closing:
            lookup = await closing.enter_async_context(RegistryClient(attempts=1))
            bootstrap = await closing.enter_async_context(serving(registry_app(registry, clock=lambda: 0.0)))
            urls = {}
            for role, engine in engines.items():
                config = ApiConfig(model="m", max_positions=100, mode=role)
                server = ApiServer(engine, CharacterTokenizer(), config, registry=lookup)
                urls[role] = await closing.enter_async_context(serving(server.app))
            workers = (
                parse_worker("prefill", [urls["prefill"], bootstrap.rpartition(":")[2]]),
                parse_worker("decode", [urls["decode"]]),
            )
            router = Router(RouterConfig(workers=workers))
            url = await closing.enter_async_context(serving(router.app))
            session = await closing.enter_async_context(aiohttp.ClientSession())
            setup = Setup(router, session, url, {})
            assert (await setup.post())["choices"][0]["text"] == "hello"
            (one,), (two,) = engines["prefill"].requests, engines["decode"].requests
            assert one.room == two.room
            assert two.sources == ("tcp://127.0.0.1:41000",)
            assert not engines["prefill"].aborted
            engines["prefill"].script = lambda _request: []
            engines["decode"].script = lambda _request: []
            asking = asyncio.create_task(session.post(f"{url}/v1/completions", json={"prompt": "x", "stream": True}))
            await engines["prefill"].until(lambda: bool(engines["prefill"].live))
            await engines["decode"].until(lambda: bool(engines["decode"].live))
            asking.cancel()
            await engines["prefill"].until(lambda: bool(engines["prefill"].aborted))
            await engines["decode"].until(lambda: bool(engines["decode"].aborted))

    run(test())


@pytest.mark.parametrize("mode", ["prefill", "decode", "null"])
def test_a_server_that_is_taken_for_the_other_half_refuses(mode):
    """A router whose --prefill and --decode were swapped got HTTP 200 with an empty text."""

    async def test() -> None:
        engine = ScriptedEngine(lambda _request: spell("hello"))
        server = ApiServer(engine, CharacterTokenizer(), ApiConfig(model="m", max_positions=100, mode=mode))
        async with serving(server.app) as url, aiohttp.ClientSession() as session:
            body = {"prompt": "x", "bootstrap_room": 7}
            headers = {"X-KVBaton-Role": "decode" if mode == "prefill" else "prefill"}
            async with session.post(f"{url}/v1/completions", json=body, headers=headers) as response:
                error = (await response.json())["error"]
                assert (response.status, error["code"]) == (503, "incompatible")
            assert f"this is a {mode} server" in error["message"]
            assert not engine.requests

    run(test())


def test_a_worker_that_fails_every_request_is_tried_ever_less_and_comes_back(caplog):
    async def test() -> None:
        bad, good = Backend(fail(502, "internal", "another dtype")), Backend(answer)
        settings = {"cb_failure_threshold": 3, "cb_timeout_duration_secs": 0.2}
        async with routed([Backend(answer)], [bad, good], **settings) as setup:
            worker = next(worker for worker in setup.router.workers.all if worker.url == setup.urls[bad])
            while not worker.breaker.is_open:
                assert await setup.post() == ANSWER
            assert len(bad.bodies) == 3
            line = f'kvbaton_router_worker_circuit_open{{role="decode",worker="{setup.urls[bad]}"}}'
            assert await setup.metric(line) == 1
            (warning,) = (record for record in caplog.records if "fails every request" in record.message)
            assert "another dtype" in warning.message
            assert setup.urls[bad] in warning.message
            bad.behave = answer
            while worker.breaker.is_open:  # until a trial is due
                assert await setup.post() == ANSWER
            assert await setup.metric(line) == 0

    run(test())


def test_a_circuit_makes_no_outage_of_its_own():
    async def test() -> None:
        only = Backend(fail(500, "internal", "a bug"))
        async with routed([Backend(answer)], [only], cb_failure_threshold=1, cb_timeout_duration_secs=99.0) as setup:
            for _ in range(3):
                await setup.post(500)
            assert len(only.bodies) == 3
            only.behave = answer
            assert await setup.post() == ANSWER

    run(test())


def test_what_a_worker_refuses_that_the_router_wrote_is_not_the_clients_mistake():
    async def refuse(_request: web.Request, _body: dict) -> web.StreamResponse:
        error = {"message": "bootstrap_host: not on the list", "type": "t", "code": "config", "param": "bootstrap_host"}
        return web.json_response({"error": error}, status=400)

    async def test() -> None:
        async with routed([Backend(hang)], [decode := Backend(refuse)]) as setup:
            error = (await setup.post(502))["error"]
            assert error["message"].startswith(f"decode {setup.urls[decode]}: bootstrap_host")

    run(test())


def test_what_a_worker_refuses_that_the_client_wrote_is_its_mistake_under_any_name():
    async def refuse(_request: web.Request, _body: dict) -> web.StreamResponse:
        name = "disagg_prefill_dp_rank"
        error = {"message": f"{name}: Expected `int`", "type": "t", "code": "config", "param": name}
        return web.json_response({"error": error}, status=400)

    async def test() -> None:
        several = [Backend(refuse), Backend(refuse)]
        async with routed(several, [Backend(hang)]) as setup:
            await setup.post(400)
            assert sum(len(one.bodies) for one in several) == 1

    run(test())


def test_headers_that_pass_and_come_back():
    async def test() -> None:
        trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        seen = []

        async def behave(request: web.Request, body: dict) -> web.StreamResponse:
            seen.append(request.headers)
            response = await answer(request, body)
            response.headers.update({"X-Tenant": "t", "X-Other": "o", "Set-Cookie": "s"})
            return response

        prefill, decode = Backend(behave), Backend(behave)
        async with routed([prefill], [decode], forward_header=("X-Tenant",)) as setup:
            headers = {"X-Request-Id": "mine", "traceparent": trace, "X-Tenant": "t1", "X-Other": "o1", "Cookie": "c=1"}
            async with setup.session.post(
                f"{setup.url}/v1/completions", json={"prompt": "x"}, headers=headers
            ) as response:
                assert response.status == 200
                told = response.headers
            for one in seen:
                assert (one["X-Request-Id"], one["traceparent"], one["X-Tenant"]) == ("mine", trace, "t1")
                assert not [name for name in ("X-Other", "Cookie") if name in one]
            assert (told["X-Request-Id"], told["X-Tenant"]) == ("mine", "t")
            assert not [name for name in ("X-Other", "Set-Cookie") if name in told]
            assert told["X-KVBaton-Prefill"] == setup.urls[prefill]
            assert told["X-KVBaton-Decode"] == setup.urls[decode]
            async with setup.session.get(f"{setup.url}/nowhere") as response:
                assert response.headers["X-Request-Id"]

    run(test())


@pytest.mark.parametrize("name", ["Authorization", "cookie", "Content-Length", "X-KVBaton-Room", "a b", "", "Host"])
def test_headers_that_never_pass(name):
    with pytest.raises(ConfigError, match="--forward-header"):
        PassedHeaders([name])


def test_workers_come_and_go_at_run_time_and_what_was_asked_goes_on():
    async def test() -> None:
        go = asyncio.Event()

        async def slow(request: web.Request, body: dict) -> web.StreamResponse:
            await go.wait()
            return await answer(request, body)

        old, new = Backend(slow), Backend(answer)
        async with routed([Backend(answer)], [old]) as setup, serving(new.app) as url:
            asking = asyncio.create_task(setup.post())
            await old.arrived.wait()
            for _ in range(2):
                async with setup.session.post(
                    f"{setup.url}/workers", json={"url": url, "worker_type": "decode"}
                ) as response:
                    told = await response.json()
            assert (response.status, told["error"]["param"]) == (400, "url")  # the second time
            await setup.router.workers.probe_all()
            listed = await setup.get("/workers")
            assert (listed["total"], listed["stats"]) == (3, {"prefill_count": 1, "decode_count": 2})
            one, two = listed["workers"][1:]
            assert (one["url"], one["load"], one["is_healthy"]) == (setup.urls[old], 1, True)
            assert (two["url"], two["load"], two["is_healthy"]) == (url, 0, True)
            async with setup.session.delete(f"{setup.url}/workers/{one['id']}") as response:
                assert (response.status, (await response.json())["worker_id"]) == (202, one["id"])
            async with setup.session.delete(f"{setup.url}/workers/{one['id']}") as response:
                assert response.status == 404
            for _ in range(3):
                assert await setup.post() == ANSWER
            assert (len(old.bodies), len(new.bodies)) == (1, 3)
            go.set()
            assert await asking == ANSWER
            assert setup.router.workers._leaving
            setup.router.workers._unanswered[setup.router.workers._leaving[0]] = 1
            await setup.router.workers.probe_all()
            assert not setup.router.workers._leaving
            assert not setup.router.workers._unanswered

    run(test())


@pytest.mark.parametrize(
    "body", [{}, {"url": "ftp://x", "worker_type": "decode"}, {"url": "http://x", "worker_type": "regular"}]
)
def test_what_cannot_be_added(body):
    async def test() -> None:
        async with routed([Backend(answer)], [Backend(answer)]) as setup:
            async with setup.session.post(f"{setup.url}/workers", json=body) as response:
                assert response.status == 400
            assert len(setup.router.workers.all) == 2

    run(test())


def test_workers_are_for_operators():
    async def test() -> None:
        secret = "a secret of enough characters"
        async with routed([Backend(answer)], [Backend(answer)], secret=secret) as setup:
            for method, path in (("GET", "/workers"), ("POST", "/workers"), ("DELETE", "/workers/x")):
                async with setup.session.request(method, setup.url + path, json={}) as response:
                    assert response.status == 401
            headers = {"Authorization": f"Bearer {secret}"}
            async with setup.session.get(f"{setup.url}/workers", headers=headers) as response:
                assert response.status == 200

    run(test())


@contextmanager
def no_file_left():
    """This process may open no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        yield
    finally:
        for one in taken:
            os.close(one)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_router_without_files_blames_no_worker():
    async def test() -> None:
        async with routed([Backend(answer)], [Backend(answer)]) as setup:
            router = setup.router
            await router._session.close()
            async with aiohttp.ClientSession() as router._session, aiohttp.ClientSession() as router.workers._session:
                pair = Pair(*router.workers.all, 7)
                with no_file_left():
                    for _ in range(3):
                        await router.workers.probe_all()
                    async with router._call("/v1/completions", {}, pair, {}) as call:
                        with pytest.raises(CallFailed) as caught:
                            await call.answer()
            assert (caught.value.status, caught.value.detail.code) == (429, "overloaded")
            assert not caught.value.is_suspicious
            assert all(worker.usable for worker in router.workers.all)

    run(test())


def test_connections_that_find_no_file_are_one_line_and_a_count(caplog, monkeypatch):
    monkeypatch.setattr("kvbaton.serving.server.loop_errors.SECONDS", 0.05)

    async def test() -> None:
        async with routed([Backend(answer)], [Backend(answer)]) as setup:
            host, _, port = setup.url.removeprefix("http://").rpartition(":")
            with contextlib.ExitStack() as clients:
                asking = [clients.enter_context(socket.socket()) for _ in range(20)]
                with no_file_left():
                    for client in asking:
                        client.setblocking(False)
                        client.connect_ex((host, int(port)))
                    while not any("more attempts" in record.message for record in caplog.records):
                        await asyncio.sleep(0)
            first, *more = (record.message for record in caplog.records if record.levelno >= logging.WARNING)
            assert "cannot be accepted" in first
            assert all("more attempts to accept" in message for message in more)
            async with aiohttp.ClientSession() as session, session.get(f"{setup.url}/ready") as response:
                assert response.status == 200

    run(test())


def test_the_gate_is_sized_by_the_limit_of_files(caplog):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))

    async def test() -> None:
        async with routed([Backend(answer)], [Backend(answer)], max_concurrent_requests=1000) as setup:
            assert f"of {affordable_requests()} inside" in repr(setup.router.admission)
            assert affordable_requests() * 4 < 512
            assert "the limit of open files allows no more" in caplog.text

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lifecycle, "raise_file_limit", lambda: None)
            run(test())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_rooms_are_positive_63_bit_numbers():
    rooms = {mint_room() for _ in range(1000)}
    assert len(rooms) == 1000
    assert all(0 < room < 1 << 63 for room in rooms)


def test_strip():
    raw = msgspec.Raw(b"1")
    fields = {"prompt": raw, "bootstrap_room": raw, "bootstrap_pair_key": raw, "disagg_anything": raw}
    assert strip({**fields, "kv_transfer_params": raw}) == {"prompt": raw}
    ranks = {"data_parallel_rank": raw, "disagg_prefill_dp_rank": raw}
    assert strip(ranks) == ranks


@pytest.mark.parametrize(
    ("role", "values"),
    [
        ("prefill", ["ftp://x"]),
        ("prefill", ["127.0.0.1:3000"]),
        ("prefill", ["http://"]),
        ("prefill", ["http://h:99999"]),
        ("prefill", ["http://h", "x"]),
        ("prefill", ["http://h", "²"]),
        ("prefill", ["http://h", "0"]),
        ("prefill", ["http://h", "1", "2"]),
        ("prefill", ["http://h/path"]),
        ("decode", ["http://h", "8998"]),
        ("decode", ["http://user@h"]),
    ],
)
def test_what_is_no_worker(role, values):
    with pytest.raises(ConfigError, match=f"--{role}"):
        parse_worker(role, values)


def test_workers_are_parsed():
    worker = parse_worker("prefill", ["http://10.0.0.1:30000/", "9000"])
    assert (worker.url, worker.host, worker.bootstrap_port) == ("http://10.0.0.1:30000", "10.0.0.1", 9000)
    assert parse_worker("prefill", ["http://[::1]:1"]).host == "::1"
    assert parse_worker("decode", ["http://h"]).bootstrap_port == 8998


def test_a_router_needs_both_roles_and_no_doubles():
    prefill, decode = Worker("prefill", "http://a"), Worker("decode", "http://b")
    for workers, message in [
        ((prefill,), "at least one --decode"),
        ((decode,), "at least one --prefill"),
        ((prefill, decode, Worker("decode", "http://b")), "http://b twice"),
    ]:
        with pytest.raises(ConfigError, match=message):
            RouterConfig(workers=workers)


def test_listening_twice_at_one_port_is_refused():
    async def test() -> None:
        async with serving(Backend(answer).app) as url:
            with pytest.raises(ConfigError, match="is in use"):
                reserve("127.0.0.1", int(url.rpartition(":")[2]))
        with reserve("127.0.0.1", 0) as bound:
            runner = await listen(Backend(answer).app, bound)
            await runner.cleanup()

    run(test())


def test_a_worker_that_drops_what_it_is_asked_gets_ever_less_although_it_answers_probes(caplog):
    async def test() -> None:
        bad = Backend(vanish)
        settings = {"cb_failure_threshold": 3, "cb_timeout_duration_secs": 99.0}
        async with routed([Backend(answer)], [bad, Backend(answer)], **settings) as setup:
            for _ in range(12):
                assert await setup.post() == ANSWER
                await setup.router.workers.probe_all()  # which puts it straight back in
            assert len(bad.bodies) == 3
            assert any("fails every request with peer_lost" in record.message for record in caplog.records)

    run(test())


def test_all_that_one_death_breaks_off_is_one_failure_and_a_new_process_begins_anew():
    async def test() -> None:
        worker = Worker("decode", "http://d")
        workers = Workers([worker], None, breakers=BreakerSettings(failure_threshold=2))
        workers._probe_soon = lambda: None
        for _ in range(10):
            worker.become(State.READY)
            worker.breaker = Breaker(BreakerSettings(failure_threshold=2))
            for _ in range(30):
                workers.suspect(worker, "peer_lost", "it broke off")
            assert not worker.breaker.is_open
        for _ in range(2):
            worker.become(State.READY)
            workers.suspect(worker, "draining", "it is stopping")
        assert not worker.breaker.is_open
        worker.become(State.READY)
        workers.suspect(worker, "peer_lost", "it broke off")
        assert worker.breaker.is_open

    run(test())


def told_in_stream(raw: bytes) -> list[bytes]:
    return [block for block in raw.split(b"\n\n") if block]


def test_a_stream_with_nothing_to_say_is_kept_alive_by_comments():
    async def test() -> None:
        go = asyncio.Event()

        async def queued(request: web.Request, body: dict) -> web.StreamResponse:
            await go.wait()
            return await stream(request, body)

        async with routed([Backend(answer)], [Backend(queued)], sse_keep_alive_secs=0.02) as setup:
            asked = {"prompt": "x", "stream": True}
            async with setup.session.post(f"{setup.url}/v1/completions", json=asked) as response:
                assert response.headers["Content-Type"].startswith("text/event-stream")
                for _ in range(2):
                    assert await response.content.readuntil(b"\n\n") == b": keep-alive\n\n"
                go.set()
                blocks = told_in_stream(await response.read())
            assert [block + b"\n\n" for block in blocks if not block.startswith(b":")] == list(EVENTS)

    run(test())


def test_what_fails_behind_comments_is_tried_elsewhere_and_is_an_event_at_last():
    async def test() -> None:
        go = asyncio.Event()

        async def late_failure(request: web.Request, body: dict) -> web.StreamResponse:
            await go.wait()
            return await fail(500, "internal", "it broke")(request, body)

        bad, good = Backend(late_failure), Backend(stream)
        async with routed([Backend(answer)], [bad, good], sse_keep_alive_secs=0.02) as setup:
            for events in (list(EVENTS), None):
                go.clear()
                good.behave = stream if events else fail(500, "internal", "this one, too")
                asked = {"prompt": "x", "stream": True}
                async with setup.session.post(f"{setup.url}/v1/completions", json=asked) as response:
                    assert await response.content.readuntil(b"\n\n") == b": keep-alive\n\n"
                    go.set()
                    blocks = told_in_stream(await response.read())
                assert response.status == 200
                blocks = [block for block in blocks if not block.startswith(b":")]
                if events:
                    assert [block + b"\n\n" for block in blocks] == events
                else:
                    assert json.loads(blocks[-1].removeprefix(b"data: "))["error"]["code"] == "internal"

    run(test())


@asynccontextmanager
async def serving_tls(app: web.Application) -> AsyncIterator[str]:
    """Behind a certificate that only ``worker.pem`` vouches for."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(CERTIFICATE)
    runner = web.AppRunner(app)
    await runner.setup()
    with reserve("127.0.0.1", 0) as bound:
        try:
            await web.SockSite(runner, bound, ssl_context=context).start()
            yield f"https://127.0.0.1:{port_of(bound)}"
        finally:
            await runner.cleanup()


@pytest.mark.parametrize("trusted", [True, False])
def test_https_workers(trusted):
    async def test() -> None:
        prefill, decode = Backend(answer), Backend(answer)
        async with serving_tls(prefill.app) as one, serving_tls(decode.app) as two:
            workers = (parse_worker("prefill", [one]), parse_worker("decode", [two]))
            router = Router(RouterConfig(workers=workers, ca_cert_path=CERTIFICATE if trusted else None))
            async with serving(router.app) as url, aiohttp.ClientSession() as session:
                await router.workers.probe_all()
                async with session.post(f"{url}/v1/completions", json={"prompt": "x"}) as response:
                    assert response.status == (200 if trusted else 503)
                    told = await response.json()
            if not trusted:
                assert "certificate" in told["error"]["message"].lower()
                assert not decode.bodies

    run(test())


def test_a_file_without_certificates_is_refused_by_the_option_that_named_it(tmp_path):
    workers = (parse_worker("prefill", ["http://p:1"]), parse_worker("decode", ["http://d:1"]))
    (tmp_path / "empty.pem").touch()

    async def test(name: str) -> None:
        with pytest.raises(ConfigError, match=f"--ca-cert-path .*{name} has no certificates"):
            Router(RouterConfig(workers=workers, ca_cert_path=tmp_path / name))

    run(test("empty.pem"))
    run(test("missing.pem"))


def test_a_start_ends_with_the_first_pair_or_with_every_trouble():
    async def test() -> None:
        async with routed([Backend(answer)], [Backend(answer)]) as setup:
            await setup.router.workers.started(5.0)
        workers = (parse_worker("prefill", ["http://127.0.0.1:9"]), parse_worker("decode", ["http://127.0.0.1:9"]))
        router = Router(RouterConfig(workers=workers))
        async with serving(router.app):
            with pytest.raises(PeerLostError, match=r"no prefill and no decode server takes requests within 0.1 s"):
                await router.workers.started(0.1)

    run(test())


def test_a_worker_without_a_port_is_asked_at_the_one_of_its_scheme():
    assert parse_worker("decode", ["https://d"]).audience == "d:443"
    assert parse_worker("decode", ["http://d"]).audience == "d:80"


class Names(AbstractResolver):
    """DNS of one name."""

    def __init__(self) -> None:
        self.address = "127.0.0.1"

    async def resolve(self, host: str, port: int = 0, family: int = 0) -> list[ResolveResult]:
        return [
            ResolveResult(
                hostname=host, host=self.address, port=port, family=family or socket.AF_INET, proto=0, flags=0
            )
        ]

    async def close(self) -> None: ...


def test_a_worker_that_is_given_by_name_is_followed_to_another_address(monkeypatch):
    names = Names()
    monkeypatch.setattr("aiohttp.connector.DefaultResolver", lambda **_: names)
    monkeypatch.setattr("kvbaton.serving.router.router.RESOLVED_SECONDS", 0)

    async def test() -> None:
        before, after = Backend(answer), Backend(answer)
        async with serving(before.app) as url, AsyncExitStack() as closing:
            port = int(url.rpartition(":")[2])
            runner = web.AppRunner(after.app)
            await runner.setup()
            closing.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.2", port).start()
            prefill = await closing.enter_async_context(serving(Backend(answer).app))
            workers = (Worker("prefill", prefill), Worker("decode", f"http://decode.test:{port}"))
            router = Router(RouterConfig(workers=workers, health_check_interval_secs=60.0))
            async with serving(router.app), aiohttp.ClientSession():
                await router.workers._probe_once()
                assert (before.probed.qsize(), after.probed.qsize()) == (1, 0)
                names.address = "127.0.0.2"
                await router.workers.probe_all()
                assert (before.probed.qsize(), after.probed.qsize()) == (1, 1)

    run(test())


def test_a_router_that_never_gets_a_pair_ends_with_the_reason():
    async def test() -> None:
        loading = Backend(answer)
        loading.ready = 503
        async with routed([Backend(answer)], [loading]) as setup:
            with pytest.raises(PeerLostError, match=r"no decode server .* within 0.05 s .*still loading"):
                await setup.router.workers.started(0.05)
            loading.ready = 200
            await setup.router.workers.probe_all()
            await setup.router.workers.started(0.05)

    run(test())

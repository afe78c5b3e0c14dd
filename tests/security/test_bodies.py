"""Work before proof: what a body can cost before anybody has shown that it may be sent, or that it can be served."""

from __future__ import annotations

import asyncio
import gc
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from io import BytesIO

import aiohttp
import msgspec
import pytest
from aiohttp import web

from kvbaton.discovery.access import ROUTER_HEADER, token_of
from kvbaton.discovery.client import RegistryClient
from kvbaton.discovery.names import audience_of_url
from kvbaton.errors import ConfigError, RegistryError
from kvbaton.serving.router.client_fields import client_fields
from kvbaton.serving.router.router import Router, RouterConfig
from kvbaton.serving.router.worker import Worker
from kvbaton.serving.server.api import ApiServer
from kvbaton.serving.server.bodies import MAX_BODY_BYTES
from kvbaton.serving.server.fields import FieldRule
from kvbaton.serving.server.openai import ChatRequest, CompletionRequest
from kvbaton.serving.server.parsing import parse
from kvbaton.serving.server.request_parsing import ApiConfig, Mode
from kvbaton.serving.server.sglang import GenerateRequest
from kvbaton.serving.server.tokens import ServerTokenizer
from kvbaton.serving.testing.engine import CharacterTokenizer, ScriptedEngine, spell
from kvbaton.serving.testing.http import run, serving

SECRET = "kX7-a-secret-that-must-stay-one-Q2w"
LARGE = MAX_BODY_BYTES - (1 << 20)
#: Most bytes that a body may become before it is refused, one copy of it included: counted, not timed. Each attack made
#: 90 MB of objects and more, for seconds.
MOST_BYTES = LARGE + (4 << 20)
POSITIONS = 4096


def filled(start: bytes, piece: bytes, end: bytes, size: int = LARGE) -> bytes:
    """A body of about ``size`` bytes: ``piece`` again and again, with commas."""
    return start + b",".join([piece] * ((size - len(start) - len(end)) // (len(piece) + 1))) + end


def served(payload: bytes, kind: type[CompletionRequest] | type[ChatRequest] | type[GenerateRequest]) -> None:
    request = parse(payload, kind)
    if isinstance(request, GenerateRequest):
        request.asked([(1,)])
        return
    if isinstance(request, CompletionRequest):
        request.prompts(POSITIONS)
        request.meetings(1, 1)
    request.sampling(max_tokens=1)
    if isinstance(request, ChatRequest):
        request.template_options()


@contextmanager
def frugal() -> Iterator[None]:
    """What happens here makes few objects."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()


CHAT = b'{"messages":[{"role":"user","content":"q"}],'
MATERIALISED = {
    "tools of empty lists": (ChatRequest, filled(CHAT + b'"tools":[', b"[]", b"]}")),
    "a bias of empty keys": (CompletionRequest, filled(b'{"prompt":"a","logit_bias":{', b'"1":0', b"}}")),
    "token ids": (CompletionRequest, filled(b'{"prompt":[', b"1", b"]}")),
    "texts": (CompletionRequest, filled(b'{"prompt":[', b'""', b"]}")),
    "a text, then token ids": (CompletionRequest, filled(b'{"prompt":["",', b"1", b"]}")),
    "texts with escapes": (CompletionRequest, filled(b'{"prompt":[', b'"\\\\"', b"]}")),
    "prompts of token ids": (CompletionRequest, filled(b'{"prompt":[', b"[1]", b"]}")),
    "token ids of two prompts": (CompletionRequest, filled(b'{"prompt":[[', b"1", b"],[1]]}")),
    "tokens that stop": (CompletionRequest, filled(b'{"prompt":"a","stop_token_ids":[', b"1", b"]}")),
    "rooms": (CompletionRequest, filled(b'{"prompt":"a","bootstrap_room":[', b"1", b"]}")),
    "arguments of a template": (ChatRequest, filled(CHAT + b'"chat_template_kwargs":{', b'"a":1', b"}}")),
    "flags of prompts": (GenerateRequest, filled(b'{"text":"a","return_logprob":[', b"true", b"]}")),
    "sampling of prompts": (GenerateRequest, filled(b'{"text":"a","sampling_params":[', b"{}", b"]}")),
    "sampling of many prompts": (GenerateRequest, filled(b'{"text":"a","sampling_params":[', b"{}", b"]}", 200 << 10)),
    "a schema": (ChatRequest, filled(CHAT + b'"response_format":{', b'"a":1', b"}}")),
}


@pytest.mark.parametrize("name", MATERIALISED)
def test_millions_of_small_values_are_refused_without_becoming_objects(name: str) -> None:
    kind, payload = MATERIALISED[name]
    with frugal(), pytest.raises(ConfigError):
        served(payload, kind)


DISTINCT = b",".join(b'"f%d":0' % number for number in range(1_000_000))


def test_a_million_unknown_fields_become_no_objects() -> None:
    body = b'{"prompt":"a",' + DISTINCT + b"}"
    counted: list[str] = []
    with frugal():
        assert parse(body, CompletionRequest, FieldRule(count=counted.append)).prompts(1) == ["a"]
    assert counted == ["f0"]
    with frugal(), pytest.raises(ConfigError, match="f0"):
        parse(body, CompletionRequest, FieldRule(strict=True))


def test_nor_at_the_router() -> None:
    body = b'{"prompt":"a",' + DISTINCT + b"}"
    with frugal():
        fields, _ = client_fields(body)
    assert fields.keys() == {"prompt", "rid"}
    with frugal(), pytest.raises(ConfigError, match="f0"):
        client_fields(body, FieldRule(strict=True))


@asynccontextmanager
async def half(mode: Mode = "prefill", max_requests: int = 4) -> AsyncIterator[tuple[ScriptedEngine, str]]:
    engine = ScriptedEngine(lambda _request: spell("hi"))
    secret = SECRET if mode != "null" else None
    config = ApiConfig(model="m", max_positions=POSITIONS, mode=mode, max_requests=max_requests)
    async with serving(ApiServer(engine, CharacterTokenizer(), config, secret=secret).app) as url:
        yield engine, url


def address(url: str) -> tuple[str, int]:
    return "127.0.0.1", int(url.rpartition(":")[2])


def head(path: str, length: int, headers: str = "") -> bytes:
    json_type = "Content-Type: application/json\r\n"
    return f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{json_type}{headers}Content-Length: {length}\r\n\r\n".encode()


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_half_a_pair_answers_a_stranger_from_the_headers(mode: Mode) -> None:
    """Not a byte of the body is sent, and the answer is there."""

    async def test() -> None:
        async with half(mode) as (engine, url):
            for path in ("/v1/completions", "/v1/chat/completions", "/abort_request"):
                reader, writer = await asyncio.open_connection(*address(url))
                writer.write(head(path, LARGE))
                async with asyncio.timeout(2):
                    assert b" 401 " in await reader.readline(), path
                writer.close()
            assert not engine.requests

    run(test())


async def hold(url: str, count: int, headers: str = "") -> list[asyncio.StreamWriter]:
    """Posts that send one byte of their body."""
    writers = []
    for _ in range(count):
        _, writer = await asyncio.open_connection(*address(url))
        writer.write(head("/v1/completions", 100, headers) + b"{")
        await writer.drain()
        writers.append(writer)
    await asyncio.sleep(0)
    return writers


def test_requests_whose_body_does_not_come_hold_no_place() -> None:
    async def test() -> None:
        async with half("null") as (_, url), aiohttp.ClientSession() as session:
            writers = await hold(url, 16)
            async with session.get(f"{url}/get_server_info") as response:
                assert (await response.json())["requests"] == 0
            async with session.post(f"{url}/v1/completions", json={"prompt": "a"}) as response:
                assert response.status == 200, await response.text()
            for writer in writers:
                writer.close()

    run(test())


def test_nor_do_they_at_the_router() -> None:
    async def answer(http: web.Request) -> web.Response:
        await http.read()
        return web.json_response({"choices": []})

    worker = web.Application()
    worker.router.add_post("/v1/completions", answer)
    worker.router.add_get("/ready", answer)

    async def test() -> None:
        async with serving(worker) as one:
            workers = (Worker("prefill", one, 1), Worker("decode", one))
            router = Router(RouterConfig(workers=workers, health_check_interval_secs=60.0, max_concurrent_requests=4))
            async with serving(router.app) as url, aiohttp.ClientSession() as session:
                await router.workers.probe_all()
                writers = await hold(url, 16)
                async with session.post(f"{url}/v1/completions", json={"prompt": "a"}) as response:
                    assert response.status == 200, await response.text()
                for rid, status in ((None, 200), ("good", 200), ("", 400), (7, 400), ([], 400), ("ä", 400)):
                    async with session.post(f"{url}/v1/completions", json={"prompt": "a", "rid": rid}) as response:
                        assert response.status == status, (rid, await response.text())
                for writer in writers:
                    writer.close()

    run(test())


def test_a_body_that_the_router_takes_is_never_too_large_for_a_worker() -> None:
    sizes: list[int] = []

    async def answer(http: web.Request) -> web.Response:
        sizes.append(len(await http.read()))
        return web.json_response({"choices": []})

    worker = web.Application(client_max_size=1 << 30)
    worker.router.add_post("/v1/completions", answer)
    worker.router.add_get("/ready", answer)

    async def test() -> None:
        async with serving(worker) as one:
            workers = (Worker("prefill", one, 1), Worker("decode", one))
            router = Router(RouterConfig(workers=workers, health_check_interval_secs=60.0))
            async with serving(router.app) as url, aiohttp.ClientSession() as session:
                await router.workers.probe_all()
                for spare in (0, 1 << 12, 1 << 16, 1 << 17):
                    prompt = "a" * (MAX_BODY_BYTES - spare - len('{"prompt":""}'))
                    body = msgspec.json.encode({"prompt": prompt})
                    async with session.post(f"{url}/v1/completions", data=BytesIO(body), headers=JSON) as response:
                        assert response.status in (200, 413)
        assert sizes
        assert max(sizes) <= MAX_BODY_BYTES

    run(test())


def test_a_body_that_a_worker_refuses_is_gone_with_its_answer() -> None:
    """Six of 16 MiB, again and again, were 668 MiB of a router: each was kept until the collector came."""

    async def answer(http: web.Request) -> web.Response:
        await http.read()
        return web.json_response({"error": {"message": "no", "type": "t", "code": "config"}}, status=400)

    async def ready(_http: web.Request) -> web.Response:
        return web.json_response({})

    worker = web.Application(client_max_size=1 << 30)
    worker.router.add_post("/v1/completions", answer)
    worker.router.add_get("/ready", ready)
    prompt = "a" * (1 << 20)

    async def test() -> None:
        async with serving(worker) as one:
            workers = (Worker("prefill", one, 1), Worker("decode", one))
            router = Router(RouterConfig(workers=workers, health_check_interval_secs=60.0))
            async with serving(router.app) as url, aiohttp.ClientSession() as session:
                await router.workers.probe_all()
                body = msgspec.json.encode({"prompt": prompt})
                tracemalloc.start()
                for _ in range(16):
                    async with session.post(f"{url}/v1/completions", data=BytesIO(body), headers=JSON) as response:
                        assert response.status == 400, await response.text()
                assert tracemalloc.get_traced_memory()[0] < 8 * len(body)

    gc.collect()
    gc.disable()
    try:
        run(test())
    finally:
        tracemalloc.stop()
        gc.enable()


JSON = {"Content-Type": "application/json"}


def test_an_over_long_model_is_not_said_again_whole() -> None:
    async def test() -> None:
        async with half("null") as (_, url), aiohttp.ClientSession() as session:
            body = {"prompt": "a", "model": "m" * 100_000}
            async with session.post(f"{url}/v1/completions", json=body) as response:
                assert response.status == 404
                assert len(await response.read()) < 1000

    run(test())


def test_a_registry_answer_is_not_decompressed() -> None:
    asked = []

    async def bomb(http: web.Request) -> web.Response:
        asked.append(http.path)
        response = web.Response(body=b"[" * (64 << 10), content_type="application/json")
        response.enable_compression(web.ContentCoding.gzip)
        return response

    app = web.Application()
    app.router.add_get("/route", bomb)

    async def test() -> None:
        async with serving(app) as url, RegistryClient(attempts=1) as client:
            with pytest.raises(RegistryError) as caught:
                await client.topology(*address(url))
            assert "trailing" in str(caught.value) or "invalid" in str(caught.value)
            assert "recursion" not in str(caught.value).lower(), "what was read had been decompressed"
        assert asked

    run(test())


class Templates:
    """A tokenizer of transformers with a chat template."""

    def __init__(self, template: str) -> None:
        from transformers.utils.chat_template_utils import render_jinja_template

        self.chat_template = template
        self._render: Callable[..., tuple[list[str], object]] = render_jinja_template

    def apply_chat_template(self, turns: list[dict[str, str]], *, tokenize: bool, **options: bool) -> str:
        assert not tokenize
        rendered, _ = self._render([turns], chat_template=self.chat_template, **options)
        return rendered[0]

    def encode(self, text: str, **_options: bool) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, tokens: list[int], **_options: bool) -> str:
        return "".join(map(chr, tokens))


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a * b %}{% endfor %}{% endfor %}"


def test_a_template_that_loops_is_ended_and_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvbaton.serving.server.tokens.TEMPLATE_SECONDS", 1.0)

    async def test() -> None:
        tokenizer = ServerTokenizer(Templates(ENDLESS))
        engine = ScriptedEngine(lambda _request: spell("hi"))
        server = ApiServer(engine, tokenizer, ApiConfig(model="m", max_positions=POSITIONS))
        async with serving(server.app) as url, aiohttp.ClientSession() as session:
            body = {"messages": [{"role": "user", "content": "q"}]}
            asked = asyncio.create_task(session.post(f"{url}/v1/chat/completions", json=body))
            slowest, rounds = 0.0, 0
            while not asked.done():
                started = time.perf_counter()
                async with session.get(f"{url}/health") as response:
                    assert response.status == 200
                async with session.post(f"{url}/v1/completions", json={"prompt": "a", "logprobs": 0}) as response:
                    assert response.status == 200
                slowest, rounds = max(slowest, time.perf_counter() - started), rounds + 1
            async with await asked as response:
                assert (response.status, "takes more than 1 s" in await response.text()) == (400, True)
            assert rounds > 2
            assert slowest < 0.9

    run(test())


@pytest.mark.parametrize(
    "template", ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__ }}"]
)
def test_a_template_does_not_leave_its_sandbox(template: str) -> None:
    with pytest.raises(ConfigError, match="refuses"):
        ServerTokenizer(Templates(template)).encode_chat([{"role": "user", "content": "q"}])


def test_a_router_token_is_still_what_it_takes() -> None:
    async def test() -> None:
        async with half("prefill") as (engine, url), aiohttp.ClientSession() as session:
            headers = {ROUTER_HEADER: token_of(SECRET, "router", audience_of_url(url))}
            body = {"prompt": "a", "bootstrap_room": 7}
            async with session.post(f"{url}/v1/completions", json=body, headers=headers) as response:
                assert response.status == 200
            assert engine.requests

    run(test())

"""The API server over real HTTP, with an engine that answers as it is told."""

import asyncio
import json
import uuid
from contextlib import asynccontextmanager
from io import BytesIO

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbaton import errors
from kvbaton.discovery.client import RegistryClient
from kvbaton.discovery.registry import Registry, Route
from kvbaton.discovery.server import registry_app
from kvbaton.serving.engine.request import Handoff, Output
from kvbaton.serving.server import failure
from kvbaton.serving.server.allow import AllowList
from kvbaton.serving.server.api import MAX_BODY_BYTES, ApiServer
from kvbaton.serving.server.failure import DrainingError, status_of
from kvbaton.serving.server.openai import CHAT_MAX_TOKENS, COMPLETION_MAX_TOKENS
from kvbaton.serving.server.request_parsing import INLINE_CHARACTERS, ApiConfig
from kvbaton.serving.testing.engine import CharacterTokenizer, ScriptedEngine, spell, spell_all
from kvbaton.serving.testing.http import run, serving

CONFIG = ApiConfig(model="m", max_positions=4096)


JSON = {"Content-Type": "application/json"}


class Client:
    """One API server, its engine, and a session that speaks to it."""

    def __init__(self, engine: ScriptedEngine, server: ApiServer, session: aiohttp.ClientSession, url: str) -> None:
        self.engine = engine
        self.server = server
        self.session = session
        self.url = url

    async def post(self, path: str = "/v1/completions", status: int = 200, **fields: object) -> dict:
        async with self.session.post(self.url + path, json=fields) as response:
            body = await response.json()
            assert response.status == status, body
            return body

    async def get(self, path: str, status: int = 200) -> dict:
        async with self.session.get(self.url + path) as response:
            assert response.status == status
            return await response.json()

    async def events(self, path: str = "/v1/completions", **fields: object) -> list:
        async with self.session.post(self.url + path, json={"stream": True, **fields}) as response:
            assert response.status == 200, await response.text()
            assert response.headers["Content-Type"].startswith("text/event-stream")
            return decode_events(await response.read())

    async def metrics(self) -> str:
        async with self.session.get(f"{self.url}/metrics") as response:
            return await response.text()

    async def metric(self, line: str) -> float:
        found = [row for row in (await self.metrics()).splitlines() if row.startswith(line + " ")]
        return float(found[0].rpartition(" ")[2]) if found else 0.0


def usage(prompt: int, completion: int, cached: int = 0) -> dict:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def only(found: set[str]) -> str:
    (one,) = found
    return one


def decode_events(payload: bytes) -> list:
    blocks = payload.decode().split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") for block in blocks)
    return [block[6:] if block == "data: [DONE]" else json.loads(block[6:]) for block in blocks]


@asynccontextmanager
async def api(script=lambda _request: spell("hello"), config: ApiConfig = CONFIG, **arguments: object):
    engine = ScriptedEngine(script)
    server = ApiServer(engine, CharacterTokenizer(), config, **arguments)
    async with serving(server.app) as url, aiohttp.ClientSession() as session:
        yield Client(engine, server, session, url)


def test_a_completion():
    async def test() -> None:
        async with api() as client:
            body = await client.post(prompt="abc", max_tokens=9, temperature=0, stop=["x"], seed=4)
            assert body["object"] == "text_completion"
            assert body["model"] == "m"
            assert body["choices"] == [{"text": "hello", "finish_reason": "stop", "logprobs": None, "index": 0}]
            assert body["usage"] == usage(3, 5)
            (request,) = client.engine.requests
            assert request.prompt_tokens == (97, 98, 99)
            assert request.request_id == body["id"]
            assert (request.sampling.max_tokens, request.sampling.stop, request.sampling.seed) == (9, ("x",), 4)
            assert request.room is None
            assert not client.engine.aborted

    run(test())


def test_token_ids_and_logprobs_come_when_asked_for():
    async def test() -> None:
        async with api(lambda _request: spell("hi", finish_reason="length")) as client:
            body = await client.post(prompt=[1, 2], logprobs=0, return_token_ids=True)
            (choice,) = body["choices"]
            assert choice["token_ids"] == [ord("h"), ord("i")]
            assert choice["finish_reason"] == "length"
            assert choice["logprobs"] == {
                "tokens": ["h", "i"],
                "token_logprobs": [-0.5, -0.5],
                "text_offset": [0, 1],
                "top_logprobs": None,
            }
            assert client.engine.requests[0].prompt_tokens == (1, 2)
            assert client.engine.requests[0].sampling.max_tokens == COMPLETION_MAX_TOKENS

    run(test())


def test_a_chat():
    async def test() -> None:
        async with api() as client:
            path = "/v1/chat/completions"
            body = await client.post(path, messages=[{"role": "user", "content": "q"}], logprobs=True)
            assert body["object"] == "chat.completion"
            (choice,) = body["choices"]
            assert choice["message"] == {"role": "assistant", "content": "hello"}
            assert choice["logprobs"]["content"][0] == {
                "token": "h",
                "logprob": -0.5,
                "bytes": [104],
                "top_logprobs": [],
            }
            assert client.engine.requests[0].sampling.max_tokens == CHAT_MAX_TOKENS
            assert bytes(client.engine.requests[0].prompt_tokens) == b"<user>q<assistant>"
            for field in ("max_tokens", "max_completion_tokens"):
                await client.post(path, messages=[{"role": "user", "content": "q"}], **{field: 3})
                assert client.engine.requests[-1].sampling.max_tokens == 3

    run(test())


#: Two tokens, each with two alternatives; "i" is not among its own, and two tokens are spelt "e".
TOPS = [
    Output(tokens=(104,), text="h", logprobs=(-0.5,), top_logprobs=(((104, -0.5), (101, -2.0)),)),
    Output(
        tokens=(105,), text="i", logprobs=(-3.0,), top_logprobs=(((101, -0.25), (104, -1.5)),), finish_reason="stop"
    ),
]


def test_alternatives_in_each_format():
    async def test() -> None:
        async with api(lambda _request: TOPS) as client:
            body = await client.post(prompt="a", logprobs=2)
            assert body["choices"][0]["logprobs"] == {
                "tokens": ["h", "i"],
                "token_logprobs": [-0.5, -3.0],
                "text_offset": [0, 1],
                "top_logprobs": [{"h": -0.5, "e": -2.0}, {"e": -0.25, "h": -1.5, "i": -3.0}],
            }
            sampling = client.engine.requests[-1].sampling
            assert (sampling.logprobs, sampling.top_logprobs) == (True, 2)
            question = {"messages": [{"role": "user", "content": "q"}], "logprobs": True, "top_logprobs": 2}
            body = await client.post("/v1/chat/completions", **question)
            assert body["choices"][0]["logprobs"]["content"][1] == {
                "token": "i",
                "logprob": -3.0,
                "bytes": [105],
                "top_logprobs": [
                    {"token": "e", "logprob": -0.25, "bytes": [101]},
                    {"token": "h", "logprob": -1.5, "bytes": [104]},
                ],
            }
            assert client.engine.requests[-1].sampling.top_logprobs == 2
            events = await client.events("/v1/chat/completions", **question)
            told = [entry for event in events[:-1] for entry in event["choices"][0]["logprobs"]["content"]]
            assert told == body["choices"][0]["logprobs"]["content"]

    run(test())


def test_several_choices():
    async def test() -> None:
        async with api(lambda request: spell_all("hey", request.sampling.choices)) as client:
            body = await client.post(prompt="abc", n=3, logprobs=0, return_token_ids=True)
            assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
            assert {choice["text"] for choice in body["choices"]} == {"hey"}
            assert [choice["logprobs"]["text_offset"] for choice in body["choices"]] == [[0, 1, 2]] * 3
            assert body["usage"] == usage(3, 9)
            assert client.engine.requests[-1].sampling.choices == 3
            question = {"messages": [{"role": "user", "content": "q"}], "n": 2}
            body = await client.post("/v1/chat/completions", **question)
            assert [(c["index"], c["message"]["content"], c["finish_reason"]) for c in body["choices"]] == [
                (0, "hey", "stop"),
                (1, "hey", "stop"),
            ]
            assert body["usage"]["completion_tokens"] == 6

    run(test())


def test_several_choices_in_a_stream():
    async def test() -> None:
        async with api(lambda request: spell_all("hey", request.sampling.choices)) as client:
            fields = {"n": 3, "stream_options": {"include_usage": True}}
            events = await client.events(prompt="abc", logprobs=0, **fields)
            assert events.pop() == "[DONE]"
            assert events.pop()["usage"] == usage(3, 9)
            choices = [event["choices"][0] for event in events]
            for index in range(3):
                own = [choice for choice in choices if choice["index"] == index]
                assert "".join(choice["text"] for choice in own) == "hey"
                assert [choice["finish_reason"] for choice in own] == [None, None, "stop"]
                assert [at for choice in own for at in choice["logprobs"]["text_offset"]] == [0, 1, 2]
            chat = {"messages": [{"role": "user", "content": "q"}], **fields}
            events = await client.events("/v1/chat/completions", **chat)
            deltas = [event["choices"][0] for event in events[:-2]]
            for index in range(3):
                own = [choice["delta"] for choice in deltas if choice["index"] == index]
                assert "".join(delta["content"] for delta in own) == "hey"
                assert [delta.get("role") for delta in own] == ["assistant", None, None]

    run(test())


def test_a_client_that_leaves_before_the_last_choice_aborts_all():
    async def test() -> None:
        first = [Output(tokens=(97,), text="a", finish_reason="stop", unfinished=1)]
        async with api(lambda _request: first) as client:
            async with client.session.post(
                f"{client.url}/v1/completions", json={"prompt": "x", "stream": True, "rid": "r1", "n": 2}
            ) as response:
                assert b'"finish_reason":"stop"' in await response.content.readuntil(b"\n\n")
            await client.engine.until(lambda: client.engine.aborted == [client.engine.requests[0].request_id])
            assert not client.engine.live

    run(test())


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/completions", {"prompt": "a", "n": 17}, "n"),
        ("/v1/completions", {"prompt": "a", "n": 0}, "n"),
        ("/v1/completions", {"prompt": "a", "logprobs": 6}, "logprobs"),
        ("/v1/chat/completions", {"n": 17}, "n"),
        ("/v1/chat/completions", {"logprobs": 3}, "logprobs"),
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ("/v1/chat/completions", {"top_logprobs": 2}, "top_logprobs"),
    ],
)
def test_choices_and_logprobs_out_of_bounds_name_their_field(path, fields, param):
    async def test() -> None:
        async with api() as client:
            more = {} if "prompt" in fields else {"messages": [{"role": "user", "content": "q"}]}
            body = await client.post(path, 400, **fields, **more)
            assert body["error"]["param"] == param
            assert not client.engine.requests

    run(test())


def test_a_chat_that_does_not_say_shares_the_pool_among_its_choices():
    async def test() -> None:
        async with api(config=ApiConfig(model="m", max_positions=100, pool_tokens=64, page_size=16)) as client:
            message = {"role": "user", "content": "q" * 3}
            prompt = len("<user><assistant>") + 3
            for choices, tokens in ((1, 64), (2, 32), (3, 32)):  # one page of the prompt is shared
                await client.post("/v1/chat/completions", messages=[message], n=choices)
                assert client.engine.requests[-1].sampling.max_tokens == tokens - prompt
            body = await client.post("/v1/chat/completions", 400, messages=[message], n=4)
            assert body["error"]["param"] == "messages"

    run(test())


def test_a_chat_that_does_not_say_gets_what_room_there_is():
    async def test() -> None:
        async with api(config=ApiConfig(model="m", max_positions=100, pool_tokens=50)) as client:
            message = {"role": "user", "content": "q" * 10}
            await client.post("/v1/chat/completions", messages=[message])
            prompt = len("<user><assistant>") + 10
            assert client.engine.requests[0].sampling.max_tokens == 50 - prompt
            body = await client.post("/v1/chat/completions", 400, messages=[{**message, "content": "q" * 60}])
            assert body["error"]["param"] == "messages"

    run(test())


def test_a_stream():
    async def test() -> None:
        async with api() as client:
            events = await client.events(
                prompt="a", stream_options={"include_usage": True}, return_token_ids=True, logprobs=0
            )
            assert events.pop() == "[DONE]"
            told = events.pop()
            assert told["choices"] == []
            assert told["usage"] == usage(1, 5)
            assert "".join(event["choices"][0]["text"] for event in events) == "hello"
            assert [token for event in events for token in event["choices"][0]["token_ids"]] == list(b"hello")
            offsets = [at for event in events for at in event["choices"][0]["logprobs"]["text_offset"]]
            assert offsets == [0, 1, 2, 3, 4]
            assert [event["choices"][0]["finish_reason"] for event in events][-1] == "stop"
            assert {event["usage"] for event in events} == {None}
            assert len({event["id"] for event in events}) == 1
            assert not client.engine.aborted

    run(test())


def test_a_streamed_chat():
    async def test() -> None:
        async with api() as client:
            events = await client.events("/v1/chat/completions", messages=[{"role": "user", "content": "q"}])
            assert events.pop() == "[DONE]"
            assert {event["object"] for event in events} == {"chat.completion.chunk"}
            assert "".join(event["choices"][0]["delta"]["content"] for event in events) == "hello"
            assert events[0]["choices"][0]["delta"]["role"] == "assistant"
            assert "usage" not in events[0]

    run(test())


def test_tokens_are_streamed_as_they_come_from_the_engines_thread():
    async def test() -> None:
        async with api(lambda _request: spell("a", finish_reason=None)) as client:
            async with client.session.post(
                f"{client.url}/v1/completions", json={"prompt": "x", "stream": True, "rid": "r1"}
            ) as response:
                first = json.loads((await response.content.readuntil(b"\n\n"))[6:])
                assert first["choices"][0]["text"] == "a"
                await asyncio.to_thread(
                    client.engine.emit, only(client.engine.live), Output(tokens=(98,), text="b", finish_reason="stop")
                )
                rest = decode_events(await response.read())
            assert [rest[0]["choices"][0]["text"], rest[1]] == ["b", "[DONE]"]

    run(test())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("started", [False, True])
def test_a_client_that_goes_away_aborts_its_request(stream, started):
    async def test() -> None:
        async with api(lambda _request: spell("a", finish_reason=None) if started else []) as client:
            asking = asyncio.create_task(
                client.session.post(f"{client.url}/v1/completions", json={"prompt": "x", "stream": stream, "rid": "r"})
            )
            await client.engine.until(lambda: bool(client.engine.requests))
            if stream and started:
                (await asking).close()
            else:
                asking.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asking
            await client.engine.until(lambda: client.engine.aborted == [client.engine.requests[0].request_id])
            assert not client.engine.live
            assert await client.server.admission.emptied(5)
            assert await client.metric('kvbaton_requests_total{outcome="client_gone",route="/v1/completions"}') == 1

    run(test())


ERRORS = [
    (errors.ConfigError("prompt: wrong"), 400, "config"),
    (errors.CapacityError("prompt: too long"), 400, "capacity"),
    (errors.LocalProtocolError("room 3 is live already"), 409, "misuse"),
    (errors.PeerLostError("gone"), 503, "peer_lost"),
    (errors.DisconnectedError("gone"), 503, "disconnected"),
    (errors.TransportError("broken"), 503, "transport"),
    (errors.RegistryError("no registry"), 503, "registry"),
    (errors.OverloadedError("full"), 429, "overloaded"),
    (errors.TransferFailedError("it failed there"), 503, "transfer_failed"),
    (errors.IncompatibleError("page sizes differ"), 503, "incompatible"),
    (errors.ExpiredError("too late"), 504, "expired"),
    (errors.AbortedError("aborted"), 499, "aborted"),
    (errors.RemoteProtocolError("nonsense"), 502, "protocol"),
    (errors.MessageError("no message"), 502, "message"),
    (errors.InternalError("bug"), 500, "internal"),
]


@pytest.mark.parametrize(("error", "status", "code"), ERRORS, ids=lambda value: getattr(value, "code", None))
@pytest.mark.parametrize("stream", [False, True])
def test_an_error_before_the_first_token_has_its_status(error, status, code, stream):
    async def test() -> None:
        async with api(lambda _request: [Output(error=error)]) as client:
            url = f"{client.url}/v1/completions"
            async with client.session.post(url, json={"prompt": "x", "stream": stream}) as response:
                assert response.status == status
                assert ("Retry-After" in response.headers) == (status in (429, 503))
                body = (await response.json())["error"]
            assert body["code"] == code
            assert error.message in body["message"]
            assert body["param"] == ("prompt" if status == 400 else None)
            assert await client.metric(f'kvbaton_requests_total{{outcome="{code}",route="/v1/completions"}}') == 1

    run(test())


def test_every_error_of_the_tree_has_a_status():
    def leaves(kind: type[errors.KVBatonError]) -> list[type[errors.KVBatonError]]:
        return [kind, *(leaf for child in kind.__subclasses__() for leaf in leaves(child))]

    for kind in leaves(errors.KVBatonError):
        assert 400 <= status_of(kind("x")) < 600
    assert status_of(DrainingError("x")) == 503


def test_an_error_within_a_stream_ends_it_without_done():
    async def test() -> None:
        broken = [*spell("ab", finish_reason=None), Output(error=errors.PeerLostError("prefill is gone", room=7))]
        async with api(lambda _request: broken) as client:
            events = await client.events(prompt="x")
            assert "".join(event["choices"][0]["text"] for event in events[:-1]) == "ab"
            assert events[-1]["error"]["code"] == "peer_lost"
            assert "room 7" in events[-1]["error"]["message"]
            assert all(event["choices"][0]["finish_reason"] is None for event in events[:-1])
            assert await client.metric('kvbaton_requests_total{outcome="peer_lost",route="/v1/completions"}') == 1
            assert await client.metric('kvbaton_requests_total{outcome="ok",route="/v1/completions"}') == 0

    run(test())


def test_an_error_within_a_whole_answer_is_an_error():
    async def test() -> None:
        broken = [*spell("ab", finish_reason=None), Output(error=errors.PeerLostError("prefill is gone"))]
        async with api(lambda _request: broken) as client:
            assert (await client.post(prompt="x", status=503))["error"]["code"] == "peer_lost"

    run(test())


def test_abort_request():
    async def test() -> None:
        async with api(lambda _request: []) as client:
            mine = uuid.uuid4().hex
            asking = asyncio.create_task(client.post(status=499, prompt="x", rid=mine))
            await client.engine.until(lambda: bool(client.engine.live))
            assert await client.post("/abort_request", rid=mine) == {"rid": mine}
            assert (await asking)["error"]["code"] == "aborted"
            assert await client.post("/abort_request", rid=mine) == {"rid": mine}
            assert (await client.post("/abort_request", 400))["error"]["param"] == "rid"

    run(test())


def test_wrong_requests_are_400_with_the_field():
    async def test() -> None:
        async with api() as client:
            for fields, param in [
                ({"prompt": "x", "n": 17}, "n"),
                ({"prompt": "x", "temperature": -1}, "temperature"),
                ({"prompt": ""}, "prompt"),
                ({"prompt": "x", "bootstrap_room": 1}, "bootstrap_room"),
                ({"prompt": "x", "bootstrap_host": "h"}, "bootstrap_room"),
            ]:
                error = (await client.post(status=400, **fields))["error"]
                assert error["param"] == param
                assert error["type"] == "invalid_request_error"
            assert not client.engine.requests

    run(test())


def test_bodies_and_routes_that_are_none():
    async def test() -> None:
        async with api() as client:
            url = f"{client.url}/v1/completions"
            async with client.session.post(url, data=BytesIO(b"x" * (MAX_BODY_BYTES + 1)), headers=JSON) as response:
                assert response.status == 413
                assert (await response.json())["error"]["code"] == "http"
            async with client.session.post(url, headers=JSON) as response:
                assert response.status == 400
            async with client.session.get(url) as response:
                assert response.status == 405
            async with client.session.get(f"{client.url}/nothing") as response:
                assert response.status == 404
                assert "GET /nothing" in (await response.json())["error"]["message"]
            assert (await client.post(prompt="x"))["choices"]

    run(test())


payloads = st.binary(max_size=40) | st.recursive(
    st.none() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["prompt", "messages", "stream", "n", "seed", "stop"]), inner, max_size=3)
    ),
    max_leaves=6,
).map(lambda value: json.dumps(value).encode())


@settings(max_examples=20, deadline=None)
@given(st.lists(payloads, min_size=10, max_size=20))
def test_no_garbage_ever_becomes_a_server_error(bodies):
    async def test() -> None:
        async with api() as client:
            for path in ("/v1/completions", "/v1/chat/completions", "/abort_request"):
                for body in bodies:
                    async with client.session.post(client.url + path, data=body, headers=JSON) as response:
                        assert response.status in (200, 400), (path, body, await response.text())

    run(test())


def test_an_engine_that_died_fails_health_and_readiness():
    async def test() -> None:
        async with api() as client:
            await client.get("/health")
            client.engine.refusal = errors.InternalError("the scheduler died")
            assert "died" in (await client.get("/health", 503))["reason"]
            assert "died" in (await client.get("/ready", 503))["reason"]
            assert not (await client.get("/get_server_info"))["ready"]
            assert (await client.post(status=500, prompt="x"))["error"]["code"] == "internal"

    run(test())


def test_a_bug_in_the_server_is_a_500_that_says_little(caplog):
    async def test() -> None:
        def script(_request: object) -> list[Output]:
            raise ZeroDivisionError("secret detail")

        async with api(script) as client:
            error = (await client.post(status=500, prompt="x"))["error"]
            assert error["code"] == "internal"
            assert "secret" not in error["message"]
        assert "secret detail" in caplog.text

    run(test())


def test_operating_routes():
    async def test() -> None:
        reason = ["loading"]
        async with api(readiness=lambda: reason[0], info=lambda: {"page_size": 16}) as client:
            assert await client.get("/health") == {"status": "ok"}
            loading = await client.get("/ready", 503)
            assert (loading["ready"], loading["reason"], loading["draining"]) == (False, "loading", False)
            reason[0] = ""
            ready = await client.get("/ready")
            assert (ready["ready"], ready["reason"], ready["mode"], ready["admits"]) == (True, "", "null", True)
            assert (await client.get("/v1/models"))["data"][0]["id"] == "m"
            info = await client.get("/get_server_info")
            assert info == await client.get("/server_info")
            assert (info["model"], info["page_size"], info["disaggregation_mode"]) == ("m", 16, "null")
            assert info["stats"]["pages_free"] == 10
            await client.post(prompt="x")
            assert await client.metric("kvbaton_pages_free") == 10
            assert await client.metric("kvbaton_prefix_cache_lookups_total") == 3
            assert await client.metric("kvbaton_prefix_cache_hit_tokens_total") == 48
            assert await client.metric('kvbaton_queued_requests{queue="waiting"}') == 0
            assert await client.metric("kvbaton_time_to_first_token_seconds_count") == 1
            assert await client.metric('kvbaton_request_seconds_count{route="/v1/completions"}') == 1

    run(test())


def test_draining_refuses_new_requests_and_lets_running_ones_finish():
    async def test() -> None:
        async with api(lambda _request: spell("a", finish_reason=None)) as client:
            asking = asyncio.create_task(client.post(prompt="x", rid="r"))
            await client.engine.until(lambda: bool(client.engine.live))
            client.server.admission.shut()
            assert "stopping" in (await client.get("/ready", 503))["reason"]
            await client.get("/health")
            assert (await client.post(status=503, prompt="x"))["error"]["code"] == "draining"
            assert not await client.server.admission.emptied(0)
            client.engine.emit(only(client.engine.live), Output(tokens=(98,), text="b", finish_reason="stop"))
            assert (await asking)["choices"][0]["text"] == "ab"
            assert await client.server.admission.emptied(5)

    run(test())


def test_requests_at_once_are_bounded():
    async def test() -> None:
        config = ApiConfig(model="m", max_positions=100, max_requests=1)
        async with api(lambda _request: [], config) as client:
            asking = asyncio.create_task(client.post(status=499, prompt="x", rid="r"))
            await client.engine.until(lambda: bool(client.engine.live))
            assert (await client.post(status=429, prompt="x"))["error"]["code"] == "overloaded"
            client.engine.abort(only(client.engine.live))
            await asking

    run(test())


def test_a_long_prompt_is_tokenized_beside_the_loop():
    async def test() -> None:
        async with api() as client:
            await client.post(prompt="x" * (INLINE_CHARACTERS + 1), max_tokens=1)
            assert len(client.engine.requests[0].prompt_tokens) == INLINE_CHARACTERS + 1

    run(test())


def test_without_a_tokenizer_only_tokens_are_taken():
    async def test() -> None:
        engine = ScriptedEngine(lambda _request: [Output(tokens=(5,), logprobs=(-1.0,), finish_reason="stop")])
        server = ApiServer(engine, None, CONFIG)
        async with serving(server.app) as url, aiohttp.ClientSession() as session:
            client = Client(engine, server, session, url)
            assert (await client.post(status=400, prompt="x"))["error"]["param"] == "prompt"
            body = await client.post(prompt=[1], logprobs=0)
            assert body["choices"][0]["logprobs"]["tokens"] == ["token_id:5"]

    run(test())


def test_a_prefill_server_wants_a_room():
    async def test() -> None:
        async with api(config=ApiConfig(model="m", max_positions=100, mode="prefill")) as client:
            error = (await client.post(status=400, prompt="x"))["error"]
            assert error["param"] == "bootstrap_room"
            assert "router" in error["message"]
            await client.post(prompt="x", bootstrap_room=5, bootstrap_host="anything", bootstrap_port=1)
            assert client.engine.requests[0].room == 5
            assert client.engine.requests[0].sources == ()

    run(test())


@pytest.mark.parametrize(
    ("mode", "balance", "fields", "rank"),
    [
        ("prefill", "follow_bootstrap_room", {"bootstrap_room": 7}, 1),
        ("prefill", "follow_bootstrap_room", {"bootstrap_room": 7, "disagg_prefill_dp_rank": 0}, 0),
        ("prefill", "follow_bootstrap_room", {"bootstrap_room": 7, "data_parallel_rank": 5}, 1),  # decode's
        ("prefill", "total_requests", {"bootstrap_room": 7}, None),
        ("null", "total_requests", {}, None),
        ("null", "total_requests", {"data_parallel_rank": 2}, 2),
    ],
)
def test_the_data_parallel_rank_is_the_named_one_or_follows_the_room_or_is_left_open(mode, balance, fields, rank):
    async def test() -> None:
        config = ApiConfig(model="m", max_positions=100, mode=mode, data_parallel_size=3, load_balance=balance)
        async with api(config=config) as client:
            await client.post(prompt="x", **fields)
            assert client.engine.requests[0].dp_rank == rank

    run(test())


def test_a_data_parallel_rank_that_is_not_there_is_refused_by_the_name_of_its_field():
    async def test() -> None:
        async with api() as client:
            for field in ("data_parallel_rank", "disagg_prefill_dp_rank"):
                assert (await client.post(status=400, prompt="x", **{field: 1}))["error"]["param"] == field
        async with api(config=ApiConfig(model="m", max_positions=100, mode="prefill")) as client:
            refused = await client.post(status=400, prompt="x", bootstrap_room=5, disagg_prefill_dp_rank=1)
            assert refused["error"]["param"] == "disagg_prefill_dp_rank"
        async with decode_with_registry() as (client, _, port):
            where = {"bootstrap_host": "127.0.0.1", "bootstrap_port": port, "bootstrap_room": 9}
            refused = await client.post(status=400, prompt="x", disagg_prefill_dp_rank=1, **where)
            assert refused["error"]["param"] == "disagg_prefill_dp_rank"
            await client.post(prompt="x", disagg_prefill_dp_rank=0, data_parallel_rank=0, **where)
            assert client.engine.requests[0].dp_rank == 0

    run(test())


@asynccontextmanager
async def decode_with_registry(script=lambda _request: spell("hello"), allow: tuple[str, ...] = ()):
    registry = Registry()
    registry.register(
        Route(instance="i", group="g", address="tcp://127.0.0.1:41000", layout_digest="", http_port=1), 0.0
    )
    config = ApiConfig(model="m", max_positions=100, mode="decode", bootstrap_allow=AllowList.parse(allow))
    async with (
        serving(registry_app(registry, clock=lambda: 0.0)) as url,
        RegistryClient(attempts=1) as lookup,
        api(script, config, registry=lookup) as client,
    ):
        yield client, lookup, int(url.rpartition(":")[2])


def test_a_decode_server_looks_its_sources_up():
    async def test() -> None:
        handed = [
            Output(tokens=(97,), text="a", handoff=Handoff(bytes=4096, seconds=0.25, exposed_seconds=0.125)),
            *spell("b"),
        ]
        async with decode_with_registry(lambda _request: handed) as (client, _, port):
            where = {"bootstrap_host": "127.0.0.1", "bootstrap_port": port, "bootstrap_room": 9}
            body = await client.post(prompt="x", **where)
            assert body["handoff"] == {"bytes": 4096, "seconds": 0.25, "exposed_seconds": 0.125}
            assert client.engine.requests[0].sources == ("tcp://127.0.0.1:41000",)
            assert client.engine.requests[0].room == 9
            events = await client.events(prompt="x", **where)
            assert events[-2]["handoff"] == {"bytes": 4096, "seconds": 0.25, "exposed_seconds": 0.125}
            assert await client.metric("kvbaton_handoff_bytes_sum") == 8192
            assert await client.metric("kvbaton_handoff_seconds_sum") == 0.5

    run(test())


def test_a_decode_server_asks_only_registries_it_may():
    async def test() -> None:
        async with decode_with_registry() as (client, _, port):
            for fields, param in [
                ({}, "bootstrap_room"),
                ({"bootstrap_room": 1}, "bootstrap_host"),
                ({"bootstrap_room": 1, "bootstrap_host": "10.0.0.1"}, "bootstrap_host"),
                ({"bootstrap_room": 1, "bootstrap_host": "127.0.0.1@evil"}, "bootstrap_host"),
            ]:
                assert (await client.post(status=400, prompt="x", **fields))["error"]["param"] == param
        async with decode_with_registry(allow=("10.0.0.1",)) as (client, _, port):
            fields = {"bootstrap_room": 1, "bootstrap_host": "127.0.0.1", "bootstrap_port": port}
            assert (await client.post(status=400, prompt="x", **fields))["error"]["param"] == "bootstrap_host"
        async with decode_with_registry(allow=("127.0.0.1:1",)) as (client, _, port):
            assert (await client.post(status=400, prompt="x", **fields | {"bootstrap_port": port}))["error"]
            body = await client.post(status=503, prompt="x", **fields | {"bootstrap_port": 1})
            assert "127.0.0.1:1 cannot be reached" in body["error"]["message"]

    run(test())


@pytest.mark.parametrize("port", ["", "0", "65536", "99999", "-1", "x", "\u0661"])
def test_a_pair_is_asked_for_by_a_port(port: str):
    async def test() -> None:
        async with decode_with_registry() as (client, _, _port):
            body = await client.get(f"/pair?bootstrap_host=127.0.0.1&bootstrap_port={port}", status=400)
            assert body["error"]["param"] == "bootstrap_port"

    run(test())


def test_a_lost_peer_is_looked_up_again():
    async def test() -> None:
        async with decode_with_registry() as (client, lookup, port):
            where = {"bootstrap_host": "127.0.0.1", "bootstrap_port": port, "bootstrap_room": 9}
            await client.post(prompt="x", **where)
            assert ("127.0.0.1", port) in lookup._cache
            client.engine.script = lambda _request: [Output(error=errors.PeerLostError("gone"))]
            await client.post(status=503, prompt="x", **where)
            assert ("127.0.0.1", port) not in lookup._cache

    run(test())


def test_allow_lists():
    allow = AllowList.parse(["Prefill-0.local", "10.0.0.1:8998", "[fd00::1]", "[fd00::2]:5", "fd00::3"])
    for host, port in [("prefill-0.local", 1), ("10.0.0.1", 8998), ("fd00::1", 7), ("[fd00::2]", 5), ("fd00::3", 9)]:
        allow.check(host, port)
    for host, port in [("10.0.0.1", 8999), ("fd00::2", 6), ("127.0.0.1", 1), ("evil", 1)]:
        with pytest.raises(errors.ConfigError):
            allow.check(host, port)
    for text in ("", "a:b", "a:0", "a/b", "a:99999"):
        with pytest.raises(errors.ConfigError):
            AllowList.parse([text])


def test_a_write_that_finds_the_client_gone_is_not_a_server_error(caplog):
    async def test() -> None:
        async def lost(_request: web.Request) -> web.StreamResponse:
            raise ConnectionResetError("gone")

        response = await failure.errors(make_mocked_request("GET", "/lost"), lost)
        assert response.status == failure.CLIENT_CLOSED_REQUEST
        assert not caplog.text

    run(test())

"""Shapes in which clients of OpenAI, vLLM and SGLang ask and want their answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import aiohttp
import pytest
from test_api import Client, api, decode_events, usage

from kvbaton.discovery.client import RegistryClient
from kvbaton.discovery.registry import Registry, Route
from kvbaton.discovery.server import registry_app
from kvbaton.errors import ConfigError, PeerLostError
from kvbaton.serving.engine.request import Output, PromptToken, Request, Sampling
from kvbaton.serving.router.router import Router, RouterConfig
from kvbaton.serving.router.worker import Worker
from kvbaton.serving.server import journal
from kvbaton.serving.server.api import ApiServer
from kvbaton.serving.server.api_keys import ApiKeys
from kvbaton.serving.server.request_parsing import ApiConfig
from kvbaton.serving.testing.engine import CharacterTokenizer, ScriptedEngine, spell, spell_all
from kvbaton.serving.testing.http import run, serving


def echoed(request: Request) -> list[Output]:
    """Each choice says the prompt again, and its number."""
    said = "".join(map(chr, request.prompt_tokens))
    outputs = spell_all(said, request.sampling.choices)
    return [replace(outputs[0], cached_tokens=2), *outputs[1:]]


def test_batches_of_prompts_have_their_indices_and_usage() -> None:
    async def test() -> None:
        async with api(echoed) as client:
            for prompts in (["ab", "cde"], [[97, 98], [99, 100, 101]]):
                body = await client.post(prompt=prompts, n=2)
                told = [(choice["index"], choice["text"]) for choice in body["choices"]]
                assert told == [(0, "ab"), (1, "ab"), (2, "cde"), (3, "cde")]
                assert body["usage"] == usage(5, 10, cached=4)
            events = await client.events(prompt=["ab", "cde"], stream_options={"include_usage": True})
            assert events.pop() == "[DONE]"
            assert events.pop()["usage"] == usage(5, 5, cached=4)
            texts: dict[int, str] = {}
            for event in events:
                (choice,) = event["choices"]
                texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
            assert texts == {0: "ab", 1: "cde"}
            assert len({request.request_id for request in client.engine.requests}) == 6

    run(test())


def test_a_batch_fails_and_is_aborted_as_one() -> None:
    async def test() -> None:
        def script(request: Request) -> list[Output]:
            return [] if request.prompt_tokens == (97,) else [Output(error=PeerLostError("gone"))]

        async with api(script) as client:
            assert (await client.post(status=503, prompt=["a", "b"]))["error"]["code"] == "peer_lost"
            first = client.engine.requests[0].request_id
            await client.engine.until(lambda: first in client.engine.aborted)
            assert not client.engine.live

    run(test())


def test_usage_in_every_event() -> None:
    async def test() -> None:
        async with api(lambda _request: spell("hi")) as client:
            options = {"include_usage": True, "continuous_usage_stats": True}
            *events, last, done = await client.events(prompt="abc", stream_options=options)
            assert [event["usage"]["completion_tokens"] for event in events][-1] == 2
            assert (last["usage"], done) == (usage(3, 2), "[DONE]")

    run(test())


def test_best_of_and_echo() -> None:
    async def test() -> None:
        def script(request: Request) -> list[Output]:
            ends = [
                Output(
                    index=index, tokens=(97 + index,), text=chr(97 + index), logprobs=(logprob,), finish_reason="stop"
                )
                for index, logprob in enumerate((-3.0, -0.1, -2.0)[: request.sampling.choices])
            ]
            return [replace(end, unfinished=len(ends) - 1 - place) for place, end in enumerate(ends)]

        async with api(script) as client:
            body = await client.post(prompt="x", best_of=3, n=2)
            assert [(c["index"], c["text"], c["logprobs"]) for c in body["choices"]] == [(0, "b", None), (1, "c", None)]
            assert body["usage"] == usage(1, 3)
            assert (await client.post(prompt="x", echo=True))["choices"][0]["text"] == "xa"
            assert (await client.post(prompt=[120], echo=True))["choices"][0]["text"] == "xa"

    run(test())


class SplitTokenizer(CharacterTokenizer):
    """A token is a byte."""

    def decode(self, tokens: object) -> str:
        return bytes(tokens).decode("utf-8", "replace")  # type: ignore[call-overload, no-any-return]

    def token_bytes(self, token: int) -> bytes:
        return bytes([token])


def test_logprobs_of_a_character_in_three_tokens() -> None:
    data = "a日b".encode()
    texts = ["a", "", "", "日", "b"]
    outputs = [Output(tokens=(byte,), text=text, logprobs=(-0.5,)) for byte, text in zip(data, texts, strict=True)]
    outputs[-1] = replace(outputs[-1], finish_reason="stop")

    async def test() -> None:
        engine = ScriptedEngine(lambda _request: outputs)
        server = ApiServer(engine, SplitTokenizer(), ApiConfig(model="m", max_positions=99))
        async with serving(server.app) as url, aiohttp.ClientSession() as session:
            client = Client(engine, server, session, url)
            whole = (await client.post(prompt="x", logprobs=0))["choices"][0]["logprobs"]
            assert whole["text_offset"] == [0, 1, 1, 1, 2]
            assert whole["tokens"] == ["a", "bytes:\\xe6", "bytes:\\x97", "bytes:\\xa5", "b"]
            *events, _ = await client.events(prompt="x", logprobs=0)
            assert [at for e in events for at in e["choices"][0]["logprobs"]["text_offset"]] == [0, 1, 1, 1, 2]
            question = {"messages": [{"role": "user", "content": "q"}], "logprobs": True}
            content = (await client.post("/v1/chat/completions", **question))["choices"][0]["logprobs"]["content"]
            assert bytes(byte for entry in content for byte in entry["bytes"]) == data

    run(test())


def told(request: Request) -> list[Output]:
    """Says the prompt again, and of each of its tokens but the first a logprob and what is likelier."""
    outputs = echoed(request)
    asked = request.sampling.prompt_logprobs
    if asked is None:
        return outputs
    tops = ((98, -0.25), (99, -0.75), (100, -1.25))[:asked]
    prompt = tuple(PromptToken(-float(token), 4, tops) for token in request.prompt_tokens[1:])
    return [replace(outputs[0], prompt_logprobs=prompt), *outputs[1:]]


def test_echo_with_logprobs() -> None:
    async def test() -> None:
        async with api(told) as client:
            fields = {"prompt": ["ax", "c"], "n": 2, "echo": True, "logprobs": 1, "max_tokens": 9}
            choices = (await client.post(**fields))["choices"]
            assert [choice["text"] for choice in choices] == ["axax", "axax", "cc", "cc"]
            first, second = choices[1]["logprobs"], choices[2]["logprobs"]
            assert first["tokens"] == ["a", "x", "a", "x"]
            assert first["token_logprobs"] == [None, -120.0, -0.5, -0.5]
            assert first["top_logprobs"][:2] == [None, {"b": -0.25, "x": -120.0}]
            assert first["text_offset"] == [0, 1, 2, 3]
            assert second["token_logprobs"] == [None, -0.5]
            events = await client.events(**fields)
            assert events.pop() == "[DONE]"
            parts: dict[int, list[object]] = {}
            for event in events:
                (choice,) = event["choices"]
                parts.setdefault(choice["index"], []).extend(choice["logprobs"]["token_logprobs"])
            assert parts == {i: choice["logprobs"]["token_logprobs"] for i, choice in enumerate(choices)}
            alone = (await client.post(**{**fields, "max_tokens": 0, "n": 1}))["choices"]
            assert [(choice["text"], choice["finish_reason"]) for choice in alone] == [
                ("ax", "length"),
                ("c", "length"),
            ]
            assert alone[0]["logprobs"]["token_logprobs"] == [None, -120.0]
            assert client.engine.requests[-1].sampling.max_tokens == 1
            best = (await client.post(**{**fields, "n": 1, "best_of": 2}))["choices"]
            assert [choice["text"] for choice in best] == ["axax", "cc"]

    run(test())


def test_prompt_logprobs() -> None:
    async def test() -> None:
        async with api(told) as client:
            body = await client.post(prompt="ab", prompt_logprobs=2)
            own = {"logprob": -98.0, "rank": 4, "decoded_token": "b"}
            other = {"logprob": -0.75, "rank": 2, "decoded_token": "c"}
            assert body["choices"][0]["prompt_logprobs"] == [None, {"98": own, "99": other}]
            assert "prompt_logprobs" not in (await client.post(prompt="ab"))["choices"][0]
            question = {"messages": [{"role": "user", "content": "q"}], "prompt_logprobs": 0}
            whole = await client.post("/v1/chat/completions", **question)
            assert [row and len(row) for row in whole["prompt_logprobs"]][:2] == [None, 1]
            params = {"return_logprob": True, "top_logprobs_num": 1}
            for start, expected in ((0, [None, -98.0, -99.0]), (1, [None, -99.0]), (3, []), (-1, [])):
                fields = {"input_ids": [97, 98, 99], "logprob_start_len": start, **params}
                meta = (await client.post("/generate", **fields))["meta_info"]
                assert [logprob for logprob, _, _ in meta["input_token_logprobs"]] == expected
                assert len(meta["input_top_logprobs"]) == len(expected)

    run(test())


@pytest.mark.parametrize(
    ("answer", "texts", "said", "offsets"),
    [
        (b"\x97\xa5b", ["", "日", "b"], "日b", [0, 0, 1]),
        (b"xy", ["x", "y"], "\ufffdxy", [0, 1]),
        (b"\x97", [""], "\ufffd", [0]),
    ],
)
def test_a_prompt_that_ends_within_a_character(answer: bytes, texts: list[str], said: str, offsets: list[int]) -> None:
    """``texts`` are those of the engine: a character belongs to the answer that completes it, else to the prompt."""
    prompt = [ord("a"), "日".encode()[0]]
    steps = [Output(tokens=(byte,), text=text, logprobs=(-0.5,)) for byte, text in zip(answer, texts, strict=True)]
    steps[0] = replace(steps[0], prompt_logprobs=(PromptToken(-1.0, 1),))
    steps[-1] = replace(steps[-1], finish_reason="stop")

    async def test() -> None:
        engine = ScriptedEngine(lambda _request: steps)
        server = ApiServer(engine, SplitTokenizer(), ApiConfig(model="m", max_positions=99))
        async with serving(server.app) as url, aiohttp.ClientSession() as session:
            client = Client(engine, server, session, url)
            (plain,) = (await client.post(prompt=prompt, logprobs=0))["choices"]
            assert (plain["text"], plain["logprobs"]["text_offset"]) == ("".join(texts), offsets)
            (whole,) = (await client.post(prompt=prompt, logprobs=0, echo=True))["choices"]
            assert whole["text"] == "a" + said
            assert whole["logprobs"]["text_offset"][:2] == [0, 1]
            assert whole["logprobs"]["tokens"][1] == "bytes:\\xe6"
            *events, _ = await client.events(prompt=prompt, echo=True)
            assert "".join(event["choices"][0]["text"] for event in events) == whole["text"]

    run(test())


class FrontTokenizer(CharacterTokenizer):
    """Puts a token in front of every text, as most do; answers end with one as well."""

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        return [1] * special + super().encode(text)

    def token_bytes(self, token: int) -> bytes:
        return b"<s>" if token == 1 else super().token_bytes(token)

    def is_special(self, token: int) -> bool:
        return token == 1


def test_offsets_count_the_characters_that_are_there() -> None:
    def script(request: Request) -> list[Output]:
        end = Output(tokens=(1,), logprobs=(-0.5,), finish_reason="stop")
        outputs = [*spell("xy", finish_reason=None), end]
        prompt = tuple(PromptToken(-1.0, 1) for _ in request.prompt_tokens[1:])
        return [replace(outputs[0], prompt_logprobs=prompt), *outputs[1:]]

    async def test() -> None:
        engine = ScriptedEngine(script)
        server = ApiServer(engine, FrontTokenizer(), ApiConfig(model="m", max_positions=99))
        async with serving(server.app) as url, aiohttp.ClientSession() as session:
            client = Client(engine, server, session, url)
            (choice,) = (await client.post(prompt="ab", echo=True, logprobs=0))["choices"]
            assert choice["text"] == "abxy"
            assert choice["logprobs"]["tokens"] == ["<s>", "a", "b", "x", "y", "<s>"]
            assert choice["logprobs"]["text_offset"] == [0, 0, 1, 2, 3, 4]

    run(test())


def test_generate() -> None:
    async def test() -> None:
        async with api(echoed) as client:
            one = await client.post("/generate", text="hey", sampling_params={"max_new_tokens": 9}, rid="r")
            assert (one["text"], one["output_ids"]) == ("hey", [104, 101, 121])
            meta = one["meta_info"]
            assert meta.pop("e2e_latency") >= 0
            assert meta == {
                "id": "r",
                "finish_reason": {"type": "stop"},
                "prompt_tokens": 3,
                "completion_tokens": 3,
                "cached_tokens": 2,
                "weight_version": "default",
            }
            assert client.engine.requests[-1].sampling.max_tokens == 9
            asked = {"return_logprob": True, "return_text_in_logprobs": True}
            told = (await client.post("/generate", input_ids=[97], **asked))["meta_info"]
            assert told["output_token_logprobs"] == [[-0.5, 97, "a"]]
            assert told["input_token_logprobs"] == []
            many = await client.post("/generate", text=["ab", "c"], sampling_params={"n": 2})
            assert [answer["text"] for answer in many] == ["ab", "ab", "c", "c"]
            *events, done = await client.events("/generate", text="hey")
            assert [event["text"] for event in events][-1] == "hey"
            assert all(event["text"] == "hey"[: len(event["text"])] for event in events)
            assert ("index" in events[0], done) == (False, "[DONE]")
            *events, _ = await client.events("/generate", input_ids=[[97, 98], [99]])
            assert {event["index"]: event["text"] for event in events} == {0: "ab", 1: "c"}

    run(test())


def test_each_prompt_of_a_batch_is_asked_in_its_own_way() -> None:
    """SGLang's clients send one value for all prompts, or a list with one for each."""

    async def test() -> None:
        async with api(told) as client:
            fields = {
                "input_ids": [[97, 98, 99], [97, 98], [97]],
                "return_logprob": [True, True, False],
                "logprob_start_len": [1, -1, 0],
                "top_logprobs_num": [2, 1, 3],
                "sampling_params": [{"max_new_tokens": 7}, {"top_k": 3, "temperature": 0.5}, {}],
            }
            answers = await client.post("/generate", **fields)
            first, second, third = (answer["meta_info"] for answer in answers)
            assert [logprob for logprob, _, _ in first["input_token_logprobs"]] == [None, -99.0]
            assert [top and len(top) for top in first["input_top_logprobs"]] == [None, 2]
            assert (second["input_token_logprobs"], second["input_top_logprobs"]) == ([], [])
            assert len(second["output_token_logprobs"]) == 2
            assert "output_token_logprobs" not in third
            samplings = [request.sampling for request in client.engine.requests]
            assert [(one.prompt_logprobs, one.logprobs, one.top_logprobs) for one in samplings] == [
                (2, True, 2),
                (None, True, 1),
                (None, False, 0),
            ]
            assert [(one.max_tokens, one.top_k, one.temperature) for one in samplings] == [
                (7, 0, 1.0),
                (128, 3, 0.5),
                (128, 0, 1.0),
            ]
            twice = {**fields, "sampling_params": [{"n": 2}] * 3}
            assert len(await client.post("/generate", **twice)) == 6
            (only,) = await client.post("/generate", text=["ab"], return_logprob=[True], logprob_start_len=[0])
            assert [logprob for logprob, _, _ in only["meta_info"]["input_token_logprobs"]] == [None, -98.0]

    run(test())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("return_logprob", [True]),
        ("return_logprob", [True, 1]),
        ("logprob_start_len", [0, 0, 0]),
        ("logprob_start_len", [0, 4]),
        ("logprob_start_len", 3),
        ("logprob_start_len", []),
        ("logprob_start_len", [0, None]),
        ("top_logprobs_num", [0, 21]),
        ("top_logprobs_num", [[0], [1]]),
        ("sampling_params", [{}]),
        ("sampling_params", []),
        ("sampling_params", [{}] * 257),
        ("sampling_params", [{}, 1]),
        ("sampling_params", [{"n": 2}, {"n": 1}]),
        ("min_p", [{}, {"min_p": 2}]),
        ("rid", ["a", "b"]),
    ],
)
def test_lists_that_do_not_fit_their_prompts_name_their_field(field: str, value: object) -> None:
    async def test() -> None:
        async with api(told) as client:
            sent = "sampling_params" if field == "min_p" else field
            fields = {"input_ids": [[97, 98, 99], [97, 98]], "return_logprob": True, sent: value}
            error = (await client.post("/generate", status=400, **fields))["error"]
            assert error["message"].startswith(sent)
            assert not client.engine.requests

    run(test())


def test_generate_that_only_scores_its_prompt() -> None:
    async def test() -> None:
        async with api(told) as client:
            fields = {
                "text": "abc",
                "sampling_params": {"max_new_tokens": 0},
                "return_logprob": True,
                "logprob_start_len": 0,
            }
            answer = await client.post("/generate", **fields)
            meta = answer["meta_info"]
            assert (answer["text"], answer["output_ids"], meta["output_token_logprobs"]) == ("", [], [])
            assert [logprob for logprob, _, _ in meta["input_token_logprobs"]] == [None, -98.0, -99.0]
            assert (meta["completion_tokens"], meta["finish_reason"]) == (0, {"type": "length", "length": 0})
            assert client.engine.requests[-1].sampling.max_tokens == 1
            *events, _ = await client.events("/generate", **fields)
            assert events[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
            assert all(event["output_ids"] == [] for event in events)

    run(test())


@pytest.mark.parametrize(
    ("path", "field", "fields"),
    [
        ("/v1/completions", "prompt_logprobs", {"prompt": "a"}),
        ("/v1/completions", "logprobs", {"prompt": "a"}),
        ("/v1/chat/completions", "prompt_logprobs", {"messages": [{"role": "user", "content": "q"}]}),
        ("/v1/chat/completions", "top_logprobs", {"messages": [{"role": "user", "content": "q"}], "logprobs": True}),
    ],
)
def test_logprobs_of_the_whole_vocabulary_are_refused_by_name(path: str, field: str, fields: dict[str, object]) -> None:
    """vLLM takes -1 for all tokens, and refuses it where they are more than --max-logprobs, which is 20."""

    async def test() -> None:
        async with api(told) as client:
            error = (await client.post(path, status=400, **{**fields, field: -1}))["error"]
            assert (error["param"], "vocabulary" in error["message"]) == (field, True)
            assert not client.engine.requests

    run(test())


def test_what_ended_an_answer_of_generate() -> None:
    async def test() -> None:
        ends = iter(
            [
                Output(tokens=(97,), text="a", finish_reason="length"),
                Output(tokens=(97,), text="a", finish_reason="stop", matched=7),
                Output(tokens=(97,), text="a", finish_reason="stop", matched="x"),
            ]
        )
        async with api(lambda _request: [next(ends)]) as client:
            found = [(await client.post("/generate", text="a"))["meta_info"]["finish_reason"] for _ in range(3)]
            assert found == [
                {"type": "length", "length": 1},
                {"type": "stop", "matched": 7},
                {"type": "stop", "matched": "x"},
            ]

    run(test())


def test_tokenize_and_detokenize() -> None:
    async def test() -> None:
        async with api() as client:
            told = await client.post("/tokenize", prompt="ab", return_token_strs=True)
            assert told == {"count": 2, "max_model_len": 4096, "tokens": [97, 98], "token_strs": ["a", "b"]}
            chat = await client.post("/tokenize", messages=[{"role": "user", "content": "q"}])
            assert bytes(chat["tokens"]) == b"<user>q<assistant>"
            assert await client.post("/detokenize", tokens=[97, 98]) == {"prompt": "ab", "text": "ab"}
            for path, fields in (
                ("/tokenize", {}),
                ("/tokenize", {"prompt": ["a", "b"]}),
                ("/detokenize", {"tokens": "ab"}),
                ("/detokenize", {"tokens": [[1]]}),
                ("/detokenize", {"tokens": [1 << 40]}),
                ("/detokenize", {"tokens": [-1]}),
                ("/v1/completions", {"prompt": [1 << 40], "echo": True}),
            ):
                await client.post(path, status=400, **fields)
            assert not client.engine.requests

    run(test())


def test_models_and_what_is_told_of_them() -> None:
    async def test() -> None:
        async with api() as client:
            assert (await client.get("/v1/models/m"))["id"] == "m"
            missing = await client.get("/v1/models/a/b", status=404)
            assert (missing["error"]["code"], missing["error"]["param"]) == ("model_not_found", "model")
            assert (await client.post(status=404, prompt="x", model="other"))["error"]["code"] == "model_not_found"
            for path in ("/model_info", "/get_model_info"):
                assert (await client.get(path))["model_path"] == "m"
            assert (await client.get("/server_info"))["served_model_name"] == "m"

    run(test())


def test_too_long_and_clipped() -> None:
    async def test() -> None:
        async with api(config=ApiConfig(model="m", max_positions=20)) as client:
            await client.post(prompt="x" * 15)
            assert client.engine.requests[-1].sampling.max_tokens == 5
            for fields in ({"prompt": "x" * 20}, {"prompt": [1] * 21}):
                error = (await client.post(status=400, **fields))["error"]
                assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")

    run(test())


def test_unknown_fields_are_counted_or_refused() -> None:
    async def test() -> None:
        async with api() as client:
            await client.post(prompt="x", surprise=1)
            assert await client.metric('kvbaton_unknown_fields_total{field="surprise"}') == 1
        async with api(config=ApiConfig(model="m", max_positions=99, strict_fields=True)) as client:
            assert (await client.post(status=400, prompt="x", surprise=1))["error"]["param"] == "surprise"

    run(test())


def test_each_prompt_of_a_batch_has_its_room() -> None:
    async def test() -> None:
        async with api(echoed, ApiConfig(model="m", max_positions=99, mode="prefill")) as client:
            await client.post(prompt=["a", "b"], bootstrap_room=7)
            assert [request.room for request in client.engine.requests] == [7, 8]
            lists = {"bootstrap_room": [4, 5], "bootstrap_host": ["h", "h"], "bootstrap_port": [1, 1]}
            await client.post("/generate", text=["a", "b"], **lists)
            assert [request.room for request in client.engine.requests[2:]] == [4, 5]
            await client.post(prompt="a", n=2, **lists)
            assert [request.room for request in client.engine.requests[4:]] == [4]

    run(test())


@pytest.mark.parametrize("key", ["short", "has a space in it", "ümlauts-are-none"])
def test_keys_that_are_none(key: str) -> None:
    with pytest.raises(ConfigError, match="API key"):
        ApiKeys([key])


def test_api_keys() -> None:
    keys = ApiKeys(["first-key-123", "second-key-456"])

    async def test() -> None:
        async with api(keys=keys) as client:
            for header, status in (
                (None, 401),
                ("Bearer wrong-key-789", 401),
                ("Bearer first-key-123", 200),
                ("Bearer second-key-456", 200),
            ):
                headers = {} if header is None else {"Authorization": header}
                async with client.session.post(
                    f"{client.url}/v1/completions", json={"prompt": "x"}, headers=headers
                ) as response:
                    assert response.status == status
                    if status == 401:
                        assert (await response.json())["error"]["code"] == "invalid_api_key"
            await client.get("/v1/models", status=401)
            await client.get("/health")
            await client.get("/server_info")
            assert "first-key" not in repr(keys)

    run(test())


@asynccontextmanager
async def routed(**settings: object) -> AsyncIterator[tuple[Client, ScriptedEngine]]:
    """A router in front of two servers whose engines have nobody to wait for."""
    registry = Registry()
    route = Route(instance="i", group="g", address="tcp://127.0.0.1:41000", layout_digest="", http_port=1)
    registry.register(route, 0.0)
    async with AsyncExitStack() as closing:
        lookup = await closing.enter_async_context(RegistryClient(attempts=1))
        bootstrap = await closing.enter_async_context(serving(registry_app(registry, clock=lambda: 0.0)))
        engines, servers, urls = [], [], []
        for mode in ("prefill", "decode"):
            config = ApiConfig(model="m", max_positions=99, mode=mode)  # type: ignore[arg-type]
            engines.append(ScriptedEngine(echoed))
            servers.append(ApiServer(engines[-1], CharacterTokenizer(), config, registry=lookup))
            urls.append(await closing.enter_async_context(serving(servers[-1].app)))
        workers = (Worker("prefill", urls[0], int(bootstrap.rpartition(":")[2])), Worker("decode", urls[1]))
        router = Router(RouterConfig(workers=workers, health_check_interval_secs=60.0, **settings))  # type: ignore[arg-type]
        url = await closing.enter_async_context(serving(router.app))
        session = await closing.enter_async_context(aiohttp.ClientSession())
        await router.workers.probe_all()
        yield Client(engines[1], servers[1], session, url), engines[0]


def test_the_router_passes_all_of_it_on() -> None:
    async def test() -> None:
        async with routed() as (client, prefill):
            body = await client.post(prompt=["ab", "c"], n=2, no_stop_trim=False, surprise=1)
            assert [choice["text"] for choice in body["choices"]] == ["ab", "ab", "c", "c"]
            rooms = [[request.room for request in engine.requests] for engine in (prefill, client.engine)]
            assert rooms[0] == rooms[1]
            assert len(set(rooms[0])) == 2
            assert (await client.post("/generate", text="hey"))["text"] == "hey"
            async with client.session.post(f"{client.url}/generate", json={"text": "hey", "stream": True}) as response:
                assert decode_events(await response.read())[-2]["text"] == "hey"
            assert (await client.post("/tokenize", prompt="ab"))["tokens"] == [97, 98]
            assert (await client.post("/detokenize", tokens=[97]))["text"] == "a"
            assert (await client.get("/v1/models/m"))["id"] == "m"
            assert (await client.get("/v1/models/n", status=404))["error"]["code"] == "model_not_found"
            assert (await client.get("/model_info"))["model_path"] == "m"
        async with routed(strict_fields=True, keys=ApiKeys(["some-key-123"])) as (client, _):
            await client.get("/v1/models", status=401)
            client.session.headers["Authorization"] = "Bearer some-key-123"
            assert (await client.post(status=400, prompt="a", surprise=1))["error"]["param"] == "surprise"
            await client.post(prompt="a")

    run(test())


def test_a_batch_is_ended_by_its_one_rid() -> None:
    async def test() -> None:
        async with api(lambda _request: []) as client:
            rid = "a-name-that-nobody-guesses-1"
            asking = asyncio.create_task(client.post(status=499, prompt=["a", "b"], rid=rid))
            await client.engine.until(lambda: len(client.engine.live) == 2)
            await client.post("/abort_request", rid=rid)
            await asking
            assert not client.engine.live

    run(test())


def test_an_answer_that_goes_on_elsewhere_tells_the_prompt_once() -> None:
    outputs = [replace(output, index=0) for output in spell("xy", finish_reason=None)]
    outputs[0] = replace(outputs[0], prompt_logprobs=(PromptToken(-1.5, 2, ((98, -0.5),)),))
    records = [journal.record(output)[1:-1] for output in outputs]
    head = journal.Journal(id="a", created=1, seed=2)
    found = journal.Journal.of(journal.encoded(head, records))
    assert found is not None
    assert [record.output for record in found.records] == outputs
    (part,) = found.parts([(97, 99)], [Sampling(prompt_logprobs=1)])
    assert (part.answered, part.sampling.prompt_logprobs) == (2, None)
    (anew,) = head.parts([(97, 99)], [Sampling(prompt_logprobs=1)])
    assert anew.sampling.prompt_logprobs == 1

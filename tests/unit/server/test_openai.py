"""The OpenAI structs: what is refused, how it is named, and that no bytes at all get past it any other way."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbaton.errors import ConfigError
from kvbaton.serving.server.openai import (
    DONE,
    MAX_RID_CHARACTERS,
    AbortRequest,
    ChatRequest,
    CompletionRequest,
    ErrorBody,
    ErrorDetail,
    event,
    param_of,
    parse,
)


def completion(**fields: object) -> bytes:
    return json.dumps({"prompt": "x", **fields}).encode()


def chat(**fields: object) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "x"}], **fields}).encode()


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"seed": 1 << 63}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"stop": 1}, "stop"),
        ({"stop": ["a", 1]}, "stop"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": "2"}, "n"),
        ({"n": 1.5}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"best_of": 2, "n": 2}, "best_of"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"echo": True}, "echo"),
        ({"suffix": "y"}, "suffix"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logit_bias": {"1": 1}}, "logit_bias"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
        ({"bootstrap_room": 0}, "bootstrap_room"),
        ({"bootstrap_room": 1 << 63}, "bootstrap_room"),
        ({"bootstrap_port": 0}, "bootstrap_port"),
        ({"bootstrap_host": ""}, "bootstrap_host"),
        ({"rid": "a b"}, "rid"),
        ({"rid": "a" * (MAX_RID_CHARACTERS + 1)}, "rid"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_wrong_completion_names_its_field(fields, field):
    with pytest.raises(ConfigError) as caught:
        parse(completion(**fields), CompletionRequest)
    assert param_of(caught.value.message) == field


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
        ({"n": 17}, "n"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"top_logprobs": 3, "logprobs": False}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"top_logprobs": -1, "logprobs": True}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"tools": [{}]}, "tools"),
        ({"prompt": "x"}, "prompt"),
    ],
)
def test_a_wrong_chat_names_its_field(fields, field):
    with pytest.raises(ConfigError) as caught:
        parse(chat(**fields), ChatRequest)
    assert param_of(caught.value.message) == field


@pytest.mark.parametrize("prompt", [None, 3, [True], [1.5], [[1]], "", [], [""], ["a", "b"], [1, "a"], [1] * 65])
def test_a_prompt_is_one_text_or_one_list_of_tokens(prompt):
    with pytest.raises(ConfigError, match=r"^prompt: "):
        parse(completion(prompt=prompt), CompletionRequest).text_or_tokens(64)


def test_prompts_in_each_form():
    for prompt, expected in [("ab", "ab"), (["ab"], "ab"), ([1, 2], (1, 2))]:
        assert parse(completion(prompt=prompt), CompletionRequest).text_or_tokens(64) == expected


def test_neutral_values_of_what_we_do_not_implement_are_accepted():
    neutral = {"n": 1, "best_of": 1, "echo": False, "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0}
    parse(completion(**neutral, suffix=None, user="someone", stop=None), CompletionRequest)
    parse(chat(n=1, tools=[], top_logprobs=0, logprobs=False), ChatRequest)


def test_sampling_keeps_what_was_asked():
    request = parse(completion(temperature=0, top_p=0.5, seed=-3, stop="\n", ignore_eos=True), CompletionRequest)
    sampling = request.sampling(max_tokens=7)
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.seed) == (7, 0.0, 0.5, -3)
    assert (sampling.stop, sampling.ignore_eos, sampling.logprobs) == (("\n",), True, False)
    assert parse(completion(stop=["a", "b"]), CompletionRequest).stops() == ("a", "b")


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (lambda: parse(completion(n=16, logprobs=0), CompletionRequest), (16, True, 0)),
        (lambda: parse(completion(n=None, logprobs=5), CompletionRequest), (1, True, 5)),
        (lambda: parse(completion(), CompletionRequest), (1, False, 0)),
        (lambda: parse(chat(n=2, logprobs=True), ChatRequest), (2, True, 0)),
        (lambda: parse(chat(logprobs=True, top_logprobs=20), ChatRequest), (1, True, 20)),
        (lambda: parse(chat(logprobs=None, top_logprobs=0), ChatRequest), (1, False, 0)),
    ],
)
def test_choices_and_logprobs_of_each_kind(request_, expected):
    sampling = request_().sampling(max_tokens=3)
    assert (sampling.choices, sampling.logprobs, sampling.top_logprobs) == expected


def test_defaults_are_openais():
    sampling = parse(completion(), CompletionRequest).sampling(max_tokens=16)
    assert (sampling.temperature, sampling.top_p, sampling.seed, sampling.stop) == (1.0, 1.0, None, ())


def test_chat_text_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = parse(chat(messages=[{"role": "user", "content": parts}]), ChatRequest)
    assert request.messages[0].text() == "ab"


def test_events():
    body = ErrorBody(ErrorDetail(message="m", type="t", code="c"))
    assert event(body) == b'data: {"error":{"message":"m","type":"t","code":"c","param":null}}\n\n'
    assert DONE == b"data: [DONE]\n\n"


@pytest.mark.parametrize("message", ["no field here", "this server: is one", "", "a" * 100 + ": x"])
def test_messages_without_a_field_have_no_param(message):
    assert param_of(message) is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
field_names = st.sampled_from([*CompletionRequest.__struct_fields__, *ChatRequest.__struct_fields__, "rid", "zzz"])


def refused_or_parsed(payload: bytes) -> None:
    for kind in (CompletionRequest, ChatRequest, AbortRequest):
        try:
            request = parse(payload, kind)
            if isinstance(request, CompletionRequest):
                request.text_or_tokens(64)
        except ConfigError:
            continue


@given(st.binary(max_size=64))
def test_any_bytes_are_refused_or_parsed(payload):
    refused_or_parsed(payload)


@given(st.dictionaries(field_names, json_values, max_size=6), st.booleans())
def test_any_json_object_is_refused_or_parsed(fields, valid_prompt):
    refused_or_parsed(json.dumps({**fields, **({"prompt": "x"} if valid_prompt else {})}).encode())


@pytest.mark.parametrize("opening", [b"[", b'{"prompt":', b'{"tools":['])
def test_deep_nesting_is_refused(opening):
    for kind in (CompletionRequest, ChatRequest):
        with pytest.raises(ConfigError):
            parse(opening * 10_000, kind)

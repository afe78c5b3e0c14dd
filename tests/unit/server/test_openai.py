"""The OpenAI structs: what is refused, how it is named, and that no bytes at all get past it any other way."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbaton.errors import ConfigError
from kvbaton.serving.server.fields import MAX_UNKNOWN_NAMES, FieldRule, known
from kvbaton.serving.server.openai import (
    DONE,
    AbortRequest,
    ChatRequest,
    CompletionRequest,
    ErrorBody,
    ErrorDetail,
    event,
    param_of,
)
from kvbaton.serving.server.parsing import parse
from kvbaton.serving.server.routing import MAX_RID_CHARACTERS
from kvbaton.serving.server.sglang import GenerateRequest


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
        ({"best_of": 17}, "best_of"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 3, "n": 2, "stream": True}, "best_of"),
        ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs"),
        ({"suffix": "y"}, "suffix"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"guided_regex": "a*"}, "guided_regex"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"return_hidden_states": True}, "return_hidden_states"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
        ({"rid": "a b"}, "rid"),
        ({"rid": "a" * (MAX_RID_CHARACTERS + 1)}, "rid"),
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
        ({"messages": [{"role": "user", "content": None}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages"),
        ({"tools": {}}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"functions": [{}]}, "functions"),
        ({"modalities": ["text", "audio"]}, "modalities"),
    ],
)
def test_a_wrong_chat_names_its_field(fields, field):
    def asked():
        request = parse(chat(**fields), ChatRequest)
        request.turns()
        request.template_options()

    with pytest.raises(ConfigError) as caught:
        asked()
    assert param_of(caught.value.message) == field


@pytest.mark.parametrize(
    "prompt", [None, 3, [True], [1.5], [[]], "", [], [""], ["a", 1], [1, "a"], [1] * 65, [[1], [1] * 65]]
)
def test_a_prompt_is_text_or_tokens(prompt):
    with pytest.raises(ConfigError, match=r"^prompt: "):
        parse(completion(prompt=prompt), CompletionRequest).prompts(64)


def test_prompts_in_each_form():
    for prompt, expected in [
        ("ab", ["ab"]),
        (["ab"], ["ab"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [(1, 2)]),
        ([[1, 2], [3]], [(1, 2), (3,)]),
    ]:
        assert parse(completion(prompt=prompt), CompletionRequest).prompts(64) == expected


def test_neutral_values_of_what_we_do_not_implement_are_accepted():
    neutral = {"n": 1, "best_of": 1, "echo": False, "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0}
    parse(completion(**neutral, suffix=None, user="someone", stop=None), CompletionRequest)
    parse(chat(n=1, tools=[], top_logprobs=0, logprobs=False), ChatRequest)


#: What sglang-router 0.3.2 adds to every request.
SGLANG_COMPLETION = {
    "echo": False,
    "no_stop_trim": False,
    "ignore_eos": False,
    "skip_special_tokens": True,
    "return_hidden_states": False,
}
SGLANG_CHAT = {
    "logprobs": False,
    "no_stop_trim": False,
    "ignore_eos": False,
    "continue_final_message": False,
    "skip_special_tokens": True,
    "separate_reasoning": True,
    "stream_reasoning": True,
    "return_hidden_states": False,
}
OPENAI_NEUTRAL = {
    "response_format": {"type": "text"},
    "store": False,
    "metadata": {"a": "b"},
    "service_tier": "auto",
    "user": "someone",
    "suffix": "",
}
OPENAI_CHAT = {
    "tool_choice": "none",
    "parallel_tool_calls": True,
    "chat_template_kwargs": {"enable_thinking": False},
    "reasoning_effort": "low",
    "modalities": ["text"],
}
VLLM_NEUTRAL = {"repetition_penalty": 1.0, "top_k": -1, "min_p": 0, "use_beam_search": False, "length_penalty": 1}


def test_what_other_clients_always_send_is_accepted():
    for more in (SGLANG_COMPLETION, OPENAI_NEUTRAL, VLLM_NEUTRAL, dict.fromkeys(known("completions"))):
        parse(completion(**more), CompletionRequest, FieldRule(strict=True))
    for more in (SGLANG_CHAT, {**OPENAI_NEUTRAL, **OPENAI_CHAT}, VLLM_NEUTRAL, dict.fromkeys(known("chat"))):
        if "suffix" in more:
            more = {name: value for name, value in more.items() if name != "suffix"}
        parse(chat(**more), ChatRequest, FieldRule(strict=True)).template_options()


def test_numbers_that_are_truths_are_not_neutral():
    for value in (0, "false", [False]):
        with pytest.raises(ConfigError, match="use_beam_search"):
            parse(completion(use_beam_search=value), CompletionRequest)


def test_a_field_that_nobody_knows_is_ignored_counted_and_named_once(caplog):
    counted = []
    rule = FieldRule(count=counted.append)
    for _ in range(2):
        parse(completion(surprise=1, other={"a": []}), CompletionRequest, rule)
        parse(completion(surprise=1, padding="x" * 100_000), CompletionRequest, rule)
    assert counted == ["other", "surprise", "surprise"] * 2
    assert sum("surprise" in record.getMessage() for record in caplog.records) == 1
    with pytest.raises(ConfigError, match=r"^surprise: "):
        parse(completion(surprise=1), CompletionRequest, FieldRule(strict=True))


def test_unknown_names_are_bounded():
    counted = []
    rule = FieldRule(count=counted.append)
    parse(completion(**{f"f{number}" * 30: 1 for number in range(200)}), CompletionRequest, rule)
    assert len(set(counted)) == MAX_UNKNOWN_NAMES + 1
    assert max(map(len, counted)) <= 64


def test_messages_come_back_as_sdks_send_them():
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": "q", "name": "me"},
        {"role": "assistant", "content": None, "refusal": None, "annotations": [], "audio": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "42", "cache_control": {}}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}], "function_call": None},
        {"role": "assistant", "refusal": "no"},
    ]
    turns = parse(chat(messages=messages), ChatRequest, FieldRule(strict=True)).turns()
    assert turns[0] == {"role": "user", "content": "q", "name": "me"}
    assert turns[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert turns[2] == {"role": "tool", "content": "42", "tool_call_id": "c1"}
    assert [turn["content"] for turn in turns] == ["q", "", "42", "no", ""]


def test_what_a_template_is_given():
    tools = [{"type": "function", "function": {"name": "f"}}]
    asked = parse(chat(tools=tools, chat_template_kwargs={"a": 1}, reasoning_effort="low"), ChatRequest)
    assert asked.template_options() == {
        "a": 1,
        "reasoning_effort": "low",
        "tools": tools,
        "add_generation_prompt": True,
        "continue_final_message": False,
    }
    assert "tools" not in parse(chat(tools=tools, tool_choice="none"), ChatRequest).template_options()
    continued = parse(chat(continue_final_message=True), ChatRequest).template_options()
    assert (continued["add_generation_prompt"], continued["continue_final_message"]) == (False, True)


def test_where_the_halves_of_each_prompt_meet():
    def meet(prompts, choices=1, **fields):
        found = parse(completion(**fields), CompletionRequest).meetings(prompts, choices)
        return found and [(meeting.room, meeting.host, meeting.port) for meeting in found]

    assert meet(1) is None
    assert meet(2, bootstrap_room=7, bootstrap_host="h") == [(7, "h", 8998), (8, "h", 8998)]
    assert meet(2, bootstrap_room=(1 << 63) - 1) == [((1 << 63) - 1, None, 8998), (1, None, 8998)]
    lists = {"bootstrap_room": [5, 9], "bootstrap_host": ["h", "h"], "bootstrap_port": [1, None]}
    assert meet(2, **lists) == [(5, "h", 1), (9, "h", 8998)]
    assert meet(1, 2, **lists) == [(5, "h", 1)]
    for wrong in (
        {"bootstrap_room": 0},
        {"bootstrap_room": 1 << 63},
        {"bootstrap_room": [1, 1]},
        {"bootstrap_room": [1, 2, 3]},
        {"bootstrap_room": 1, "bootstrap_port": 0},
        {"bootstrap_room": 1, "bootstrap_host": ""},
    ):
        with pytest.raises(ConfigError, match=r"^bootstrap_"):
            meet(2, **wrong)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids"),
        ({"stop_token_ids": [1] * 65}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": [1 << 64]}, "stop_token_ids"),
        ({"logit_bias": {"-1": 1.0}}, "logit_bias"),
        ({"logit_bias": {str(1 << 64): 1.0}}, "logit_bias"),
    ],
)
def test_lists_of_tokens_are_checked(fields, field):
    with pytest.raises(ConfigError, match=rf"^{field}: "):
        parse(completion(**fields), CompletionRequest).sampling(max_tokens=1)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "text"),
        ({"text": "a", "input_ids": [1]}, "text"),
        ({"text": [1]}, "text"),
        ({"input_ids": "a"}, "input_ids"),
        ({"text": "a", "return_logprob": True, "logprob_start_len": -2}, "logprob_start_len"),
        ({"text": "a", "return_logprob": True, "logprob_start_len": 2}, "logprob_start_len"),
        ({"text": "a", "return_logprob": [True, True]}, "return_logprob"),
        ({"text": "a", "sampling_params": []}, "sampling_params"),
        ({"text": "a", "sampling_params": {"top_k": "a"}}, "sampling_params"),
        ({"text": "a", "sampling_params": {"regex": "a"}}, "regex"),
        ({"text": "a", "return_hidden_states": True}, "return_hidden_states"),
    ],
)
def test_a_wrong_generate_names_its_field(fields, field):
    def served() -> None:
        request = parse(json.dumps(fields).encode(), GenerateRequest)
        request.prompts(64)
        request.asked([(97,)])

    with pytest.raises(ConfigError, match=rf"^{field}"):
        served()


def test_generate_as_sglangs_clients_send_it():
    params = {"max_new_tokens": 8, "temperature": 0.0, "stop": ["x"], "n": 2, "top_k": -1, "sampling_seed": 4}
    fields = {"text": "a", "sampling_params": params, "return_logprob": True, "logprob_start_len": -1}
    router = {"return_text_in_logprobs": True, "log_metrics": True, "background": False, "no_logs": False}
    more = {"return_bytes": False, "return_entropy": False, "stream": False}
    payload = json.dumps({**fields, **router, **more}).encode()
    request = parse(payload, GenerateRequest, FieldRule(strict=True))
    (asked,) = request.asked([(97,)])
    assert (asked.max_new_tokens, asked.start) == (8, None)
    sampling = asked.sampling
    assert (sampling.choices, sampling.stop, sampling.seed, sampling.logprobs) == (2, ("x",), 4, True)
    assert request.prompts(64) == ["a"]
    assert request.is_batch


def test_sampling_keeps_what_was_asked():
    request = parse(completion(temperature=0, top_p=0.5, seed=-3, stop="\n", ignore_eos=True), CompletionRequest)
    sampling = request.sampling(max_tokens=7)
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.seed) == (7, 0.0, 0.5, -3)
    assert (sampling.stop, sampling.ignore_eos, sampling.logprobs) == (("\n",), True, False)
    assert parse(completion(stop=["a", "b"]), CompletionRequest).sampling(max_tokens=1).stop == ("a", "b")


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
    assert request.turns() == [{"role": "user", "content": "ab"}]


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
field_names = st.sampled_from(
    sorted(
        {
            *(name for kind in (CompletionRequest, ChatRequest, GenerateRequest) for name in kind.__struct_fields__),
            "zzz",
        }
    )
)


def refused_or_parsed(payload: bytes) -> None:
    for kind in (CompletionRequest, ChatRequest, GenerateRequest, AbortRequest):
        try:
            request = parse(payload, kind)
            if isinstance(request, CompletionRequest | GenerateRequest):
                if isinstance(request, CompletionRequest):
                    request.sampling(max_tokens=1)
                else:
                    request.asked([(1,)])
                request.meetings(1, 1)
                request.prompts(64)
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

"""The OpenAPI document of a server, made of the structs that really decode and encode and of the table of fields that
are known besides: ``GET /openapi.json``.

Rules: what a struct cannot say (a field that is known and accepted at its neutral value only, a prompt that must not be
empty, who may name a room) is added here and nowhere else; a test compares the paths with the routes, and a fuzzer the
answers with the schemas.

This file must not know engines or workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from kvbaton import __version__
from kvbaton.serving.engine.request import MAX_CHOICES, MAX_STOP_TOKENS, MAX_TOP_LOGPROBS, Handoff
from kvbaton.serving.server.fields import Kind as FieldKind
from kvbaton.serving.server.fields import known
from kvbaton.serving.server.journal import JOURNAL_FIELD
from kvbaton.serving.server.openai import (
    MAX_TOKEN_ID,
    AbortRequest,
    ChatChoice,
    ChatRequest,
    CompletionChoice,
    CompletionRequest,
    ErrorBody,
    PromptLogprobs,
    Usage,
)
from kvbaton.serving.server.prompts import MAX_PROMPTS
from kvbaton.serving.server.routing import PAIR_PATH, ROOM_END, HandOver
from kvbaton.serving.server.sglang import Generated, GenerateRequest, SamplingParams
from kvbaton.serving.server.story import PATH as STORY_PATH
from kvbaton.serving.server.story import RoomStory
from kvbaton.serving.server.tokenizing import DetokenizeRequest, Text, TokenizeRequest, Tokens

PATH = "/openapi.json"
LAYOUT_PATH = "/layout"
WORKERS_PATH = "/workers"
Kind = Literal["null", "prefill", "decode", "router"]
_Json = dict[str, Any]
_REF = "#/components/schemas/"
#: Statuses of a request for tokens, but for 200.
_REFUSALS = {
    "400": "something in the request is wrong; the message begins with the field",
    "401": "no API key of this server; not the router, that alone names rooms here; another site or host",
    "404": "no such route, or no such model",
    "408": "the body did not arrive in time",
    "409": "this request id or room is live already",
    "413": "the body is too large",
    "415": "a body is application/json, and not compressed",
    "429": "too many at once; try again later",
    "499": "the request was aborted",
    "500": "a bug",
    "502": "the other side broke the protocol, or a worker answers with something else than an answer",
    "503": "try again later",
    "504": "a deadline passed",
}


class CompletionAnswer(Struct, kw_only=True):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType = UNSET
    handoff: Handoff | UnsetType = UNSET


class ChatCompletionAnswer(Struct, kw_only=True):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | UnsetType = UNSET
    handoff: Handoff | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Model(Struct, kw_only=True):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelInfo(Struct, kw_only=True):
    model_path: str
    served_model_name: str
    is_generation: bool
    max_model_len: int


class Models(Struct, kw_only=True):
    object: Literal["list"]
    data: list[Model]


class Health(Struct, kw_only=True):
    status: Literal["ok", "failed"]
    reason: str | UnsetType = UNSET


class Ready(Struct, kw_only=True):
    """``draining``: it is about to stop. Of a server also what it is, and (``admits``) whether it takes requests of who
    asks: with a shared secret, from its router."""

    ready: bool
    reason: str
    draining: bool | UnsetType = UNSET
    mode: Literal["null", "prefill", "decode"] | UnsetType = UNSET
    instance: str | UnsetType = UNSET
    protocol: int | UnsetType = UNSET
    admits: bool | UnsetType = UNSET


class Drained(Struct, kw_only=True):
    """``requests`` are still being answered."""

    draining: bool
    requests: int


class AddWorker(Struct, kw_only=True):
    """A server that a router is to send requests to; ``bootstrap_port`` is that of prefill's registry."""

    url: Annotated[str, Meta(min_length=1, max_length=2048)]
    worker_type: Literal["prefill", "decode"]
    bootstrap_port: Annotated[int, Meta(ge=1, le=65535)] | None = None


def document(kind: Kind, *, strict: bool = False) -> _Json:
    """The document of one kind of server; ``strict``: it refuses fields that nobody knows."""
    types = (
        CompletionRequest,
        ChatRequest,
        AbortRequest,
        HandOver,
        Drained,
        AddWorker,
        GenerateRequest,
        SamplingParams,
        TokenizeRequest,
        DetokenizeRequest,
        CompletionAnswer,
        ChatCompletionAnswer,
        Generated,
        Tokens,
        Text,
        ModelInfo,
        Model,
        Models,
        Health,
        Ready,
        ErrorBody,
        RoomStory,
    )
    _, components = msgspec.json.schema_components(types, ref_template=_REF + "{name}")
    schemas: _Json = {name: dict(schema) for name, schema in components.items()}
    for request in (CompletionRequest, ChatRequest, GenerateRequest):
        _tighten(schemas[request.__name__], request.kind, kind, strict=strict)
    _fill(schemas["SamplingParams"], "sampling_params")
    for name, values in _RAW.items():
        schemas[name]["properties"].update(values)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"kvbaton {'router' if kind == 'router' else f'server, mode {kind}'}",
            "version": __version__,
            "description": "OpenAI routes and their additions; see docs/security.md for who may call what.",
        },
        "paths": _paths(kind),
        "components": {"schemas": schemas},
    }


def encoded(kind: Kind, *, strict: bool = False) -> bytes:
    """The document as it is served."""
    return msgspec.json.encode(document(kind, strict=strict))


def _paths(kind: Kind) -> _Json:
    info = _get("facts about this server", {"200": _json({"type": "object"})})
    story = _get(
        "what happened to a room; needs the shared secret as a bearer token where there is one",
        {
            "200": _json(_ref("RoomStory")),
            "400": _json(_ref("ErrorBody")),
            "401": _json(_ref("ErrorBody")),
            "404": _json({"anyOf": [_ref("RoomStory"), _ref("ErrorBody")]}),
            "504": _json(_ref("ErrorBody")),
        },
    )
    room = {"type": "integer", "minimum": 0, "maximum": (1 << 63) - 1}
    story["get"]["parameters"] = [_path_parameter("room", room)]
    model = _get(
        "the model of that name",
        {"200": _json(_ref("Model")), "404": _json(_ref("ErrorBody"))},
    )
    model["get"]["parameters"] = [_path_parameter("model", {"type": "string"})]
    model_info = _get(
        "the model, as SGLang tells of it", {"200": _json(_ref("ModelInfo")), "503": _json(_ref("ErrorBody"))}
    )
    paths = {
        "/v1/completions": _answers("CompletionRequest", _ref("CompletionAnswer")),
        "/v1/chat/completions": _answers("ChatRequest", _ref("ChatCompletionAnswer")),
        "/generate": _answers("GenerateRequest", {"anyOf": [_ref("Generated"), _list(_ref("Generated"))]}),
        "/tokenize": _question("text to tokens", "TokenizeRequest", "Tokens"),
        "/detokenize": _question("tokens to text", "DetokenizeRequest", "Text"),
        "/abort_request": _post(
            "end a request soon; an unknown one is ignored",
            {"200": _json(_ref("AbortRequest")), **_refusals("400", "401", "408", "413", "415", "429", "503")},
            body=_body("AbortRequest"),
        ),
        "/v1/models": _get("the models that are served", {"200": _json(_ref("Models"))}),
        "/v1/models/{model}": model,
        "/get_model_info": model_info,
        "/model_info": model_info,
        "/health": _get("whether the process lives", {code: _json(_ref("Health")) for code in ("200", "503")}),
        "/ready": _get("whether it takes requests", {code: _json(_ref("Ready")) for code in ("200", "503")}),
        "/metrics": _get("Prometheus", {"200": _content("text/plain", {"type": "string"})}),
        "/get_server_info": info,
        "/server_info": info,
        STORY_PATH: story,
        PATH: _get("this document", {"200": _json({"type": "object"})}),
    }
    if kind != "router":
        refusals = _refusals("400", "401", "408", "409", "413", "415", "429")
        paths["/hand_over"] = _post(
            "another decode server is to have what is left of a request; the router asks",
            {"200": _json(_ref("HandOver")), **refusals},
            body=_body("HandOver"),
        )
        paths["/drain"] = _post(
            "end admission as SIGTERM does, and go on running; operators ask",
            {"200": _json(_ref("Drained")), **_refusals("400", "401", "415")},
        )
        ranks = {"type": "array", "items": {"type": "object"}}
        paths[LAYOUT_PATH] = _get(
            "the memory of every rank, as kvbaton check reads it; for the same people as a room's story",
            {"200": _json(ranks), **{code: _json(_ref("ErrorBody")) for code in ("400", "401")}},
        )
        paths[PAIR_PATH] = _get(
            "whether decode finds the prefill group of ?bootstrap_host=H&bootstrap_port=P; for its router",
            {"200": _json({"type": "object"}), **{code: _json(_ref("ErrorBody")) for code in ("400", "401", "503")}},
        )
    else:
        refusals = _refusals("400", "401", "404", "408", "413", "415")
        accepted = {"202": _json({"type": "object"}), **refusals}
        paths[WORKERS_PATH] = {
            **_get(
                "the workers and what is known of them; for operators", {"200": _json({"type": "object"}), **refusals}
            ),
            **_post("one more worker", accepted, body=_body("AddWorker")),
        }
        paths[WORKERS_PATH + "/{id}"] = {
            "delete": {
                "summary": "one worker less",
                "responses": accepted,
                "parameters": [_path_parameter("id", {"type": "string"})],
            }
        }
    return paths


def _answers(request: str, answer: _Json) -> _Json:
    ok = _json(answer)
    ok["content"]["text/event-stream"] = {}
    return _post("tokens", {"200": ok, **_refusals(*_REFUSALS)}, body=_body(request))


def _path_parameter(name: str, schema: _Json) -> _Json:
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _post(summary: str, responses: _Json, body: _Json | None = None) -> _Json:
    return {"post": {"summary": summary, "responses": responses, **({"requestBody": body} if body else {})}}


def _question(summary: str, request: str, answer: str) -> _Json:
    codes = ("400", "404", "408", "413", "415", "429", "503")
    return _post(summary, {"200": _json(_ref(answer)), **_refusals(*codes)}, body=_body(request))


def _refusals(*codes: str) -> _Json:
    return {code: {**_json(_ref("ErrorBody")), "description": _REFUSALS[code]} for code in codes}


def _get(summary: str, responses: _Json) -> _Json:
    return {"get": {"summary": summary, "responses": responses}}


def _body(name: str) -> _Json:
    return {"required": True, "content": {"application/json": {"schema": _ref(name)}}}


def _ref(name: str) -> _Json:
    return {"$ref": _REF + name}


def _json(schema: _Json) -> _Json:
    return _content("application/json", schema)


def _content(kind: str, schema: _Json) -> _Json:
    return {"description": "see the schema", "content": {kind: {"schema": schema}}}


def _list(items: _Json, **bounds: int) -> _Json:
    return {"type": "array", "items": items, **bounds}


def _nullable(*kinds: _Json) -> _Json:
    return {"anyOf": [*kinds, {"type": "null"}]}


def _for_each(one: _Json) -> _Json:
    """One for all prompts, or a list with one for each."""
    return _nullable(one, _list(one, minItems=1, maxItems=MAX_PROMPTS))


_TEXT: _Json = {"type": "string", "minLength": 1}
_TOKENS = _list({"type": "integer"}, minItems=1)
_TEXTS = _list(_TEXT, minItems=1, maxItems=MAX_PROMPTS)
_TOKEN_LISTS = _list(_TOKENS, minItems=1, maxItems=MAX_PROMPTS)
_PROMPT: _Json = {"anyOf": [_TEXT, _TOKENS, _TEXTS, _TOKEN_LISTS]}
_OBJECTS = _nullable(_list({"type": "object"}))
_LISTS: _Json = {
    "logit_bias": _nullable(
        {"type": "object", "propertyNames": {"pattern": "^[0-9]+$"}, "additionalProperties": {"type": "number"}}
    ),
    "stop_token_ids": _nullable(
        _list({"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID}, maxItems=MAX_STOP_TOKENS)
    ),
}
#: What a struct keeps as bytes until its length is known.
_RAW: Mapping[str, _Json] = {
    "CompletionRequest": {"prompt": _PROMPT, **_LISTS},
    "ChatRequest": {
        **_LISTS,
        "tools": _OBJECTS,
        "tool_choice": {"enum": ["none", "auto", None]},
        "chat_template_kwargs": _nullable({"type": "object"}),
    },
    "ChatMessage": {"tool_calls": _OBJECTS},
    "SamplingParams": _LISTS,
    "GenerateRequest": {
        "text": _nullable(_TEXT, _TEXTS),
        "input_ids": _nullable(_TOKENS, _TOKEN_LISTS),
        "return_logprob": _for_each({"type": "boolean"}),
        "logprob_start_len": _for_each({"type": "integer", "minimum": -1, "maximum": 1 << 24}),
        "top_logprobs_num": _for_each({"type": "integer", "minimum": 0, "maximum": MAX_TOP_LOGPROBS}),
        "sampling_params": _for_each(_ref("SamplingParams")),
    },
    "TokenizeRequest": {"prompt": _nullable(_TEXT), "messages": _OBJECTS, "tools": _OBJECTS},
    "DetokenizeRequest": {"tokens": _TOKENS},
}
_ROOM: _Json = {"type": "integer", "minimum": 1, "maximum": ROOM_END - 1}
_PORT: _Json = {"type": "integer", "minimum": 1, "maximum": 65535}
_HOST: _Json = {"type": "string", "minLength": 1, "maxLength": 255}
_MEETING: Mapping[str, _Json] = {"bootstrap_room": _ROOM, "bootstrap_host": _HOST, "bootstrap_port": _PORT}


def _fill(schema: _Json, of: FieldKind) -> None:
    """Add the fields of the table."""
    more = {name: field.schema() for name, field in known(of).items()}
    schema["properties"] = {**more, **schema["properties"]}


def _tighten(schema: _Json, of: FieldKind, kind: Kind, *, strict: bool) -> None:
    """Say of a request what its struct cannot say."""
    _fill(schema, of)
    if strict:
        schema["additionalProperties"] = False
    fields = dict(schema["properties"])
    for name, one in _MEETING.items():
        item = _nullable(one) if name == "bootstrap_port" else one  # the registry's usual port, as alone
        fields[name] = _nullable(one, _list(item, minItems=1))
    rooms = ("bootstrap_host", "bootstrap_port", "bootstrap_room")
    fields[JOURNAL_FIELD] = {"type": "null" if kind in ("null", "router") else ["object", "null"]}
    if kind == "router":
        for name in (*rooms, "kv_transfer_params"):
            fields.pop(name, None)
        dropped = "^(bootstrap_|disagg_(?!prefill_dp_rank$)|kv_transfer_params$)"
        schema["patternProperties"] = {dropped: {"description": "dropped"}}
    elif kind == "null":
        for name in (*rooms, "disagg_prefill_dp_rank"):
            fields[name] = {"type": "null"}
    else:  # one half of a pair: a room is what it is asked for
        for name in ("bootstrap_room", *(("bootstrap_host",) if kind == "decode" else ())):
            fields[name] = {"anyOf": fields[name]["anyOf"][:2]}
            schema["required"] = [*schema.get("required", ()), name]
    schema["properties"] = fields
    schema["allOf"] = []
    if "stream_options" in fields:
        schema["allOf"].append(_needs("stream_options", {"type": "object"}, "stream", {"const": True}))
    if "top_logprobs" in fields:
        schema["allOf"].append(_needs("top_logprobs", {"type": "integer", "minimum": 1}, "logprobs", {"const": True}))
    if "echo" in fields:
        schema["allOf"].append(_needs("echo", {"const": True}, "logprobs", {"type": "null"}, needed=False))
        more = {"if": _holds("n", {"type": "integer", "minimum": 2}), "then": {"properties": {"best_of": _LEAST_TWO}}}
        schema["allOf"].append(more)
    if of == "generate":
        schema["oneOf"] = [_holds(name, {"not": {"type": "null"}}) for name in ("text", "input_ids")]


_LEAST_TWO = _nullable({"type": "integer", "minimum": 2, "maximum": MAX_CHOICES})


def _needs(name: str, value: _Json, other: str, must: _Json, *, needed: bool = True) -> _Json:
    """Where ``name`` has such a value, ``other`` must be there, if it is ``needed``, and be as ``must`` says."""
    then = _holds(other, must) if needed else {"properties": {other: must}}
    return {"if": _holds(name, value), "then": then}


def _holds(name: str, value: _Json) -> _Json:
    return {"properties": {name: value}, "required": [name]}

"""The OpenAPI document of a server, made of the structs that really decode and encode: ``GET /openapi.json``.

Rules: what a struct cannot say (a field that is known and accepted at its neutral value only, a prompt that must not be
empty, who may name a room) is added here and nowhere else; a test compares the paths with the routes, and a fuzzer the
answers with the schemas.

This file must not know engines or workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

from kvbaton import __version__
from kvbaton.serving.engine.request import Handoff
from kvbaton.serving.server.openai import (
    AbortRequest,
    ChatChoice,
    ChatRequest,
    CompletionChoice,
    CompletionRequest,
    ErrorBody,
    Usage,
)
from kvbaton.serving.server.story import PATH as STORY_PATH
from kvbaton.serving.server.story import RoomStory

PATH = "/openapi.json"
LAYOUT_PATH = "/layout"
Kind = Literal["null", "prefill", "decode", "router"]
_Json = dict[str, Any]
_REF = "#/components/schemas/"
#: Statuses of a request for tokens, but for 200.
_REFUSALS = {
    "400": "something in the request is wrong; the message begins with the field",
    "401": "only the router may name rooms here; or another host's name, or another site's page",
    "404": "no such route",
    "408": "the body did not arrive in time",
    "409": "this request id or room is live already",
    "413": "the body is too large",
    "415": "a body is application/json, and not compressed",
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


class Model(Struct, kw_only=True):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class Models(Struct, kw_only=True):
    object: Literal["list"]
    data: list[Model]


class Health(Struct, kw_only=True):
    status: Literal["ok", "failed"]
    reason: str | UnsetType = UNSET


class Ready(Struct, kw_only=True):
    ready: bool
    reason: str


def document(kind: Kind) -> _Json:
    """The document of one kind of server."""
    types = (
        CompletionRequest,
        ChatRequest,
        AbortRequest,
        CompletionAnswer,
        ChatCompletionAnswer,
        Models,
        Health,
        Ready,
        ErrorBody,
        RoomStory,
    )
    _, components = msgspec.json.schema_components(types, ref_template=_REF + "{name}")
    schemas: _Json = {name: dict(schema) for name, schema in components.items()}
    for name in ("CompletionRequest", "ChatRequest"):
        _tighten(schemas[name], kind)
    prompt: _Json = {"type": "string", "minLength": 1}
    tokens: _Json = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
    text: _Json = {"type": "array", "items": prompt, "minItems": 1, "maxItems": 1}
    schemas["CompletionRequest"]["properties"]["prompt"] = {"anyOf": [prompt, tokens, text]}
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


def encoded(kind: Kind) -> bytes:
    """The document as it is served."""
    return msgspec.json.encode(document(kind))


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
    story["get"]["parameters"] = [{"name": "room", "in": "path", "required": True, "schema": room}]
    paths = {
        "/v1/completions": _answers("CompletionRequest", "CompletionAnswer"),
        "/v1/chat/completions": _answers("ChatRequest", "ChatCompletionAnswer"),
        "/abort_request": {
            "post": {
                "summary": "end a request soon; an unknown one is ignored",
                "requestBody": _body("AbortRequest"),
                "responses": {
                    "200": _json(_ref("AbortRequest")),
                    **_refusals("400", "401", "408", "413", "415", "503"),
                },
            }
        },
        "/v1/models": _get("the models that are served", {"200": _json(_ref("Models"))}),
        "/health": _get("whether the process lives", {code: _json(_ref("Health")) for code in ("200", "503")}),
        "/ready": _get("whether it takes requests", {code: _json(_ref("Ready")) for code in ("200", "503")}),
        "/metrics": _get("Prometheus", {"200": _content("text/plain", {"type": "string"})}),
        "/get_server_info": info,
        "/server_info": info,
        STORY_PATH: story,
        PATH: _get("this document", {"200": _json({"type": "object"})}),
    }
    if kind != "router":
        ranks = {"type": "array", "items": {"type": "object"}}
        paths[LAYOUT_PATH] = _get(
            "the memory of every rank, as kvbaton check reads it; for the same people as a room's story",
            {"200": _json(ranks), **{code: _json(_ref("ErrorBody")) for code in ("400", "401")}},
        )
    return paths


def _answers(request: str, answer: str) -> _Json:
    ok = _json(_ref(answer))
    ok["content"]["text/event-stream"] = {}
    responses = {"200": ok, **_refusals(*_REFUSALS)}
    return {"post": {"summary": "tokens", "requestBody": _body(request), "responses": responses}}


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


_NOTHING: Mapping[str, _Json] = {
    # known fields of the API that are accepted at these values only
    "best_of": {"enum": [1, None]},
    "frequency_penalty": {"enum": [0, None]},
    "presence_penalty": {"enum": [0, None]},
    "echo": {"enum": [False, None]},
    "suffix": {"enum": ["", None]},
    "logit_bias": {"anyOf": [{"type": "object", "maxProperties": 0}, {"type": "null"}]},
    "tools": {"anyOf": [{"type": "array", "maxItems": 0}, {"type": "null"}]},
}


def _tighten(schema: _Json, kind: Kind) -> None:
    """Say of a request what its struct cannot say."""
    fields = dict(schema["properties"])
    for name, only in _NOTHING.items():
        if name in fields:
            fields[name] = dict(only)
    rooms = ("bootstrap_host", "bootstrap_port", "bootstrap_room")
    if kind == "router":
        for name in rooms:
            del fields[name]
        dropped = "^(bootstrap_|disagg_(?!prefill_dp_rank$)|kv_transfer_params$)"
        schema["patternProperties"] = {dropped: {"description": "dropped"}}
    elif kind == "null":
        for name in (*rooms, "disagg_prefill_dp_rank"):
            fields[name] = {"type": "null"}
    else:  # one half of a pair: a room is what it is asked for
        for name in ("bootstrap_room", *(("bootstrap_host",) if kind == "decode" else ())):
            fields[name] = fields[name]["anyOf"][0]
            schema["required"] = [*schema["required"], name]
    schema["properties"] = fields
    schema["allOf"] = [_needs("stream_options", {"type": "object"}, "stream", {"const": True})]
    if "top_logprobs" in fields:
        schema["allOf"].append(_needs("top_logprobs", {"type": "integer", "minimum": 1}, "logprobs", {"const": True}))
    if "best_of" in fields:
        one = {"if": _holds("best_of", {"const": 1}), "then": {"properties": {"n": {"enum": [1, None]}}}}
        schema["allOf"].append(one)


def _needs(name: str, value: _Json, other: str, must: _Json) -> _Json:
    """Where ``name`` has such a value, ``other`` must be there and be as ``must`` says."""
    return {"if": _holds(name, value), "then": _holds(other, must)}


def _holds(name: str, value: _Json) -> _Json:
    return {"properties": {name: value}, "required": [name]}

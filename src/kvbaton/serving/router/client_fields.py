"""The fields of a client's request, as a router passes them on: one by one, and otherwise as they are.

This file must not know HTTP, tokens or workers.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping

import msgspec

from kvbaton.errors import ConfigError
from kvbaton.serving.router.calls import ROUTER_FIELDS, strip
from kvbaton.serving.server.bodies import SMALL_BODY_BYTES
from kvbaton.serving.server.fields import KNOWN, FieldRule
from kvbaton.serving.server.journal import JOURNAL_FIELD
from kvbaton.serving.server.openai import ChatRequest, CompletionRequest, checked_rid
from kvbaton.serving.server.sglang import GenerateRequest


def client_fields(payload: bytes, rule: FieldRule | None = None) -> tuple[dict[str, msgspec.Raw], str]:
    """The client's request, field by field and otherwise as it is, and its id. Raises ConfigError.

    Of a large body only fields that some request has: millions of others would each become an object.
    """
    try:
        if len(payload) > SMALL_BODY_BYTES:
            is_strict = rule is not None and rule.strict
            found = msgspec.json.decode(payload, type=_StrictFields if is_strict else _KnownFields)
            named = ((name, getattr(found, name)) for name in found.__struct_fields__)
            fields = strip({name: value for name, value in named if value is not _ABSENT})
        else:
            fields = strip(msgspec.json.decode(payload, type=dict[str, msgspec.Raw]))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"the body is not a JSON object: {error}") from None
    if rule is not None and rule.strict:  # else the servers count them
        rule.met(sorted(fields.keys() - _NAMES))
    if fields.get(JOURNAL_FIELD, _NULL) != _NULL:
        raise ConfigError(f"{JOURNAL_FIELD}: is for a router to say; leave it out")
    if fields.get("rid", _NULL) == _NULL:
        fields["rid"] = _encoded(f"req-{uuid.uuid4().hex}")
    return fields, checked_rid(fields["rid"])


def prompt_of(fields: Mapping[str, msgspec.Raw]) -> bytes:
    """The JSON text of what the answer is to begin with; empty where there is none."""
    return next((bytes(fields[name]) for name in _PROMPTS if name in fields), b"")


_PROMPTS = ("messages", "prompt", "text", "input_ids")
_NULL = msgspec.Raw(b"null")
_ABSENT = msgspec.Raw(b"")
_REQUESTS = (CompletionRequest, ChatRequest, GenerateRequest)
_NAMES = {
    *(name for request in _REQUESTS for name in request.__struct_fields__),
    *(known.name for known in KNOWN),
    *ROUTER_FIELDS,
}
_KnownFields, _StrictFields = (
    msgspec.defstruct(
        "_KnownFields",
        [(name, msgspec.Raw, _ABSENT) for name in sorted(_NAMES)],
        forbid_unknown_fields=strict,
    )
    for strict in (False, True)
)


def _encoded(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))

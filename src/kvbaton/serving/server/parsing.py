"""A request from its JSON, by the rule for fields.

Rules: one pass over the body where every field is known. Where one is not, a second pass skips such fields without
making objects of them; of a small body all their names are told, of a large one the first.

This file must not know HTTP, or what a request means.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from msgspec import Raw, Struct

from kvbaton.errors import ConfigError
from kvbaton.serving.server.fields import FieldRule, Ruled, check_known, with_known

#: A body up to this size is decoded a second time to name every field in it that nobody knows.
_SMALL_BYTES = 64 << 10

_T = TypeVar("_T", bound=Struct)


def parse(payload: bytes, kind: type[_T], rule: FieldRule | None = None) -> _T:
    """A request from its JSON. Raises ConfigError; the message begins with the field's name where there is one."""
    request = _decoded(payload, kind, rule or FieldRule())
    if isinstance(request, Ruled):
        check_known(request, request.kind)
        request.check()
    return request


def _decoded(payload: bytes, kind: type[_T], rule: FieldRule) -> _T:
    strict, lenient = _DECODERS.get(kind) or _decoders(kind)
    try:
        request: _T = strict.decode(payload)
    except msgspec.ValidationError as error:
        name = _unknown(str(error))
        if name is None or lenient is None:
            raise ConfigError(explained(str(error))) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"the body is not JSON: {error}") from None
    else:
        return request
    try:
        request = lenient.decode(payload)
    except msgspec.ValidationError as error:
        raise ConfigError(explained(str(error))) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"the body is not JSON: {error}") from None
    names = [name]
    if len(payload) <= _SMALL_BYTES:
        names = sorted(msgspec.json.decode(payload, type=dict[str, Raw]).keys() - set(request.__struct_fields__))
    rule.met(names)
    return request


def _decoders(kind: type[Struct]) -> _Decoders:
    """One that ends at a field that nobody knows, and one that skips it; there is no second for a request that is not
    in the table."""
    if issubclass(kind, Ruled):
        strict, lenient = (msgspec.json.Decoder(with_known(kind, kind.kind, strict=each)) for each in (True, False))
        return _DECODERS.setdefault(kind, (strict, lenient))
    return _DECODERS.setdefault(kind, (msgspec.json.Decoder(kind), None))


_Decoders = tuple[msgspec.json.Decoder[Any], msgspec.json.Decoder[Any] | None]
_DECODERS: dict[type[Struct], _Decoders] = {}
_UNKNOWN = "Object contains unknown field `"


def _unknown(message: str) -> str | None:
    """The unknown field of the request itself that msgspec names."""
    return message[len(_UNKNOWN) :].rstrip("`") if message.startswith(_UNKNOWN) and " - at `" not in message else None


def explained(message: str) -> str:
    """Put the field first: msgspec says ``Expected `int`, got `str` - at `$.max_tokens```."""
    complaint, at, path = message.rpartition(" - at `$.")
    if at:
        return f"{path.rstrip('`').partition('[')[0]}: {complaint}"
    for known in (_UNKNOWN, "Object missing required field `"):
        if message.startswith(known):
            field = message[len(known) :].rstrip("`")
            return f"{field}: {'is required' if 'missing' in known else 'is not a field of this request'}"
    return message

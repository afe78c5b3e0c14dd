"""The prompts of one request: a text, token ids, or a list of either, decoded within bounds.

Rules: a body of 15 MiB can hold millions of small values, each of which would become an object; so what is inside is
counted in the bytes before anything is decoded.

This file must not know tokenizers or HTTP.
"""

from __future__ import annotations

import re
from typing import NoReturn, TypeVar

import msgspec
from msgspec import Raw

from kvbaton.errors import ConfigError, ContextLengthError
from kvbaton.serving.server.raw import refuse

#: Most prompts of one request.
MAX_PROMPTS = 256
#: Most token ids of all prompts of a request together, where one prompt may not have more.
MAX_BATCH_TOKENS = 1 << 18

Prompt = str | tuple[int, ...]

_T = TypeVar("_T")
_TEXT = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
#: Bytes of a raw value that are looked at before it is decoded.
_GLANCE = 64


def prompts_of(raw: Raw, name: str, most_tokens: int) -> tuple[list[Prompt], bool]:
    """The prompts of the field ``name``, and whether they came as a list of prompts.

    Raises ConfigError for what is none, for an empty one, and for more tokens than ``most_tokens`` in one.
    """
    data = bytes(raw)
    if not data.startswith(b"["):
        return [_text(_decoded(data, str, name), name)], False
    inside = data[1 : 1 + _GLANCE].lstrip()
    if inside.startswith(b'"'):
        _check_count(sum(1 for _, _ in zip(_TEXT.finditer(data), range(MAX_PROMPTS + 1), strict=False)), name)
        return [_text(text, name) for text in _decoded(data, list[str], name)], True
    if inside.startswith(b"["):
        _check_count(data.count(b"[") - 1, name)
        _check_tokens(data, max(most_tokens, MAX_BATCH_TOKENS), name)
        return [_tokens(tokens, most_tokens, name) for tokens in _decoded(data, list[list[int]], name)], True
    _check_tokens(data, most_tokens, name)
    return [_tokens(_decoded(data, list[int], name), most_tokens, name)], False


def _text(text: str, name: str) -> str:
    return text or refuse(name, "must not be empty")


def _tokens(tokens: list[int], most_tokens: int, name: str) -> tuple[int, ...]:
    if len(tokens) > most_tokens:
        _too_many(len(tokens), most_tokens, name)
    return tuple(tokens) or refuse(name, "must not be empty")


def _check_count(count: int, name: str) -> None:
    if count > MAX_PROMPTS:
        refuse(name, f"a request has at most {MAX_PROMPTS} prompts")


def _check_tokens(data: bytes, most_tokens: int, name: str) -> None:
    if data.count(b",") >= most_tokens:
        _too_many(data.count(b",") + 1, most_tokens, name)


def _decoded(data: bytes, kind: type[_T], name: str) -> _T:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError:
        refuse(name, "must be a text, a list of token ids, or a list of texts or of lists of token ids")
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the body is not JSON: {error}") from None


def _too_many(count: int, most_tokens: int, name: str) -> NoReturn:
    raise ContextLengthError(f"{name}: {count} token ids are more than the {most_tokens} tokens of this server")

"""The OpenAI wire format: what ``/v1/completions`` and ``/v1/chat/completions`` are asked and answer.

Rules:

- Decoding is strict: a wrong type, a value out of range or an unknown field is a ConfigError whose message begins with
  the field's name. Fields that we know but do not implement are accepted at their neutral value only, so that nothing
  a client asked for is ignored in silence.
- What is refused, or may be long, stays bytes (``msgspec.Raw``) until its length is known to be within bounds: a body
  of 15 MiB can hold millions of small values, each of which would become an object.
- Additions to the format: ``return_token_ids`` (answers carry ``token_ids``, as vLLM's do), ``ignore_eos``, ``rid``
  (the answer's id, by which its client ends it at ``/abort_request``, as SGLang's), ``bootstrap_host/port/room`` (set
  by the router, never by users), ``data_parallel_rank`` and ``disagg_prefill_dp_rank`` (the data-parallel rank that
  answers, and the one that prefills), and ``handoff`` in the answer of a decode server.

This file must not know HTTP, engines' threads or tokenizers.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType, field

from kvbaton.discovery.registry import MAX_RANKS
from kvbaton.errors import ConfigError
from kvbaton.serving.engine.request import MAX_CHOICES, MAX_TOP_LOGPROBS, Handoff, Sampling

#: max_tokens of a completion that does not say, as OpenAI's; of a chat, clipped to what the model has room for.
COMPLETION_MAX_TOKENS = 16
CHAT_MAX_TOKENS = 1024
#: The registry's port, where a request names only its host.
BOOTSTRAP_PORT = 8998
MAX_RID_CHARACTERS = 128
#: OpenAI's bound of a completion's alternatives; a chat's is MAX_TOP_LOGPROBS, the engine's.
MAX_COMPLETION_LOGPROBS = 5

#: Bytes of a raw value that are looked at before it is decoded.
_GLANCE = 64

_P = TypeVar("_P")
_T = TypeVar("_T", bound="CompletionRequest | ChatRequest | AbortRequest")

_Count = Annotated[int, Meta(ge=1, le=1 << 24)]
_Id = Annotated[str, Meta(min_length=1, max_length=MAX_RID_CHARACTERS, pattern=r"^[\x21-\x7e]+$")]
_Host = Annotated[str, Meta(min_length=1, max_length=255)]
_Port = Annotated[int, Meta(ge=1, le=65535)]
#: A room is a positive 63-bit number: 0 means "none" to other engines, and 64 bits do not survive their int64.
_Room = Annotated[int, Meta(ge=1, le=(1 << 63) - 1)]
_DpRank = Annotated[int, Meta(ge=0, lt=MAX_RANKS)]
_Stop = Annotated[str, Meta(max_length=1024)]


def _null() -> Raw:
    return Raw(b"null")


class StreamOptions(Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool = False


class _Common(Struct, kw_only=True, forbid_unknown_fields=True):
    """What both kinds of request share."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    stop: _Stop | Annotated[list[_Stop], Meta(max_length=64)] | None = None
    max_tokens: _Count | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    user: str | None = None
    # known, and accepted only where they change nothing
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: Raw = field(default_factory=_null)
    # additions
    ignore_eos: bool = False
    return_token_ids: bool | None = None
    rid: _Id | None = None
    bootstrap_host: _Host | None = None
    bootstrap_port: _Port | None = None
    bootstrap_room: _Room | None = None
    data_parallel_rank: _DpRank | None = None
    disagg_prefill_dp_rank: _DpRank | None = None

    def check(self) -> None:
        """Raises ConfigError for a known field with a value that we do not implement."""
        for name in ("frequency_penalty", "presence_penalty"):
            if getattr(self, name):
                _refuse(name, "is not implemented; leave it out or pass 0")
        if not _is_one_of(self.logit_bias, b"null", b"{}"):
            _refuse("logit_bias", "is not implemented; leave it out")
        if self.stream_options is not None and not self.stream:
            _refuse("stream_options", "is only allowed together with stream=true")

    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def choices(self) -> int:
        """Answers that are asked for."""
        return 1 if self.n is None else self.n

    def told(self) -> tuple[bool, int]:
        """Whether logprobs are asked for, and of how many alternatives to each token. Overridden by each kind."""
        raise NotImplementedError

    def sampling(self, *, max_tokens: int) -> Sampling:
        logprobs, top_logprobs = self.told()
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=self.stops(),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            top_logprobs=top_logprobs,
            choices=self.choices,
        )


class CompletionRequest(_Common, kw_only=True, forbid_unknown_fields=True):
    prompt: Raw
    logprobs: Annotated[int, Meta(ge=0, le=MAX_COMPLETION_LOGPROBS)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    def check(self) -> None:
        _Common.check(self)
        if self.echo:
            _refuse("echo", "is not implemented; leave it out")
        if self.suffix:
            _refuse("suffix", "is not implemented; leave it out")
        if self.best_of is not None and (self.best_of, self.choices) != (1, 1):
            _refuse("best_of", "is not implemented; leave it out, n answers are given as they come")

    def told(self) -> tuple[bool, int]:
        return self.logprobs is not None, self.logprobs or 0

    def text_or_tokens(self, most_tokens: int) -> str | tuple[int, ...]:
        """The one prompt: text, or token ids. Raises ConfigError for an empty one, for several, and for more tokens."""
        raw = bytes(self.prompt)
        inside = raw[1 : 1 + _GLANCE].lstrip()
        if not raw.startswith(b"["):
            return _decoded(raw, str) or _refuse("prompt", "must not be empty")
        if inside.startswith((b'"', b"[")):
            return _decoded(raw, tuple[str])[0] or _refuse("prompt", "must not be empty")
        if raw.count(b",") >= most_tokens:
            _refuse("prompt", f"{raw.count(b',') + 1} token ids are more than the {most_tokens} tokens of this server")
        return tuple(_decoded(raw, list[int])) or _refuse("prompt", "must not be empty")


def _decoded(raw: bytes, kind: type[_P]) -> _P:
    """A prompt. Raises ConfigError."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError:
        raise ConfigError("prompt: one prompt per request is implemented: a text, or a list of token ids") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the body is not JSON: {error}") from None


def _is_one_of(raw: Raw, *neutral: bytes) -> bool:
    """Whether a value that is not implemented is one that changes nothing. Not decoded, only looked at."""
    return len(raw) <= _GLANCE and b"".join(bytes(raw).split()) in neutral


class TextPart(Struct, frozen=True, forbid_unknown_fields=True):
    text: str
    type: Literal["text"] = "text"


class ChatMessage(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    role: Annotated[str, Meta(min_length=1, max_length=32)]
    content: str | Annotated[list[TextPart], Meta(max_length=4096)]
    name: str | None = None

    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_Common, kw_only=True, forbid_unknown_fields=True):
    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=4096)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    max_completion_tokens: _Count | None = None
    tools: Raw = field(default_factory=_null)

    def check(self) -> None:
        _Common.check(self)
        if self.top_logprobs and not self.logprobs:
            _refuse("top_logprobs", "is only allowed together with logprobs=true")
        if not _is_one_of(self.tools, b"null", b"[]"):
            _refuse("tools", "is not implemented; leave it out")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            _refuse("max_completion_tokens", "contradicts max_tokens; pass one of them")

    def told(self) -> tuple[bool, int]:
        return bool(self.logprobs), self.top_logprobs or 0

    def asked_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class AbortRequest(Struct, frozen=True, forbid_unknown_fields=True):
    rid: _Id


def checked_rid(raw: Raw) -> str:
    """The id of a request. Raises ConfigError for what cannot be one."""
    try:
        return msgspec.json.decode(raw, type=_Id)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"rid: {error}") from None


class Usage(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(Struct, frozen=True):
    tokens: list[str]
    token_logprobs: list[float]
    text_offset: list[int]
    #: For each token the likeliest ones and itself, by their texts. Of two tokens with one text the likelier is told.
    top_logprobs: list[dict[str, float]] | None = None


class CompletionChoice(Struct, kw_only=True):
    text: str
    finish_reason: str | None
    logprobs: CompletionLogprobs | None = None
    token_ids: list[int] | UnsetType = UNSET
    index: int = 0


class ChatAlternative(Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(ChatAlternative, frozen=True):
    top_logprobs: list[ChatAlternative] = []


class ChatLogprobs(Struct, frozen=True):
    content: list[ChatLogprob]


class ChatAnswer(Struct, frozen=True):
    content: str
    role: Literal["assistant"] = "assistant"


class ChatDelta(Struct, frozen=True):
    content: str
    role: Literal["assistant"] | UnsetType = UNSET


class ChatChoice(Struct, kw_only=True):
    finish_reason: str | None
    message: ChatAnswer | UnsetType = UNSET
    delta: ChatDelta | UnsetType = UNSET
    logprobs: ChatLogprobs | None = None
    token_ids: list[int] | UnsetType = UNSET
    index: int = 0


class Answer(Struct, kw_only=True):
    """A whole answer or one event of a stream, of either kind: ``object`` and the choices tell them apart."""

    id: str
    object: Literal["text_completion", "chat.completion", "chat.completion.chunk"]
    created: int
    model: str
    choices: list[CompletionChoice] | list[ChatChoice]
    usage: Usage | UnsetType | None = UNSET
    handoff: Handoff | UnsetType = UNSET


class ErrorDetail(Struct, frozen=True, kw_only=True):
    message: str
    type: str
    code: str
    param: str | None = None


class ErrorBody(Struct, frozen=True):
    error: ErrorDetail


def parse(payload: bytes, kind: type[_T]) -> _T:
    """A request from its JSON. Raises ConfigError; the message begins with the field's name where there is one."""
    try:
        request = msgspec.json.decode(payload, type=kind)
    except msgspec.ValidationError as error:
        raise ConfigError(_explain(str(error))) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"the body is not JSON: {error}") from None
    if not isinstance(request, AbortRequest):
        request.check()
    return request


def event(body: object) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


#: The event that ends a stream that went well.
DONE = b"data: [DONE]\n\n"


def param_of(message: str) -> str | None:
    """The field that a message of ours begins with (``top_p: must be ...``), or None."""
    field, colon, _ = message.partition(": ")
    return field if colon and len(field) <= 64 and field.replace("_", "").replace(".", "").isalnum() else None


def _explain(message: str) -> str:
    """Put the field first: msgspec says ``Expected `int`, got `str` - at `$.max_tokens```."""
    complaint, at, path = message.rpartition(" - at `$.")
    if at:
        return f"{path.rstrip('`').partition('[')[0]}: {complaint}"
    for known in ("Object contains unknown field `", "Object missing required field `"):
        if message.startswith(known):
            field = message[len(known) :].rstrip("`")
            return f"{field}: {'is required' if 'missing' in known else 'is not a field of this request'}"
    return message


def _refuse(field: str, why: str) -> Any:
    raise ConfigError(f"{field}: {why}")

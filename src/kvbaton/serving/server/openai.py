"""The OpenAI wire format: what ``/v1/completions`` and ``/v1/chat/completions`` are asked and answer.

Rules:

- Decoding is strict where a field is known: a wrong type or a value out of range is a ConfigError whose message begins
  with the field's name. Fields that others know and we do not implement are in the table of ``fields``, which says what
  becomes of them and of fields that nobody knows.
- What is refused, or may be long, stays bytes (``msgspec.Raw``) until its length is known to be within bounds: a body
  of 15 MiB can hold millions of small values, each of which would become an object.
- Additions to the format: those of vLLM and SGLang (``top_k`` and other sampling; ``return_token_ids``: answers carry
  ``token_ids``; ``rid``: the answer's id, by which its client ends it at ``/abort_request``), and those of ``routing``.

This file must not know HTTP, engines' threads or tokenizers.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType, field

from kvbaton.errors import ConfigError
from kvbaton.serving.engine.request import MAX_CHOICES, MAX_STOP_TOKENS, MAX_TOP_LOGPROBS, Handoff, Sampling
from kvbaton.serving.server.fields import Kind
from kvbaton.serving.server.messages import ChatMessage, Turn, template_value
from kvbaton.serving.server.prompts import Prompt, prompts_of
from kvbaton.serving.server.raw import decoded, null, refuse
from kvbaton.serving.server.routing import Id, Routed

#: max_tokens of a completion that does not say, as OpenAI's; of a chat. Both are clipped to what there is room for.
COMPLETION_MAX_TOKENS = 16
CHAT_MAX_TOKENS = 1024
#: OpenAI's bound of a completion's alternatives; a chat's is MAX_TOP_LOGPROBS, the engine's.
MAX_COMPLETION_LOGPROBS = 5
#: Longest list that is decoded where a bound on its length is checked after it: of biases, of tokens that stop.
MAX_LIST_BYTES = 64 << 10

_FROM_NOTHING: dict[str, Any] = {"minimum": 0}
Count = Annotated[int, Meta(ge=1, le=1 << 24)]
Natural = Annotated[int, Meta(ge=0, le=1 << 24)]
TopLogprobs = Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)]
#: To vLLM -1 is the whole vocabulary; it is refused by what says so.
Alternatives = Annotated[int, Meta(ge=-1, le=MAX_TOP_LOGPROBS, extra_json_schema=_FROM_NOTHING)]
CompletionAlternatives = Annotated[int, Meta(ge=-1, le=MAX_COMPLETION_LOGPROBS, extra_json_schema=_FROM_NOTHING)]
Seed = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
#: No vocabulary is larger; what is larger could not be passed on to other ranks.
MAX_TOKEN_ID = (1 << 31) - 1
Stop = Annotated[str, Meta(max_length=1024)]
Stops = Stop | Annotated[list[Stop], Meta(max_length=64)]
Temperature = Annotated[float, Meta(ge=0, le=2)]
TopP = Annotated[float, Meta(gt=0, le=1)]
MinP = Annotated[float, Meta(ge=0, le=1)]
_MOST_ALTERNATIVES = {
    "logprobs": MAX_COMPLETION_LOGPROBS,
    "top_logprobs": MAX_TOP_LOGPROBS,
    "prompt_logprobs": MAX_TOP_LOGPROBS,
}
#: All tokens: -1 to both engines, 0 to vLLM.
TopK = Annotated[int, Meta(ge=-1, le=1 << 31)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Repetition = Annotated[float, Meta(ge=0.01, le=100)]
Choices = Annotated[int, Meta(ge=1, le=MAX_CHOICES)]


class StreamOptions(Struct, frozen=True):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class _Common(Routed, kw_only=True):
    """What both kinds of request share."""

    stream_options: StreamOptions | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    seed: Seed | None = None
    stop: Stops | None = None
    max_tokens: Natural | None = None
    n: Choices | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: Raw = field(default_factory=null)
    # additions
    top_k: TopK | None = None
    min_p: MinP | None = None
    repetition_penalty: Repetition | None = None
    min_tokens: Natural | None = None
    stop_token_ids: Raw = field(default_factory=null)
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    no_stop_trim: bool | None = None
    return_token_ids: bool | None = None
    prompt_logprobs: Alternatives | None = None

    def check(self) -> None:
        """Raises ConfigError for values that do not go together."""
        for name, most in _MOST_ALTERNATIVES.items():
            if getattr(self, name, None) == -1:
                refuse(name, f"-1, the whole vocabulary, is more than this server tells of; pass at most {most}")
        if self.max_tokens == 0 and not self.echoes:
            refuse("max_tokens", "0 is for a completion that only says its prompt again; pass echo=true")
        if self.prompt_logprobs is not None and self.stream:
            refuse("prompt_logprobs", "is told in whole answers only; pass stream=false, or echo with logprobs")
        if self.stream_options is not None and not self.stream:
            refuse("stream_options", "is only allowed together with stream=true")

    @property
    def choices(self) -> int:
        """Answers to each prompt that are asked for."""
        return 1 if self.n is None else self.n

    @property
    def echoes(self) -> bool:
        """Whether the prompt is said again in front of the answer."""
        return False

    def prompt_alternatives(self) -> int | None:
        """Of how many alternatives to each token of the prompt; None: of none."""
        return self.prompt_logprobs

    def _sampling(self, max_tokens: int, *, logprobs: bool, top_logprobs: int | None) -> Sampling:
        """``top_logprobs``: of so many alternatives to each token, too."""
        return Sampling(
            max_tokens=max(1, max_tokens),
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=stops_of(self.stop),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
            top_logprobs=top_logprobs or 0,
            choices=self.choices,
            top_k=max(0, self.top_k or 0),
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            logit_bias=bias_of(self.logit_bias),
            min_tokens=self.min_tokens or 0,
            stop_token_ids=stop_tokens_of(self.stop_token_ids),
            skip_special_tokens=self.skip_special_tokens is not False,
            include_stop=bool(self.include_stop_str_in_output or self.no_stop_trim),
            prompt_logprobs=self.prompt_alternatives(),
        )


class CompletionRequest(_Common, kw_only=True):
    kind: ClassVar[Kind] = "completions"

    prompt: Raw
    logprobs: CompletionAlternatives | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None
    best_of: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None

    def check(self) -> None:
        _Common.check(self)
        if self.best_of is None:
            return
        if self.best_of < self.wanted:
            refuse("best_of", f"{self.best_of} is less than n={self.wanted}")
        if self.stream and self.best_of > self.wanted:
            refuse("best_of", "the best answers are known at their end; pass stream=false")

    @property
    def choices(self) -> int:
        return max(self.wanted, self.best_of or 1)

    @property
    def echoes(self) -> bool:
        return bool(self.echo)

    def prompt_alternatives(self) -> int | None:
        if not self.echo or self.logprobs is None:
            return self.prompt_logprobs
        return max(self.logprobs, self.prompt_logprobs or 0)

    @property
    def wanted(self) -> int:
        """Of the choices, as many are told."""
        return 1 if self.n is None else self.n

    def sampling(self, *, max_tokens: int) -> Sampling:
        told = self.logprobs is not None or self.choices > self.wanted
        return self._sampling(max_tokens, logprobs=told, top_logprobs=self.logprobs)

    def prompts(self, most_tokens: int) -> list[Prompt]:
        """Texts, or token ids. Raises ConfigError for an empty one, for too many, and for more tokens."""
        return prompts_of(self.prompt, "prompt", most_tokens)[0]


class ChatRequest(_Common, kw_only=True):
    kind: ClassVar[Kind] = "chat"

    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=4096)]
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None
    max_completion_tokens: Count | None = None
    tools: Raw = field(default_factory=null)
    tool_choice: Raw = field(default_factory=null)
    chat_template_kwargs: Raw = field(default_factory=null)
    reasoning_effort: Annotated[str, Meta(max_length=32)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    def check(self) -> None:
        _Common.check(self)
        if self.top_logprobs and not self.logprobs:
            refuse("top_logprobs", "is only allowed together with logprobs=true")
        if bytes(self.tool_choice) not in _TOOL_CHOICES:
            refuse("tool_choice", 'is not implemented: no tool can be forced; pass "auto" or "none"')
        if self.continue_final_message and self.add_generation_prompt:
            refuse("continue_final_message", "is not allowed together with add_generation_prompt=true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            refuse("max_completion_tokens", "contradicts max_tokens; pass one of them")

    def sampling(self, *, max_tokens: int) -> Sampling:
        return self._sampling(max_tokens, logprobs=bool(self.logprobs), top_logprobs=self.top_logprobs)

    def asked_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def turns(self) -> list[Turn]:
        """Raises ConfigError."""
        return [message.turn() for message in self.messages]

    def template_options(self) -> dict[str, Any]:
        """What the chat template is given besides the messages. Raises ConfigError."""
        options: dict[str, Any] = dict(
            template_value(self.chat_template_kwargs, "chat_template_kwargs", dict[str, Any]) or {}
        )
        ours = next((name for name in options if name in _TEMPLATE_OURS), None)
        if ours is not None:
            refuse("chat_template_kwargs", f"{ours!r} is not for a request to say")
        if self.reasoning_effort is not None:
            options["reasoning_effort"] = self.reasoning_effort
        tools = template_value(self.tools, "tools", list[dict[str, Any]])
        if tools and bytes(self.tool_choice) != b'"none"':
            options["tools"] = tools
        continues = bool(self.continue_final_message)
        generates = not continues if self.add_generation_prompt is None else self.add_generation_prompt
        return {**options, "add_generation_prompt": generates, "continue_final_message": continues}


_TOOL_CHOICES = (b"null", b'"none"', b'"auto"')
#: Arguments of ``apply_chat_template`` that a client does not choose.
_TEMPLATE_OURS = frozenset(
    {
        *("conversation", "messages", "tools", "documents", "chat_template", "tokenize", "padding", "truncation"),
        *("add_generation_prompt", "continue_final_message", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "tokenizer_kwargs"),
    }
)


_TokenId = Annotated[int, Meta(ge=0, le=MAX_TOKEN_ID)]
_STOP_TOKENS = Annotated[list[_TokenId], Meta(max_length=MAX_STOP_TOKENS)]


def stops_of(stop: str | list[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


def bias_of(raw: Raw) -> tuple[tuple[int, float], ...]:
    """``{"TOKEN": BIAS}``. Raises ConfigError."""
    found = decoded(raw, dict[_TokenId, float], "logit_bias", MAX_LIST_BYTES)
    return tuple(sorted(found.items())) if found else ()


def stop_tokens_of(raw: Raw) -> tuple[int, ...]:
    found = decoded(raw, _STOP_TOKENS, "stop_token_ids", MAX_LIST_BYTES)
    return tuple(found) if found else ()


class AbortRequest(Struct, frozen=True, forbid_unknown_fields=True):
    rid: Id


def checked_rid(raw: Raw) -> str:
    """The id of a request. Raises ConfigError for what cannot be one."""
    try:
        return msgspec.json.decode(raw, type=Id)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"rid: {error}") from None


class PromptDetails(Struct, frozen=True):
    #: Tokens of the prompts that a prefix cache had.
    cached_tokens: int = 0


class Usage(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails = PromptDetails()


class CompletionLogprobs(Struct, frozen=True):
    """Null is the logprob of a prompt's first token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    text_offset: list[int]
    #: For each token the likeliest ones and itself, by their texts. Of two tokens with one text the likelier is told.
    top_logprobs: list[dict[str, float] | None] | None = None


class PromptLogprob(Struct, frozen=True):
    """As vLLM tells it."""

    logprob: float
    rank: int
    decoded_token: str


#: For each token of a prompt itself and the likeliest ones, by their ids; null for the first.
PromptLogprobs = list[dict[int, PromptLogprob] | None]


class CompletionChoice(Struct, kw_only=True):
    text: str
    finish_reason: str | None
    logprobs: CompletionLogprobs | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
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
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class ErrorDetail(Struct, frozen=True, kw_only=True):
    message: str
    type: str
    code: str
    param: str | None = None


class ErrorBody(Struct, frozen=True):
    error: ErrorDetail


def event(body: object) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


#: The event that ends a stream that went well.
DONE = b"data: [DONE]\n\n"


def param_of(message: str) -> str | None:
    """The field that a message of ours begins with (``top_p: must be ...``), or None."""
    field, colon, _ = message.partition(": ")
    return field if colon and len(field) <= 64 and field.replace("_", "").replace(".", "").isalnum() else None

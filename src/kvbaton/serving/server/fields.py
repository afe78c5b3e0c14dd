"""Fields that clients of OpenAI, vLLM and SGLang send and that no struct of ours has: the one table of them.

Rules:

- A field that is implemented is an attribute of its request's struct. This table has the others that are known.
- Where a field would change the answer it is accepted at its neutral values and refused by name at any other. Where it
  changes nothing that is answered, any value is accepted.
- A field that nobody knows is ignored, counted and named in the log once; with ``--strict-fields`` it is refused.
- Null is neutral everywhere: it is what SDKs send for "not given".

The table drives parsing, the OpenAPI documents and docs/clients.md. This file must not know HTTP.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

import msgspec
from msgspec import Raw, Struct

from kvbaton.errors import ConfigError

Kind = Literal["completions", "chat", "generate", "sampling_params", "tokenize", "detokenize"]
#: Names of unknown fields that are told apart; the rest are counted as one.
MAX_UNKNOWN_NAMES = 64
MAX_FIELD_CHARACTERS = 64
OTHER = "other"
#: Longest value that is compared with the neutral ones.
_GLANCE = 64
_NULL = b"null"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KnownField:
    """``neutral`` None: it changes no answer, so any value will do."""

    name: str
    of: str
    kinds: tuple[Kind, ...]
    neutral: tuple[object, ...] | None
    what: str

    def is_neutral(self, raw: Raw) -> bool:
        """Only looked at, where it is long: its value may be anything."""
        if self.neutral is None or (len(raw) == len(_NULL) and bytes(raw) == _NULL):
            return True
        if len(raw) > _GLANCE:
            return False
        try:
            value = msgspec.json.decode(raw)
        except msgspec.MsgspecError:
            return False
        return any(value == one and type(value) in _kin(one) for one in self.neutral)

    def schema(self) -> dict[str, Any]:
        return {} if self.neutral is None else {"enum": [*self.neutral, None]}


def _kin(value: object) -> tuple[type, ...]:
    """Types that say the same: 1 is 1.0 and is not true."""
    return (int, float) if type(value) in (int, float) else (type(value),)


_OPENAI: tuple[Kind, ...] = ("completions", "chat")
_CHAT: tuple[Kind, ...] = ("chat",)
_GENERATE: tuple[Kind, ...] = ("generate",)
_PARAMS: tuple[Kind, ...] = ("sampling_params",)
_GRAMMAR = "grammars are not implemented"
_TOOLS = "calls of tools are not parsed"

KNOWN: tuple[KnownField, ...] = (
    # OpenAI
    KnownField("user", "OpenAI", (*_OPENAI, "generate"), None, "whose request it is"),
    KnownField("store", "OpenAI", _OPENAI, None, "nothing is stored"),
    KnownField("metadata", "OpenAI", _OPENAI, None, "goes with what is stored"),
    KnownField("service_tier", "OpenAI", _OPENAI, None, "there is one"),
    KnownField("safety_identifier", "OpenAI", _OPENAI, None, "whose request it is"),
    KnownField("prompt_cache_key", "OpenAI", _OPENAI, None, "the cache needs no key"),
    KnownField("prompt_cache_retention", "OpenAI", _OPENAI, None, "the cache keeps what it has room for"),
    KnownField("prediction", "OpenAI", _OPENAI, None, "makes an answer faster, not another"),
    KnownField("parallel_tool_calls", "OpenAI", _CHAT, None, _TOOLS),
    KnownField("suffix", "OpenAI", ("completions",), ("",), "nothing is filled in before a text"),
    KnownField("response_format", "OpenAI", _OPENAI, ({"type": "text"},), _GRAMMAR),
    KnownField("function_call", "OpenAI", _CHAT, ("none", "auto"), _TOOLS),
    KnownField("functions", "OpenAI", _CHAT, ([],), "pass tools"),
    KnownField("modalities", "OpenAI", _CHAT, (["text"],), "answers are text"),
    KnownField("audio", "OpenAI", _CHAT, (), "answers are text"),
    KnownField("web_search_options", "OpenAI", _CHAT, (), "nothing is searched"),
    KnownField("verbosity", "OpenAI", _CHAT, ("medium",), "the model decides"),
    # vLLM
    KnownField("use_beam_search", "vLLM", _OPENAI, (False,), "answers are sampled"),
    KnownField("length_penalty", "vLLM", _OPENAI, (1.0,), "belongs to beam search"),
    KnownField("early_stopping", "vLLM", _OPENAI, (False,), "belongs to beam search"),
    KnownField("prompt_embeds", "vLLM", _OPENAI, (), "prompts are text or token ids"),
    KnownField("truncate_prompt_tokens", "vLLM", _OPENAI, (), "prompts are not shortened"),
    KnownField("allowed_token_ids", "vLLM", _OPENAI, ([],), "use logit_bias"),
    KnownField("bad_words", "vLLM", _OPENAI, ([],), "use logit_bias"),
    KnownField("structured_outputs", "vLLM", _OPENAI, (), _GRAMMAR),
    *(
        KnownField(f"guided_{name}", "vLLM", _OPENAI, (), _GRAMMAR)
        for name in ("json", "regex", "choice", "grammar", "decoding_backend", "whitespace_pattern")
    ),
    KnownField("logits_processors", "vLLM", _OPENAI, ([],), "no code of clients runs here"),
    KnownField("return_tokens_as_token_ids", "vLLM", _OPENAI, (False,), "use return_token_ids"),
    KnownField("include_reasoning", "vLLM", _CHAT, None, "answers are not split"),
    KnownField("thinking_token_budget", "vLLM", _CHAT, (), "answers are not split"),
    KnownField("chat_template", "vLLM", _CHAT, (), "the model's own is used"),
    KnownField("documents", "vLLM", _CHAT, ([],), "pass chat_template_kwargs"),
    KnownField("mm_processor_kwargs", "vLLM", _CHAT, ({},), "prompts are text or token ids"),
    KnownField("media_io_kwargs", "vLLM", _CHAT, ({},), "prompts are text or token ids"),
    KnownField("priority", "vLLM, SGLang", (*_OPENAI, "generate"), None, "requests wait in order"),
    KnownField("request_id", "vLLM", _OPENAI, None, "an answer's id is its rid"),
    KnownField("cache_salt", "vLLM, SGLang", _OPENAI, None, "divides a cache, and changes no answer"),
    KnownField("vllm_xargs", "vLLM", _OPENAI, ({},), "there are no such arguments"),
    KnownField("kv_transfer_params", "vLLM", _OPENAI, ({},), "rooms are the router's business"),
    KnownField("add_special_tokens", "vLLM", _CHAT, (False,), "the template has them"),
    # SGLang
    KnownField("return_hidden_states", "SGLang", (*_OPENAI, "generate"), (False,), "answers are text"),
    KnownField("return_routed_experts", "SGLang", (*_OPENAI, "generate"), (False,), "answers are text"),
    KnownField("return_cached_tokens_details", "SGLang", _OPENAI, None, "usage tells of them"),
    KnownField("lora_path", "SGLang", (*_OPENAI, "generate"), (), "the model is served as it is"),
    KnownField("session_params", "SGLang", (*_OPENAI, "generate"), (), "a request stands by itself"),
    KnownField("custom_logit_processor", "SGLang", (*_OPENAI, "generate"), (), "no code of clients runs here"),
    KnownField("custom_params", "SGLang", (*_OPENAI, *_PARAMS), ({},), "no code of clients runs here"),
    KnownField("separate_reasoning", "SGLang", _CHAT, None, "answers are not split"),
    KnownField("stream_reasoning", "SGLang", _CHAT, None, "answers are not split"),
    KnownField("json_schema", "SGLang", (*_OPENAI, *_PARAMS), (), _GRAMMAR),
    KnownField("regex", "SGLang", (*_OPENAI, *_PARAMS), (), _GRAMMAR),
    KnownField("ebnf", "SGLang", (*_OPENAI, *_PARAMS), (), _GRAMMAR),
    KnownField("structural_tag", "SGLang", _PARAMS, (), _GRAMMAR),
    KnownField("stop_regex", "SGLang", (*_OPENAI, *_PARAMS), ([], ""), "use stop"),
    KnownField(
        "spaces_between_special_tokens", "vLLM, SGLang", (*_OPENAI, *_PARAMS), (True,), "tokenizers do not ask for it"
    ),
    KnownField("stream_interval", "SGLang", _PARAMS, None, "changes when text comes, not the text"),
    KnownField("extra_key", "SGLang", (*_OPENAI, "generate"), None, "divides a cache, and changes no answer"),
    KnownField("log_metrics", "SGLang", (*_OPENAI, "generate"), None, "all requests are counted"),
    KnownField("no_logs", "SGLang", (*_OPENAI, "generate"), None, "requests are not logged"),
    KnownField("background", "SGLang", _GENERATE, (False,), "an answer is waited for"),
    KnownField("return_bytes", "SGLang", _GENERATE, (False,), "answers are text"),
    KnownField("return_entropy", "SGLang", _GENERATE, (False,), "answers are text"),
    KnownField("token_ids_logprob", "SGLang", _GENERATE, ([],), "logprobs are of the likeliest"),
    KnownField("input_embeds", "SGLang", _GENERATE, (), "prompts are text or token ids"),
    KnownField("image_data", "SGLang", _GENERATE, (), "prompts are text or token ids"),
    KnownField("video_data", "SGLang", _GENERATE, (), "prompts are text or token ids"),
    KnownField("audio_data", "SGLang", _GENERATE, (), "prompts are text or token ids"),
    KnownField("modalities", "SGLang", _GENERATE, ([],), "prompts are text or token ids"),
    KnownField("conversation_id", "SGLang", _GENERATE, None, "a request stands by itself"),
)


class Ruled(Struct, kw_only=True):
    """A request to which the rule applies."""

    kind: ClassVar[Kind]

    def check(self) -> None:
        """Raises ConfigError for values that do not go together."""


@cache
def known(kind: Kind) -> Mapping[str, KnownField]:
    return {field.name: field for field in KNOWN if kind in field.kinds}


class FieldRule:
    """What becomes of fields that nobody knows: refused, or counted by name and named in the log once each."""

    def __init__(self, *, strict: bool = False, count: Callable[[str], None] = lambda _name: None) -> None:
        self.strict = strict
        self._count = count
        self._seen: set[str] = set()

    def met(self, names: Iterable[str]) -> None:
        """Raises ConfigError where they are refused."""
        for name in names:
            short = name[:MAX_FIELD_CHARACTERS]
            if self.strict:
                raise ConfigError(f"{short}: is not a field of this request")
            if short not in self._seen and len(self._seen) >= MAX_UNKNOWN_NAMES:
                short = OTHER
            if short not in self._seen:
                self._seen.add(short)
                logger.warning("the field %r of requests is not known and is ignored", short)
            self._count(short)

    def __repr__(self) -> str:
        return f"FieldRule({'strict' if self.strict else 'lenient'}, {len(self._seen)} names)"


def with_known(struct: type[Struct], kind: Kind, *, strict: bool) -> type[Struct]:
    """The struct with the table's fields as raw bytes; ``strict``: decoding ends at the first field that is in neither,
    else such fields are skipped without becoming objects."""
    names = sorted(known(kind).keys() - set(struct.__struct_fields__))
    return msgspec.defstruct(
        struct.__name__,
        [(name, Raw, Raw(b"null")) for name in names],
        bases=(struct,),
        kw_only=True,
        forbid_unknown_fields=strict,
    )


def check_known(request: Struct, kind: Kind) -> None:
    """Raises ConfigError for a field of the table whose value would change the answer."""
    for name, field in known(kind).items():
        if not field.is_neutral(getattr(request, name)):
            raise ConfigError(f"{name}: is not implemented ({field.what}); leave it out{_or(field)}")


def _or(field: KnownField) -> str:
    values = ", ".join(msgspec.json.encode(value).decode() for value in field.neutral or ())
    return f" or pass {values}" if values else ""

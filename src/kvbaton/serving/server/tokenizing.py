"""``/tokenize`` and ``/detokenize``, as vLLM and SGLang have them: text to tokens and back, without an engine.

This file must not know HTTP or engines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, ClassVar

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType, field

from kvbaton.errors import ConfigError
from kvbaton.serving.server.engine import Tokenizer
from kvbaton.serving.server.fields import Kind, Ruled
from kvbaton.serving.server.openai import ChatRequest
from kvbaton.serving.server.parsing import parse
from kvbaton.serving.server.prompts import prompts_of
from kvbaton.serving.server.raw import null
from kvbaton.serving.server.request_parsing import ApiConfig, RequestParser


class TokenizeRequest(Ruled, kw_only=True):
    """A ``prompt``, or ``messages`` with what else a chat has for its template."""

    kind: ClassVar[Kind] = "tokenize"

    model: str | None = None
    prompt: Raw = field(default_factory=null)
    messages: Raw = field(default_factory=null)
    tools: Raw = field(default_factory=null)
    chat_template_kwargs: Raw = field(default_factory=null)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    def check(self) -> None:
        if (bytes(self.prompt) == b"null") == (bytes(self.messages) == b"null"):
            raise ConfigError("prompt: or messages is required, and not both")


class DetokenizeRequest(Ruled, kw_only=True):
    kind: ClassVar[Kind] = "detokenize"

    tokens: Raw
    model: str | None = None
    skip_special_tokens: bool | None = None


class Tokens(Struct, frozen=True, kw_only=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | UnsetType = UNSET


class Text(Struct, frozen=True, kw_only=True):
    """The text under the names of vLLM and of SGLang."""

    prompt: str
    text: str


_CHAT_FIELDS = ("messages", "tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")


class Tokenizing:
    """Of one server."""

    def __init__(self, parser: RequestParser, tokenizer: Tokenizer | None, config: ApiConfig) -> None:
        self._parser = parser
        self._tokenizer = tokenizer
        self._config = config

    async def tokenize(self, request: TokenizeRequest) -> Tokens:
        """Raises ConfigError, CapacityError."""
        self._parser.check_model(request.model)
        if bytes(request.prompt) != b"null":
            prompts, _ = prompts_of(request.prompt, "prompt", self._config.max_positions)
            if len(prompts) != 1 or not isinstance(prompts[0], str):
                raise ConfigError("prompt: must be one text")
            tokens = await self._parser.text_tokens(prompts[0], special=request.add_special_tokens is not False)
        else:
            fields: dict[str, Any] = {name: getattr(request, name) for name in _CHAT_FIELDS}
            tokens = await self._parser.chat_tokens(parse(msgspec.json.encode(fields), ChatRequest))
        strs = await asyncio.to_thread(self._each, tokens) if request.return_token_strs else UNSET
        return Tokens(count=len(tokens), max_model_len=self._config.max_positions, tokens=list(tokens), token_strs=strs)

    async def detokenize(self, request: DetokenizeRequest) -> Text:
        """Raises ConfigError."""
        self._parser.check_model(request.model)
        prompts, is_batch = prompts_of(request.tokens, "tokens", self._config.max_positions)
        if is_batch or isinstance(prompts[0], str):
            raise ConfigError("tokens: must be one list of token ids")
        tokenizer, tokens = self._need(), prompts[0]
        text = await asyncio.to_thread(tokenizer.decode, tokens)
        return Text(prompt=text, text=text)

    def _each(self, tokens: Sequence[int]) -> list[str]:
        tokenizer = self._need()
        return [tokenizer.decode([token]) for token in tokens]

    def _need(self) -> Tokenizer:
        if self._tokenizer is None:
            raise ConfigError("model: it has no tokenizer")
        return self._tokenizer

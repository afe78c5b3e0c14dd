"""From a parsed OpenAI request to what the engine is asked: prompt as tokens, bounds, room, and where its sources are.

Rules: in prefill and decode mode a request must carry the router's room, in mode null it must not. A decode server asks
only registries on its allow-list. What the engine checks itself (vocabulary, positions, pool) is not checked twice.

This file must not know HTTP or engines' threads.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

from kvbaton.discovery.access import unbracketed
from kvbaton.discovery.client import RegistryClient
from kvbaton.discovery.placement import LoadBalance, checked_rank, known_rank
from kvbaton.errors import AuthenticationError, CapacityError, ConfigError, InternalError, RegistryError
from kvbaton.serving.engine.request import Request
from kvbaton.serving.server.allow import AllowList
from kvbaton.serving.server.answers import Answers
from kvbaton.serving.server.engine import Tokenizer
from kvbaton.serving.server.openai import (
    BOOTSTRAP_PORT,
    CHAT_MAX_TOKENS,
    COMPLETION_MAX_TOKENS,
    ChatRequest,
    CompletionRequest,
)

Mode = Literal["null", "prefill", "decode"]
#: A prompt with more characters is tokenized beside the event loop.
INLINE_CHARACTERS = 16 << 10
#: No tokenizer makes one token of more characters: a longer prompt is too long, and is not tokenized to find out.
MAX_CHARACTERS_PER_TOKEN = 256
#: Chat templates that are rendered at once.
MAX_TEMPLATES = 4
#: Of a model's name that is not served, as many are said again.
MAX_NAME_CHARACTERS = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiConfig:
    """Settings of one API server.

    Args:
        model: the name that clients use.
        max_positions: tokens of prompt and answer together that the model can see; bounds a chat's default answer.
        pool_tokens: tokens that the pool holds, in pages of ``page_size``; bounds it too. 0: no bound.
        bootstrap_allow: registries that a decode server may ask.
        bootstrap_timeout: how long it asks there for a room that the prefill server has not seen yet.
        data_parallel_size, load_balance: how many ranks there are to choose from, and how rooms are spread over them.
        max_requests: requests answered at once.
    """

    model: str
    max_positions: int
    pool_tokens: int = 0
    page_size: int = 1
    mode: Mode = "null"
    bootstrap_allow: AllowList = field(default_factory=AllowList)
    bootstrap_timeout: float = 120.0
    data_parallel_size: int = 1
    load_balance: LoadBalance = "total_requests"
    max_requests: int = 1024


@dataclass(frozen=True, slots=True)
class Accepted:
    """A request that is ready for the engine. ``rid``: what its client calls it, ``registry``: the one that was asked
    for its sources."""

    request: Request
    answers: Answers
    rid: str
    stream: bool
    registry: tuple[str, int] | None


class RequestParser:
    """Accepts requests for one engine."""

    def __init__(self, tokenizer: Tokenizer | None, config: ApiConfig, registry: RegistryClient | None) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._registry = registry
        #: A template is a program: while it runs, what else is done beside the loop has threads of its own.
        self._templates = ThreadPoolExecutor(MAX_TEMPLATES, "kvbaton-templates")

    async def accept(self, request: CompletionRequest | ChatRequest) -> Accepted:
        """Whoever sent it may name rooms and registries: that has been seen to.

        Raises ConfigError or CapacityError for what is wrong, RegistryError when the prefill group is not found.
        """
        if request.model is not None and request.model != self._config.model:
            asked = request.model[:MAX_NAME_CHARACTERS]
            raise ConfigError(f"model: {asked!r} is not served here; this server has {self._config.model!r}")
        registry = self._check_room(request)
        dp_rank = self._dp_rank(request)
        tokens = await self._tokens(request)
        sampling = request.sampling(max_tokens=self._max_tokens(request, len(tokens)))
        prefix = "chatcmpl" if isinstance(request, ChatRequest) else "cmpl"
        request_id = f"{prefix}-{uuid.uuid4().hex}"  # nobody's choice: what a client calls it is its own business
        rid = request.rid or request_id
        answers = Answers(
            request,
            request_id=rid,
            model=self._config.model,
            prompt_tokens=len(tokens),
            tokenizer=self._tokenizer,
        )
        sources = await self._sources(registry, request)
        return Accepted(
            Request(
                request_id=request_id,
                prompt_tokens=tokens,
                sampling=sampling,
                room=request.bootstrap_room,
                sources=sources,
                dp_rank=dp_rank,
            ),
            answers,
            rid,
            request.stream,
            registry,
        )

    def _check_room(self, request: CompletionRequest | ChatRequest) -> tuple[str, int] | None:
        """The registry to ask, on a decode server."""
        mode, host = self._config.mode, request.bootstrap_host
        if mode == "null":
            if (request.bootstrap_room, host, request.bootstrap_port) != (None, None, None):
                raise ConfigError("bootstrap_room: this server runs both halves itself (mode null) and takes no room")
            if request.disagg_prefill_dp_rank is not None:
                raise ConfigError("disagg_prefill_dp_rank: this server runs both halves itself; use data_parallel_rank")
            return None
        if request.bootstrap_room is None:
            raise ConfigError(
                f"bootstrap_room: this is a {mode} server, one half of a pair; send requests through the router"
            )
        if mode == "prefill":
            return None
        if host is None:
            raise ConfigError("bootstrap_host: is required on a decode server; send requests through the router")
        port = request.bootstrap_port or BOOTSTRAP_PORT
        self._config.bootstrap_allow.check(host, port)
        return host, port

    def _dp_rank(self, request: CompletionRequest | ChatRequest) -> int | None:
        """The data-parallel rank that is to serve a request here, where that is not for the server to choose."""
        size, named = self._config.data_parallel_size, request.data_parallel_rank
        if self._config.mode == "prefill" and request.bootstrap_room is not None:
            return known_rank(
                request.bootstrap_room,
                size=size,
                balance=self._config.load_balance,
                named=request.disagg_prefill_dp_rank,
            )
        return None if named is None else checked_rank(named, size, "data_parallel_rank")

    async def _sources(
        self, registry: tuple[str, int] | None, request: CompletionRequest | ChatRequest
    ) -> tuple[str, ...]:
        if registry is None or request.bootstrap_room is None:
            return ()
        if self._registry is None:
            raise InternalError("a decode server was built without a registry client")
        try:
            sources = await self._registry.sources(
                *registry,
                request.bootstrap_room,
                named=request.disagg_prefill_dp_rank,
                patience_seconds=self._config.bootstrap_timeout,
            )
        except AuthenticationError as error:  # our secret is wrong there: not the client's doing
            raise RegistryError(
                f"the bootstrap registry does not let us in: {error.message}", peer=error.peer
            ) from None
        await self._check_links(sources, registry[0])
        return sources

    async def _check_links(self, sources: Sequence[str], registry_host: str) -> None:
        """Raises RegistryError for an address that this server is not to dial."""
        allow = self._config.bootstrap_allow
        if not allow.entries:
            return
        try:
            found = await asyncio.get_running_loop().getaddrinfo(unbracketed(registry_host), None)
        except OSError as error:
            raise RegistryError(f"{registry_host} cannot be found: {error.strerror or error}") from None
        registry = {str(address[0]) for *_, address in found}
        for source in sources:
            allow.check_link(source, registry)

    async def _tokens(self, request: CompletionRequest | ChatRequest) -> tuple[int, ...]:
        if isinstance(request, CompletionRequest):
            prompt = request.text_or_tokens(self._config.max_positions)
            if not isinstance(prompt, str):
                return prompt
            tokenizer = self._need_tokenizer("prompt")
            self._check_characters("prompt", len(prompt))
            return await _tokenized(lambda: tokenizer.encode(prompt), len(prompt))
        messages = [(message.role, message.text()) for message in request.messages]
        tokenizer = self._need_tokenizer("messages")
        characters = sum(len(text) for _, text in messages)
        self._check_characters("messages", characters)
        rendering = asyncio.get_running_loop().run_in_executor(self._templates, tokenizer.encode_chat, messages)
        return tuple(await rendering)

    def _check_characters(self, field_name: str, characters: int) -> None:
        limit = self._config.max_positions * MAX_CHARACTERS_PER_TOKEN
        if characters > limit:
            raise CapacityError(
                f"{field_name}: {characters} characters cannot be within {self._config.max_positions} tokens"
            )

    def _need_tokenizer(self, field_name: str) -> Tokenizer:
        if self._tokenizer is None:
            raise ConfigError(f"{field_name}: this model has no tokenizer; send a completion with a list of token ids")
        return self._tokenizer

    def _max_tokens(self, request: CompletionRequest | ChatRequest, prompt_tokens: int) -> int:
        if isinstance(request, CompletionRequest):
            return COMPLETION_MAX_TOKENS if request.max_tokens is None else request.max_tokens
        asked = request.asked_tokens()
        if asked is not None:
            return asked
        limit = min(self._config.max_positions, self._share(prompt_tokens, request.choices))
        if prompt_tokens >= limit:
            raise CapacityError(f"messages: {prompt_tokens} tokens leave no room for an answer within {limit} tokens")
        return min(CHAT_MAX_TOKENS, limit - prompt_tokens)

    def _share(self, prompt_tokens: int, choices: int) -> int:
        """Tokens, prompt and answer, that each of ``choices`` may have in the pool; they share the prompt's pages."""
        if not self._config.pool_tokens:
            return self._config.max_positions
        page = self._config.page_size
        pages, common = self._config.pool_tokens // page, min(prompt_tokens, self._config.pool_tokens) // page
        return (common + (pages - common) // choices) * page


async def _tokenized(tokenize: Callable[[], Sequence[int]], characters: int) -> tuple[int, ...]:
    return tuple(await asyncio.to_thread(tokenize) if characters > INLINE_CHARACTERS else tokenize())

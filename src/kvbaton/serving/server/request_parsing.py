"""From a parsed OpenAI request to what the engine is asked: prompt as tokens, bounds, room, and where its sources are.

Rules: in prefill and decode mode a request must carry the router's room, in mode null it must not. A decode server asks
only registries on its allow-list. What the engine checks itself (vocabulary, positions, pool) is not checked twice.

This file must not know HTTP or engines' threads.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from kvbaton.discovery.access import unbracketed
from kvbaton.discovery.client import RegistryClient
from kvbaton.discovery.placement import LoadBalance, checked_rank, known_rank
from kvbaton.discovery.registry import Topology
from kvbaton.errors import (
    AuthenticationError,
    ConfigError,
    ContextLengthError,
    DisconnectedError,
    IncompatibleError,
    InternalError,
    KVBatonError,
    PeerLostError,
    RegistryError,
    TransferFailedError,
    UnknownModelError,
)
from kvbaton.serving.engine.request import Handoff, Output, Request, Sampling
from kvbaton.serving.server.allow import AllowList
from kvbaton.serving.server.answers import Answers
from kvbaton.serving.server.echo import Echo
from kvbaton.serving.server.engine import Tokenizer
from kvbaton.serving.server.generated import GeneratedAnswers
from kvbaton.serving.server.journal import JOURNAL_FIELD, Journal, Part, fresh
from kvbaton.serving.server.openai import (
    CHAT_MAX_TOKENS,
    COMPLETION_MAX_TOKENS,
    ChatRequest,
    CompletionRequest,
)
from kvbaton.serving.server.raw import refuse
from kvbaton.serving.server.routing import Meeting
from kvbaton.serving.server.sglang import MAX_NEW_TOKENS, GenerateRequest

Mode = Literal["null", "prefill", "decode"]
#: A prompt with more characters is tokenized beside the event loop.
INLINE_CHARACTERS = 16 << 10
#: No tokenizer makes one token of more characters: a longer prompt is too long, and is not tokenized to find out.
MAX_CHARACTERS_PER_TOKEN = 256
#: Chat templates that are rendered at once.
MAX_TEMPLATES = 4
#: Of a model's name that is not served, as many are said again.
MAX_NAME_CHARACTERS = 128
#: What SGLang's clients say where they mean whatever is served.
ANY_MODEL = "default"
_PREFIXES = {"completions": "cmpl", "chat": "chatcmpl", "generate": "gen"}

AnyRequest = CompletionRequest | ChatRequest | GenerateRequest


class Formatter(Protocol):
    """Engine outputs as one API answers them; fed every output, in order."""

    @property
    def handoff(self) -> Handoff | None:
        """One that came with the outputs so far."""

    def event(self, output: Output) -> object:
        """The stream event of one output."""

    def usage_event(self) -> object | None:
        """The event after the last one, for a client that asked for it."""

    def collect(self, output: Output) -> None:
        """Keep one output for :meth:`whole`."""

    def whole(self) -> object:
        """The answer made of everything collected."""


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
        strict_fields: a field that nobody knows is refused, not ignored.
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
    strict_fields: bool = False


@dataclass(frozen=True, slots=True)
class Accepted:
    """A request that is ready: what the engine is to do, by the number of the first answer of each. ``rid``: what its
    client calls it, ``registry``: the one that was asked for its sources, ``journal``: what was answered before."""

    requests: Mapping[int, Request]
    answers: Formatter
    rid: str
    stream: bool
    registry: tuple[str, int] | None
    journal: Journal | None = None

    @property
    def recomputed(self) -> int:
        """Tokens of answers that another server had given, and whose cache prefill computes again."""
        if self.journal is None or self.journal.sources:
            return 0
        return sum(request.answered for request in self.requests.values())

    def recall(self) -> None:
        """Let the formatter know what was answered before."""
        for record in self.journal.records if self.journal is not None else ():
            (self.answers.event if self.stream else self.answers.collect)(record.output)


#: What may mean that a cached lookup no longer holds.
_PEER_TROUBLE = (PeerLostError, DisconnectedError, TransferFailedError, RegistryError, IncompatibleError)


class RequestParser:
    """Accepts requests for one engine."""

    def __init__(self, tokenizer: Tokenizer | None, config: ApiConfig, registry: RegistryClient | None) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._registry = registry
        #: A template is a program: while it runs, what else is done beside the loop has threads of its own.
        self._templates = ThreadPoolExecutor(MAX_TEMPLATES, "kvbaton-templates")

    def close(self) -> None:
        """Templates that still render are left to their deadline. Idempotent."""
        self._templates.shutdown(wait=False, cancel_futures=True)

    def learn(self, error: KVBatonError, accepted: Accepted) -> None:
        """What a failure says about more than its request."""
        if self._registry is not None and accepted.registry is not None and isinstance(error, _PEER_TROUBLE):
            self._registry.invalidate(*accepted.registry)

    async def accept(self, request: AnyRequest) -> Accepted:
        """Whoever sent it may name rooms and registries: that has been seen to.

        Raises ConfigError or CapacityError for what is wrong, RegistryError when the prefill group is not found.
        """
        self.check_model(request.model)
        prompts = await self._prompts(request)
        journal = Journal.of(request.kvbaton_journal)
        samplings = self._samplings(request, prompts)
        parts = journal.parts(prompts, samplings) if journal is not None else fresh(prompts, samplings)
        meetings = self._meetings(request, parts)
        registry = self._registry_of(meetings)
        handed_on = await self._handed_on(journal, registry)
        # nobody's choice: what a client calls it is its own business
        request_id = f"{_PREFIXES[request.kind]}-{uuid.uuid4().hex}"
        requests = {
            part.number: Request(
                request_id=request_id if len(parts) == 1 else f"{request_id}-{part.number}",
                prompt_tokens=part.tokens,
                sampling=part.sampling,
                room=meeting.room if meeting is not None else None,
                sources=handed_on or await self._sources(registry, request, meeting),
                dp_rank=self._dp_rank(request, meeting),
                answered=part.answered,
            )
            for part, meeting in zip(parts, meetings, strict=True)
        }
        name = request_id if journal is None else f"{_PREFIXES[request.kind]}-{journal.id}"
        rid = request.rid or name
        answers = self._answers(request, rid, prompts, journal)
        asked = None if handed_on else registry
        return Accepted(requests, answers, rid, bool(request.stream), asked, journal)

    def check_model(self, model: str | None) -> None:
        """Raises UnknownModelError."""
        if model is not None and model not in (self._config.model, ANY_MODEL):
            asked = model[:MAX_NAME_CHARACTERS]
            raise UnknownModelError(f"model: {asked!r} is not served here; this server has {self._config.model!r}")

    def _answers(
        self, request: AnyRequest, rid: str, prompts: Sequence[Sequence[int]], journal: Journal | None
    ) -> Formatter:
        if isinstance(request, GenerateRequest):
            return GeneratedAnswers(request, request_id=rid, prompts=prompts, tokenizer=self._tokenizer)
        echo: list[Echo] = []
        if isinstance(request, CompletionRequest) and request.echo:
            tokenizer = self._need_tokenizer("echo")
            given = request.prompts(self._config.max_positions)
            echo = [Echo(tokenizer, *each) for each in zip(given, prompts, strict=True)]
        return Answers(
            request,
            request_id=rid,
            model=self._config.model,
            prompts=prompts,
            tokenizer=self._tokenizer,
            echo=echo,
            created=journal.created if journal is not None else None,
        )

    def _meetings(self, request: AnyRequest, parts: Sequence[Part]) -> Sequence[Meeting | None]:
        """Where the halves of each part meet. Raises ConfigError where it is not said, or not allowed, to be."""
        mode = self._config.mode
        if mode == "null":
            if request.is_routed:
                raise ConfigError("bootstrap_room: this server runs both halves itself (mode null) and takes no room")
            if request.disagg_prefill_dp_rank is not None:
                raise ConfigError("disagg_prefill_dp_rank: this server runs both halves itself; use data_parallel_rank")
            return [None] * len(parts)
        meetings = request.meetings(len(parts), request.choices)
        if meetings is None:
            raise ConfigError(
                f"bootstrap_room: this is a {mode} server, one half of a pair; send requests through the router"
            )
        return meetings

    def _registry_of(self, meetings: Sequence[Meeting | None]) -> tuple[str, int] | None:
        """The registry to ask, on a decode server; it is one for all prompts. Where an answer is handed on it is the
        name of who has it so far, and as much within the bounds of the allow-list. Raises ConfigError."""
        if self._config.mode != "decode" or not meetings:  # all has been answered before
            return None
        registries = {(meeting.host, meeting.port) for meeting in meetings if meeting is not None}
        (host, port), *others = registries
        if others:
            raise ConfigError("bootstrap_host: the prompts of one request have one prefill server")
        if host is None:
            raise ConfigError("bootstrap_host: is required on a decode server; send requests through the router")
        self._config.bootstrap_allow.check(host, port)
        return host, port

    def _dp_rank(self, request: AnyRequest, meeting: Meeting | None) -> int | None:
        """The data-parallel rank that is to serve a prompt here, where that is not for the server to choose."""
        size, named = self._config.data_parallel_size, request.data_parallel_rank
        if self._config.mode == "prefill" and meeting is not None:
            return known_rank(
                meeting.room, size=size, balance=self._config.load_balance, named=request.disagg_prefill_dp_rank
            )
        return None if named is None else checked_rank(named, size, "data_parallel_rank")

    async def prefill_group(self, host: str, port: int) -> Topology:
        """The group behind a registry, on a decode server, if a request for it would be let through. Raises ConfigError
        or RegistryError."""
        if self._registry is None:
            raise ConfigError(f"this is a {self._config.mode} server: decode looks prefill up, nobody else does")
        self._config.bootstrap_allow.check(host, port)
        try:
            topology = await self._registry.topology(host, port)
        except AuthenticationError as error:
            raise _locked_out(error) from None
        await self._check_links([route.address for route in topology.ranks], host)
        return topology

    async def _handed_on(self, journal: Journal | None, registry: tuple[str, int] | None) -> tuple[str, ...]:
        """The ranks that hand on what they have of an answer. Raises ConfigError for one that is not to be dialled."""
        if journal is None or registry is None:
            return ()
        try:
            await self._check_links(journal.sources, registry[0])
        except (ConfigError, RegistryError) as error:
            refuse(JOURNAL_FIELD, error.message)
        return journal.sources

    async def _sources(
        self, registry: tuple[str, int] | None, request: AnyRequest, meeting: Meeting | None
    ) -> tuple[str, ...]:
        if registry is None or meeting is None:
            return ()
        if self._registry is None:
            raise InternalError("a decode server was built without a registry client")
        try:
            sources = await self._registry.sources(
                *registry,
                meeting.room,
                named=request.disagg_prefill_dp_rank,
                patience_seconds=self._config.bootstrap_timeout,
            )
        except AuthenticationError as error:
            raise _locked_out(error) from None
        await self._check_links(sources, registry[0])
        return sources

    async def _check_links(self, sources: Sequence[str], registry_host: str) -> None:
        """Raises RegistryError for an address that this server is not to dial, ConfigError for what is none."""
        allow = self._config.bootstrap_allow
        if not allow.entries or not sources:
            return
        try:
            found = await asyncio.get_running_loop().getaddrinfo(unbracketed(registry_host), None)
        except OSError as error:
            raise RegistryError(f"{registry_host} cannot be found: {error.strerror or error}") from None
        registry = {str(address[0]) for *_, address in found}
        for source in sources:
            allow.check_link(source, registry)

    async def _prompts(self, request: AnyRequest) -> list[tuple[int, ...]]:
        if isinstance(request, ChatRequest):
            return [await self.chat_tokens(request)]
        special = request.add_special_tokens is not False if isinstance(request, CompletionRequest) else True
        found = []
        for prompt in request.prompts(self._config.max_positions):
            found.append(await self.text_tokens(prompt, special=special) if isinstance(prompt, str) else prompt)
        return found

    async def text_tokens(self, text: str, *, special: bool = True) -> tuple[int, ...]:
        """Raises ConfigError where there is no tokenizer, CapacityError where the text can never fit."""
        tokenizer = self._need_tokenizer("prompt")
        self._check_characters("prompt", len(text))
        return await _tokenized(lambda: tokenizer.encode(text, special=special), len(text))

    async def chat_tokens(self, request: ChatRequest) -> tuple[int, ...]:
        """Raises ConfigError, CapacityError."""
        turns, options = request.turns(), request.template_options()
        tokenizer = self._need_tokenizer("messages")
        self._check_characters("messages", sum(len(turn["content"]) for turn in turns))
        loop = asyncio.get_running_loop()
        return tuple(await loop.run_in_executor(self._templates, tokenizer.encode_chat, turns, options))

    def _check_characters(self, field_name: str, characters: int) -> None:
        limit = self._config.max_positions * MAX_CHARACTERS_PER_TOKEN
        if characters > limit:
            raise ContextLengthError(
                f"{field_name}: {characters} characters cannot be within {self._config.max_positions} tokens"
            )

    def _need_tokenizer(self, field_name: str) -> Tokenizer:
        if self._tokenizer is None:
            raise ConfigError(f"{field_name}: this model has no tokenizer; send a completion with a list of token ids")
        return self._tokenizer

    def _samplings(self, request: AnyRequest, prompts: Sequence[Sequence[int]]) -> list[Sampling]:
        """One for each prompt. Raises ConfigError."""
        if isinstance(request, GenerateRequest):
            found = []
            for one, prompt in zip(request.asked(prompts), prompts, strict=True):
                wanted = one.max_new_tokens
                if wanted is None:
                    wanted = self._fitting(MAX_NEW_TOKENS, len(prompt), request.choices, request.prompt_field)
                found.append(replace(one.sampling, max_tokens=max(1, wanted)))  # of 0 none is told
            return found
        if isinstance(request, ChatRequest):
            asked, default, name = request.asked_tokens(), CHAT_MAX_TOKENS, "messages"
        else:
            asked, default, name = request.max_tokens, COMPLETION_MAX_TOKENS, "prompt"
        if asked is None:
            asked = self._fitting(default, max(map(len, prompts)), request.choices, name)
        return [request.sampling(max_tokens=asked)] * len(prompts)

    def _fitting(self, tokens: int, prompt_tokens: int, choices: int, name: str) -> int:
        """``tokens``, clipped to what fits beside the prompt in the field ``name``. Raises ContextLengthError."""
        limit = min(self._config.max_positions, self._share(prompt_tokens, choices))
        if prompt_tokens >= limit:
            raise ContextLengthError(
                f"{name}: {prompt_tokens} tokens leave no room for an answer within {limit} tokens"
            )
        return min(tokens, limit - prompt_tokens)

    def _share(self, prompt_tokens: int, choices: int) -> int:
        """Tokens, prompt and answer, that each of ``choices`` may have in the pool; they share the prompt's pages."""
        if not self._config.pool_tokens:
            return self._config.max_positions
        page = self._config.page_size
        pages, common = self._config.pool_tokens // page, min(prompt_tokens, self._config.pool_tokens) // page
        return (common + (pages - common) // choices) * page


def _locked_out(error: AuthenticationError) -> RegistryError:
    """Our secret is wrong there: not the client's doing."""
    return RegistryError(f"the bootstrap registry does not let us in: {error.message}", peer=error.peer)


async def _tokenized(tokenize: Callable[[], Sequence[int]], characters: int) -> tuple[int, ...]:
    return tuple(await asyncio.to_thread(tokenize) if characters > INLINE_CHARACTERS else tokenize())

"""Engine outputs as OpenAI answers: whole ones and stream events, of both kinds.

This file must not know HTTP or engines' threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import time
from typing import Literal

from msgspec import UNSET, UnsetType

from kvbaton.engine.request import Handoff, Output
from kvbaton.server.engine import Tokenizer
from kvbaton.server.openai import (
    Answer,
    ChatAnswer,
    ChatChoice,
    ChatDelta,
    ChatLogprob,
    ChatLogprobs,
    ChatRequest,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    Usage,
)

_Kind = Literal["text_completion", "chat.completion", "chat.completion.chunk"]


class Answers:
    """Formats the answer to one request; feed it every output, in order."""

    def __init__(
        self,
        request: CompletionRequest | ChatRequest,
        *,
        request_id: str,
        model: str,
        prompt_tokens: int,
        tokenizer: Tokenizer | None,
    ) -> None:
        self._request = request
        self._id = request_id
        self._model = model
        self._created = int(time())
        self._prompt_tokens = prompt_tokens
        self._tokenizer = tokenizer
        self._outputs: list[Output] = []
        self._tokens = 0
        self._characters = 0
        self._handoff: Handoff | UnsetType = UNSET

    @property
    def handoff(self) -> Handoff | None:
        """The hand-off that came with the outputs so far."""
        return None if isinstance(self._handoff, UnsetType) else self._handoff

    def event(self, output: Output) -> Answer:
        """The stream event of one output."""
        first = self._tokens == 0
        self._count(output)
        if isinstance(self._request, ChatRequest):
            delta = ChatDelta(content=output.text, role="assistant" if first else UNSET)
            choice = ChatChoice(delta=delta, finish_reason=output.finish_reason, logprobs=self._chat_logprobs(output))
            choice.token_ids = self._token_ids(output)
            answer = self._answer("chat.completion.chunk", [choice])
        else:
            answer = self._answer("text_completion", [self._completion_choice(output)])
        self._characters += len(output.text)
        if self._include_usage:
            answer.usage = None
        if output.final:
            answer.handoff = self._handoff
        return answer

    def usage_event(self) -> Answer | None:
        """The event after the last one, for a client that asked for it."""
        if not self._include_usage:
            return None
        kind: _Kind = "chat.completion.chunk" if isinstance(self._request, ChatRequest) else "text_completion"
        answer = self._answer(kind, [])
        answer.usage = self._usage()
        return answer

    def collect(self, output: Output) -> None:
        """Keep one output for :meth:`whole`."""
        self._count(output)
        self._outputs.append(output)

    def whole(self) -> Answer:
        """The answer made of everything collected."""
        output = Output(
            tokens=tuple(token for part in self._outputs for token in part.tokens),
            text="".join(part.text for part in self._outputs),
            logprobs=tuple(value for part in self._outputs for value in part.logprobs),
            finish_reason=self._outputs[-1].finish_reason,
        )
        if isinstance(self._request, ChatRequest):
            message = ChatAnswer(content=output.text)
            choice = ChatChoice(
                message=message, finish_reason=output.finish_reason, logprobs=self._chat_logprobs(output)
            )
            choice.token_ids = self._token_ids(output)
            answer = self._answer("chat.completion", [choice])
        else:
            answer = self._answer("text_completion", [self._completion_choice(output)])
        answer.usage = self._usage()
        answer.handoff = self._handoff
        return answer

    @property
    def _include_usage(self) -> bool:
        return self._request.stream_options is not None and self._request.stream_options.include_usage

    def _count(self, output: Output) -> None:
        self._tokens += len(output.tokens)
        if output.handoff is not None:
            self._handoff = output.handoff

    def _usage(self) -> Usage:
        return Usage(self._prompt_tokens, self._tokens, self._prompt_tokens + self._tokens)

    def _answer(self, kind: _Kind, choices: list[CompletionChoice] | list[ChatChoice]) -> Answer:
        return Answer(id=self._id, object=kind, created=self._created, model=self._model, choices=choices)

    def _token_ids(self, output: Output) -> list[int] | UnsetType:
        return list(output.tokens) if self._request.return_token_ids else UNSET

    def _token_texts(self, tokens: Sequence[int]) -> list[str]:
        if self._tokenizer is None:
            return [f"token_id:{token}" for token in tokens]
        return [self._tokenizer.decode([token]) for token in tokens]

    def _completion_choice(self, output: Output) -> CompletionChoice:
        choice = CompletionChoice(text=output.text, finish_reason=output.finish_reason)
        choice.token_ids = self._token_ids(output)
        if self._request.logprobs is not None and output.logprobs:
            texts = self._token_texts(output.tokens)
            offsets = [self._characters + sum(map(len, texts[:index])) for index in range(len(texts))]
            choice.logprobs = CompletionLogprobs(texts, list(output.logprobs), offsets)
        return choice

    def _chat_logprobs(self, output: Output) -> ChatLogprobs | None:
        if not self._request.logprobs or not output.logprobs:
            return None
        texts = self._token_texts(output.tokens)
        pairs = zip(texts, output.logprobs, strict=True)
        return ChatLogprobs([ChatLogprob(text, value, list(text.encode())) for text, value in pairs])

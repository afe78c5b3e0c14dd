"""Engine outputs as OpenAI answers: whole ones and stream events, of both kinds.

This file must not know HTTP or engines' threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import time
from typing import Literal

from msgspec import UNSET, UnsetType

from kvbaton.serving.engine.request import Alternatives, Handoff, Output
from kvbaton.serving.server.engine import Tokenizer
from kvbaton.serving.server.openai import (
    Answer,
    ChatAlternative,
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


@dataclass(slots=True)
class _Told:
    """What one choice has said so far. ``outputs`` are kept for a whole answer only."""

    outputs: list[Output] = field(default_factory=list)
    started: bool = False
    characters: int = 0


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
        self._told = [_Told() for _ in range(request.choices)]
        self._tokens = 0
        self._handoff: Handoff | UnsetType = UNSET

    @property
    def handoff(self) -> Handoff | None:
        """The hand-off that came with the outputs so far."""
        return None if isinstance(self._handoff, UnsetType) else self._handoff

    def event(self, output: Output) -> Answer:
        """The stream event of one output."""
        told = self._told[output.index]
        self._count(output)
        if isinstance(self._request, ChatRequest):
            choice = self._chat_choice(output)
            choice.delta = ChatDelta(content=output.text, role=UNSET if told.started else "assistant")
            answer = self._answer("chat.completion.chunk", [choice])
        else:
            answer = self._answer("text_completion", [self._completion_choice(output, told.characters)])
        told.started = True
        told.characters += len(output.text)
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
        self._told[output.index].outputs.append(output)

    def whole(self) -> Answer:
        """The answer made of everything collected."""
        outputs = [_whole(told.outputs) for told in self._told if told.outputs]
        if isinstance(self._request, ChatRequest):
            answer = self._answer("chat.completion", [self._chat_message(output) for output in outputs])
        else:
            answer = self._answer("text_completion", [self._completion_choice(output, 0) for output in outputs])
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

    def _completion_choice(self, output: Output, offset: int) -> CompletionChoice:
        """``offset``: characters of this choice that were told before."""
        choice = CompletionChoice(text=output.text, finish_reason=output.finish_reason, index=output.index)
        choice.token_ids = self._token_ids(output)
        if self._request.logprobs is not None and output.logprobs:
            texts = self._token_texts(output.tokens)
            offsets = [offset + sum(map(len, texts[:index])) for index in range(len(texts))]
            own = zip(texts, output.logprobs, strict=True)
            tops = [
                self._by_text(top, text, logprob)
                for top, (text, logprob) in zip(output.top_logprobs, own, strict=False)  # no tops, or one for each
            ]
            choice.logprobs = CompletionLogprobs(texts, list(output.logprobs), offsets, tops or None)
        return choice

    def _by_text(self, top: Alternatives, text: str, logprob: float) -> dict[str, float]:
        texts = self._token_texts([token for token, _ in top])
        found: dict[str, float] = {}
        for each, (_, value) in zip(texts, top, strict=True):
            found.setdefault(each, value)
        found.setdefault(text, logprob)
        return found

    def _chat_choice(self, output: Output) -> ChatChoice:
        """Without what is said."""
        choice = ChatChoice(finish_reason=output.finish_reason, index=output.index)
        choice.logprobs = self._chat_logprobs(output)
        choice.token_ids = self._token_ids(output)
        return choice

    def _chat_message(self, output: Output) -> ChatChoice:
        choice = self._chat_choice(output)
        choice.message = ChatAnswer(content=output.text)
        return choice

    def _chat_logprobs(self, output: Output) -> ChatLogprobs | None:
        if not self._request.logprobs or not output.logprobs:
            return None
        texts = self._token_texts(output.tokens)
        tops = output.top_logprobs or ((),) * len(texts)
        return ChatLogprobs(
            [
                ChatLogprob(text, logprob, list(text.encode()), self._alternatives(top))
                for text, logprob, top in zip(texts, output.logprobs, tops, strict=True)
            ]
        )

    def _alternatives(self, top: Alternatives) -> list[ChatAlternative]:
        texts = self._token_texts([token for token, _ in top])
        return [
            ChatAlternative(text, logprob, list(text.encode())) for text, (_, logprob) in zip(texts, top, strict=True)
        ]


def _whole(outputs: Sequence[Output]) -> Output:
    """All that one choice has said."""
    return Output(
        index=outputs[0].index,
        tokens=tuple(token for part in outputs for token in part.tokens),
        text="".join(part.text for part in outputs),
        logprobs=tuple(value for part in outputs for value in part.logprobs),
        top_logprobs=tuple(top for part in outputs for top in part.top_logprobs),
        finish_reason=outputs[-1].finish_reason,
    )

"""Engine outputs as OpenAI answers: whole ones and stream events, of both kinds.

This file must not know HTTP or engines' threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
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
    PromptDetails,
    Usage,
)
from kvbaton.serving.server.token_text import Offsets, TokenText, token_text

_Kind = Literal["text_completion", "chat.completion", "chat.completion.chunk"]


@dataclass(slots=True)
class _Told:
    """What one choice has said so far. ``outputs`` are kept for a whole answer only."""

    outputs: list[Output] = field(default_factory=list)
    started: bool = False
    offsets: Offsets = field(default_factory=Offsets)


class Answers:
    """Formats the answer to one request; feed it every output, in order.

    ``echo``: the text of each prompt, where it is to stand in front of its answers. ``created``: seconds of the epoch
    that are told; None: now.
    """

    def __init__(
        self,
        request: CompletionRequest | ChatRequest,
        *,
        request_id: str,
        model: str,
        prompts: Sequence[Sequence[int]],
        tokenizer: Tokenizer | None,
        echo: Sequence[str] = (),
        created: int | None = None,
    ) -> None:
        self._request = request
        self._id = request_id
        self._model = model
        self._created = int(time()) if created is None else created
        self._prompt_tokens = sum(map(len, prompts))
        self._tokenizer = tokenizer
        self._told = [_Told() for _ in range(len(prompts) * request.choices)]
        self._echo = echo
        self._tokens = 0
        self._cached_tokens: dict[int, int] = {}
        self._handoff: Handoff | UnsetType = UNSET

    @property
    def handoff(self) -> Handoff | None:
        """The hand-off that came with the outputs so far."""
        return None if isinstance(self._handoff, UnsetType) else self._handoff

    def event(self, output: Output) -> Answer:
        """The stream event of one output."""
        told = self._told[output.index]
        self._count(output)
        if not told.started:
            output = self._echoed(output)
        if isinstance(self._request, ChatRequest):
            choice = self._chat_choice(output)
            choice.delta = ChatDelta(content=output.text, role=UNSET if told.started else "assistant")
            answer = self._answer("chat.completion.chunk", [choice])
        else:
            answer = self._answer("text_completion", [self._completion_choice(output)])
        told.started = True
        options = self._request.stream_options
        if options is not None and options.continuous_usage_stats:
            answer.usage = self._usage()
        elif options is not None and options.include_usage:
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
        outputs = [self._echoed(_whole(told.outputs)) for told in self._told if told.outputs]
        if isinstance(self._request, CompletionRequest) and self._request.wanted < self._request.choices:
            outputs = _best(outputs, self._request.choices, self._request.wanted)
        if isinstance(self._request, ChatRequest):
            answer = self._answer("chat.completion", [self._chat_message(output) for output in outputs])
        else:
            answer = self._answer("text_completion", [self._completion_choice(output) for output in outputs])
        answer.usage = self._usage()
        answer.handoff = self._handoff
        return answer

    @property
    def _include_usage(self) -> bool:
        """Whether an event of its own tells it at the end."""
        return self._request.stream_options is not None and self._request.stream_options.include_usage

    def _count(self, output: Output) -> None:
        self._tokens += len(output.tokens)
        # of one that was broken off, the first attempt's
        self._cached_tokens.setdefault(output.index // self._request.choices, output.cached_tokens)
        if output.handoff is not None:
            self._handoff = output.handoff

    def _usage(self) -> Usage:
        details = PromptDetails(sum(self._cached_tokens.values()))
        return Usage(self._prompt_tokens, self._tokens, self._prompt_tokens + self._tokens, details)

    def _echoed(self, output: Output) -> Output:
        """The first output of an answer, behind its prompt where that is asked for."""
        if not self._echo:
            return output
        return replace(output, text=self._echo[output.index // self._request.choices] + output.text)

    def _answer(self, kind: _Kind, choices: list[CompletionChoice] | list[ChatChoice]) -> Answer:
        return Answer(id=self._id, object=kind, created=self._created, model=self._model, choices=choices)

    def _token_ids(self, output: Output) -> list[int] | UnsetType:
        return list(output.tokens) if self._request.return_token_ids else UNSET

    def _texts(self, tokens: Iterable[int]) -> list[TokenText]:
        return [token_text(self._tokenizer, token) for token in tokens]

    def _completion_choice(self, output: Output) -> CompletionChoice:
        choice = CompletionChoice(text=output.text, finish_reason=output.finish_reason, index=output.index)
        choice.token_ids = self._token_ids(output)
        if self._request.logprobs is not None and output.logprobs:
            found = self._texts(output.tokens)
            texts = [each.text for each in found]
            offsets = [self._told[output.index].offsets.next(each.data) for each in found]
            own = zip(texts, output.logprobs, strict=True)
            tops = [
                self._by_text(top, text, logprob)
                for top, (text, logprob) in zip(output.top_logprobs, own, strict=False)  # no tops, or one for each
            ]
            choice.logprobs = CompletionLogprobs(texts, list(output.logprobs), offsets, tops or None)
        return choice

    def _by_text(self, top: Alternatives, text: str, logprob: float) -> dict[str, float]:
        found: dict[str, float] = {}
        for each, (_, value) in zip(self._texts(token for token, _ in top), top, strict=True):
            found.setdefault(each.text, value)
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
        texts = self._texts(output.tokens)
        tops = output.top_logprobs or ((),) * len(texts)
        return ChatLogprobs(
            [
                ChatLogprob(own.text, logprob, list(own.data), self._alternatives(top))
                for own, logprob, top in zip(texts, output.logprobs, tops, strict=True)
            ]
        )

    def _alternatives(self, top: Alternatives) -> list[ChatAlternative]:
        texts = self._texts(token for token, _ in top)
        return [
            ChatAlternative(own.text, logprob, list(own.data)) for own, (_, logprob) in zip(texts, top, strict=True)
        ]


def _best(outputs: Sequence[Output], of: int, wanted: int) -> list[Output]:
    """For each prompt the likeliest ``wanted`` of its answers, by the mean logprob of a token, numbered anew."""
    best: list[Output] = []
    for start in range(0, len(outputs), of):
        ranked = sorted(outputs[start : start + of], key=lambda each: -sum(each.logprobs) / len(each.logprobs))
        best += [replace(output, index=len(best) + place) for place, output in enumerate(ranked[:wanted])]
    return best


def _whole(outputs: Sequence[Output]) -> Output:
    """All that one choice has said."""
    return Output(
        index=outputs[0].index,
        tokens=tuple(token for part in outputs for token in part.tokens),
        text="".join(part.text for part in outputs),
        logprobs=tuple(value for part in outputs for value in part.logprobs),
        top_logprobs=tuple(top for part in outputs for top in part.top_logprobs),
        finish_reason=outputs[-1].finish_reason,
        matched=outputs[-1].matched,
    )

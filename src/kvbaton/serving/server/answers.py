"""Engine outputs as OpenAI answers: whole ones and stream events, of both kinds.

This file must not know HTTP or engines' threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from time import time
from typing import Literal

from msgspec import UNSET, UnsetType

from kvbaton.serving.engine.request import Alternatives, Handoff, Output, PromptToken
from kvbaton.serving.server.echo import Echo, Unfinished
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
    PromptLogprob,
    PromptLogprobs,
    Usage,
)
from kvbaton.serving.server.token_text import MAX_CHARACTER_TOKENS, Offsets, TokenText, token_text

_Kind = Literal["text_completion", "chat.completion", "chat.completion.chunk"]


@dataclass(slots=True)
class _Told:
    """What one choice has said so far. ``outputs`` are kept for a whole answer only; ``unfinished``: the character at
    the end of an echoed prompt, until it is known what stands for it."""

    offsets: Offsets
    unfinished: Unfinished | None = None
    outputs: list[Output] = field(default_factory=list)
    started: bool = False


class Answers:
    """Formats the answer to one request; feed it every output, in order.

    ``echo``: each prompt, where it is to stand in front of its answers. ``created``: seconds of the epoch; None: now.
    """

    def __init__(
        self,
        request: CompletionRequest | ChatRequest,
        *,
        request_id: str,
        model: str,
        prompts: Sequence[Sequence[int]],
        tokenizer: Tokenizer | None,
        echo: Sequence[Echo] = (),
        created: int | None = None,
    ) -> None:
        self._request = request
        self._id = request_id
        self._model = model
        self._created = int(time()) if created is None else created
        self._prompt_tokens = sum(map(len, prompts))
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._echo = echo
        self._told = [self._start(number) for number in range(len(prompts)) for _ in range(request.choices)]
        self._prompt_logprobs: list[Sequence[PromptToken] | None] = [None] * len(prompts)
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
        output = self._count(output)
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
        self._told[output.index].outputs.append(self._count(output))

    def whole(self) -> Answer:
        """The answer made of everything collected."""
        outputs = [_whole(told.outputs) for told in self._told if told.outputs]
        if isinstance(self._request, ChatRequest):
            answer = self._answer("chat.completion", [self._chat_message(output) for output in outputs])
            answer.prompt_logprobs = self._prompt_table(0)
        else:
            of, wanted = self._request.choices, self._request.wanted
            if wanted < of:
                outputs = _best(outputs, of, wanted)
            choices = [self._completion_choice(output) for output in outputs]
            for index, choice in enumerate(choices):
                choice.index = index
            answer = self._answer("text_completion", choices)
        answer.usage = self._usage()
        answer.handoff = self._handoff
        return answer

    @property
    def _include_usage(self) -> bool:
        """Whether an event of its own tells it at the end."""
        return self._request.stream_options is not None and self._request.stream_options.include_usage

    def _start(self, number: int) -> _Told:
        """An answer to prompt ``number``."""
        if self._echo:
            return _Told(Offsets(), self._echo[number].unfinished())
        tokenizer, last = self._tokenizer, self._prompts[number][-MAX_CHARACTER_TOKENS:]
        counts = isinstance(self._request, CompletionRequest) and self._request.logprobs is not None
        return _Told(Offsets(b"".join(map(tokenizer.token_bytes, last)) if tokenizer is not None and counts else b""))

    def _count(self, output: Output) -> Output:
        """What of an output is told."""
        number = output.index // self._request.choices
        if output.prompt_logprobs is not None:
            self._prompt_logprobs[number] = output.prompt_logprobs
        if self._request.max_tokens == 0:
            output = output.untold()
        self._tokens += len(output.tokens)
        # of one that was broken off, the first attempt's
        self._cached_tokens.setdefault(number, output.cached_tokens)
        if output.handoff is not None:
            self._handoff = output.handoff
        return output

    def _usage(self) -> Usage:
        details = PromptDetails(sum(self._cached_tokens.values()))
        return Usage(self._prompt_tokens, self._tokens, self._prompt_tokens + self._tokens, details)

    def _text(self, output: Output) -> str:
        """With the first output of an answer the prompt in front of it, where that is asked for."""
        told, text = self._told[output.index], output.text
        if not self._echo:
            return text
        if told.unfinished is not None:
            for token in output.tokens:
                told.unfinished.push(self._token_text(token).data)
            if text or output.finish_reason is not None:
                text, told.unfinished = told.unfinished.text + text, None
        return text if told.started else self._echo[output.index // self._request.choices].text + text

    def _answer(self, kind: _Kind, choices: list[CompletionChoice] | list[ChatChoice]) -> Answer:
        return Answer(id=self._id, object=kind, created=self._created, model=self._model, choices=choices)

    def _token_ids(self, output: Output) -> list[int] | UnsetType:
        return list(output.tokens) if self._request.return_token_ids else UNSET

    def _token_text(self, token: int) -> TokenText:
        return token_text(self._tokenizer, token)

    def _texts(self, tokens: Iterable[int]) -> list[TokenText]:
        return [self._token_text(token) for token in tokens]

    def _completion_choice(self, output: Output) -> CompletionChoice:
        text = self._text(output)
        choice = CompletionChoice(text=text, finish_reason=output.finish_reason, index=output.index)
        choice.token_ids = self._token_ids(output)
        choice.logprobs = self._completion_logprobs(output)
        if self._request.prompt_logprobs is not None:
            choice.prompt_logprobs = self._prompt_table(output.index // self._request.choices)
        return choice

    def _completion_logprobs(self, output: Output) -> CompletionLogprobs | None:
        """Of the tokens of an output; with the first one of an echoed prompt, too."""
        if not isinstance(self._request, CompletionRequest) or self._request.logprobs is None:
            return None
        number, told = output.index // self._request.choices, self._told[output.index]
        before = None if told.started or not self._echo else self._prompt_logprobs[number]
        if before is None and not output.logprobs:
            return None
        tokens, data = list(output.tokens), [self._shown(token) for token in output.tokens]
        logprobs: list[float | None] = list(output.logprobs)
        tops: list[Alternatives | None] = list(output.top_logprobs)
        asked = self._request.logprobs
        if before is not None:
            tokens, data = [*self._prompts[number], *tokens], [*self._echo[number].data(), *data]
            logprobs = [None, *(each.logprob for each in before), *logprobs]
            tops = [None, *(each.top[:asked] for each in before), *tops]
        texts = [each.text for each in self._texts(tokens)]
        offsets = [told.offsets.next(each) for each in data]
        told_tops = self._tops(tops, texts, logprobs) if asked else None
        return CompletionLogprobs(texts, logprobs, offsets, told_tops or None)

    def _tops(
        self, tops: Sequence[Alternatives | None], texts: Sequence[str], logprobs: Sequence[float | None]
    ) -> list[dict[str, float] | None]:
        """None of a prompt's first token, which has neither."""
        return [
            None if top is None or logprob is None else self._by_text(top, text, logprob)
            for top, text, logprob in zip(tops, texts, logprobs, strict=False)  # no tops, or one for each
        ]

    def _shown(self, token: int) -> bytes:
        """What a token adds to the text."""
        skips = self._request.skip_special_tokens is not False
        if skips and self._tokenizer is not None and self._tokenizer.is_special(token):
            return b""
        return self._token_text(token).data

    def _prompt_table(self, number: int) -> PromptLogprobs | UnsetType:
        """The logprobs of a prompt as vLLM tells them."""
        asked, logprobs = self._request.prompt_logprobs, self._prompt_logprobs[number]
        if asked is None or logprobs is None:
            return UNSET
        table: PromptLogprobs = [None]
        for token, told in zip(self._prompts[number][1:], logprobs, strict=True):
            row = {token: PromptLogprob(told.logprob, told.rank, self._token_text(token).text)}
            for rank, (other, logprob) in enumerate(told.top[:asked], 1):
                row.setdefault(other, PromptLogprob(logprob, rank, self._token_text(other).text))
            table.append(row)
        return table

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
    """For each prompt the likeliest ``wanted`` of its ``of`` answers, by the mean logprob of a token."""
    best: list[Output] = []
    for start in range(0, len(outputs), of):
        best += sorted(outputs[start : start + of], key=lambda output: -_mean(output.logprobs))[:wanted]
    return best


def _mean(logprobs: Sequence[float]) -> float:
    return sum(logprobs) / len(logprobs) if logprobs else 0.0


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

"""Engine outputs as SGLang's ``/generate`` answers them: whole ones and stream events.

This file must not know HTTP or engines' threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

from msgspec import UNSET, UnsetType

from kvbaton.serving.engine.request import Alternatives, Handoff, Output, PromptToken
from kvbaton.serving.server.engine import Tokenizer
from kvbaton.serving.server.sglang import FinishReason, Generated, GenerateRequest, MetaInfo, TokenLogprob
from kvbaton.serving.server.token_text import token_text


class GeneratedAnswers:
    """Formats the answers to one request; feed it every output, in order."""

    def __init__(
        self,
        request: GenerateRequest,
        *,
        request_id: str,
        prompts: Sequence[Sequence[int]],
        tokenizer: Tokenizer | None,
    ) -> None:
        self._request = request
        self._tokenizer = tokenizer
        self._started = perf_counter()
        self._choices = request.choices
        self._prompts = prompts
        self._asked = request.asked(prompts)
        self._is_batch = request.is_batch
        self._begun: set[int] = set()
        count = len(prompts) * self._choices
        self._told = [
            Generated(
                text="",
                output_ids=[],
                meta_info=MetaInfo(
                    id=request_id if count == 1 else f"{request_id}-{index}",
                    finish_reason=None,
                    prompt_tokens=len(prompts[index // self._choices]),
                    completion_tokens=0,
                    cached_tokens=0,
                ),
                index=index if self._is_batch else UNSET,
            )
            for index in range(count)
        ]
        for index, told in enumerate(self._told):
            sampling = self._asked[index // self._choices].sampling
            if sampling.logprobs:
                told.meta_info.input_token_logprobs, told.meta_info.output_token_logprobs = [], []
            if sampling.top_logprobs:
                told.meta_info.input_top_logprobs, told.meta_info.output_top_logprobs = [], []

    @property
    def handoff(self) -> Handoff | None:
        return next((told.handoff for told in self._told if isinstance(told.handoff, Handoff)), None)

    def event(self, output: Output) -> Generated:
        """The stream event of one output: all of its answer so far."""
        self.collect(output)
        return self._told[output.index]

    def usage_event(self) -> None:
        """Every event tells it."""

    def collect(self, output: Output) -> None:
        told, number = self._told[output.index], output.index // self._choices
        meta = told.meta_info
        if self._asked[number].max_new_tokens == 0:
            output = output.untold()
        told.text += output.text
        told.output_ids += output.tokens
        meta.completion_tokens += len(output.tokens)
        first = number * self._choices
        if first not in self._begun:  # of a prompt that was broken off, the first attempt's
            self._begun.add(first)
            for other in self._told[first : first + self._choices]:
                other.meta_info.cached_tokens = output.cached_tokens
        if output.prompt_logprobs is not None:
            self._add_prompt(number, output.prompt_logprobs)
        if output.handoff is not None:
            told.handoff = output.handoff
        if isinstance(meta.output_token_logprobs, list):
            pairs = zip(output.logprobs, output.tokens, strict=True)
            meta.output_token_logprobs += [self._logprob(token, logprob) for logprob, token in pairs]
        if isinstance(meta.output_top_logprobs, list):
            meta.output_top_logprobs += [self._alternatives(top) for top in output.top_logprobs]
        if output.finish_reason is not None:
            meta.finish_reason = self._reason(output, meta.completion_tokens)
            meta.e2e_latency = perf_counter() - self._started

    def whole(self) -> Generated | list[Generated]:
        if self._is_batch:
            for told in self._told:
                told.index = UNSET
            return self._told
        return self._told[0]

    def _add_prompt(self, number: int, logprobs: Sequence[PromptToken]) -> None:
        """With each of its answers, from the token on that was asked for."""
        start, prompt = self._asked[number].start or 0, self._prompts[number]
        if start >= len(prompt):
            return
        own = [self._logprob(prompt[start], None)]
        given = zip(prompt[start + 1 :], logprobs[start:], strict=True)
        own += [self._logprob(token, each.logprob) for token, each in given]
        tops: list[list[TokenLogprob] | None] = [None, *(self._alternatives(each.top) for each in logprobs[start:])]
        for told in self._told[number * self._choices : (number + 1) * self._choices]:
            told.meta_info.input_token_logprobs = own
            if not isinstance(told.meta_info.input_top_logprobs, UnsetType):
                told.meta_info.input_top_logprobs = tops

    def _reason(self, output: Output, tokens: int) -> FinishReason:
        if output.finish_reason == "length":
            return FinishReason(type="length", length=tokens)
        return FinishReason(type="stop", matched=UNSET if output.matched is None else output.matched)

    def _logprob(self, token: int, logprob: float | None) -> TokenLogprob:
        text = token_text(self._tokenizer, token).text if self._request.return_text_in_logprobs else None
        return logprob, token, text

    def _alternatives(self, top: Alternatives) -> list[TokenLogprob]:
        return [self._logprob(token, logprob) for token, logprob in top]

"""SGLang's ``POST /generate``: what it is asked, and what it answers.

Rules: as of ``openai``. Streamed texts, tokens and logprobs are cumulative, as SGLang's are. Logprobs of a prompt are
told from ``logprob_start_len`` on, the first of them as null; left out, or -1, it is the prompt's end. Several prompts
are answered as a list, or as events with their ``index``; how to sample and what is told of logprobs is said once for
all of them, or in a list with one value for each.

This file must not know HTTP, engines' threads or tokenizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType, field

from kvbaton.serving.engine.request import Handoff, Sampling
from kvbaton.serving.server.fields import Kind, check_known, with_known
from kvbaton.serving.server.openai import (
    Choices,
    MinP,
    Natural,
    Penalty,
    Repetition,
    Seed,
    Stops,
    Temperature,
    TopK,
    TopLogprobs,
    TopP,
    bias_of,
    stop_tokens_of,
    stops_of,
)
from kvbaton.serving.server.parsing import explained
from kvbaton.serving.server.per_prompt import value_for, values_of
from kvbaton.serving.server.prompts import MAX_PROMPTS, Prompt, prompts_of
from kvbaton.serving.server.raw import decoded, null, refuse
from kvbaton.serving.server.routing import Routed

#: max_new_tokens of a request that does not say, as SGLang's; clipped to what there is room for.
MAX_NEW_TOKENS = 128
MAX_PARAMS_BYTES = 256 << 10
#: Longest list of flags or counts, one for each prompt.
MAX_LIST_BYTES = 16 << 10

Start = Annotated[int, Meta(ge=-1, le=1 << 24)]


class SamplingParams(Struct, frozen=True, kw_only=True):
    max_new_tokens: Natural | None = None
    min_new_tokens: Natural | None = None
    stop: Stops | None = None
    stop_token_ids: Raw = field(default_factory=null)
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Repetition | None = None
    logit_bias: Raw = field(default_factory=null)
    n: Choices | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    sampling_seed: Seed | None = None

    def sampling(self) -> Sampling:
        """Without how many tokens are told, and which logprobs. Raises ConfigError."""
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.sampling_seed,
            stop=stops_of(self.stop),
            ignore_eos=bool(self.ignore_eos),
            choices=self.n or 1,
            top_k=max(0, self.top_k or 0),
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            logit_bias=bias_of(self.logit_bias),
            min_tokens=self.min_new_tokens or 0,
            stop_token_ids=stop_tokens_of(self.stop_token_ids),
            skip_special_tokens=self.skip_special_tokens is not False,
            include_stop=bool(self.no_stop_trim),
        )


_PARAMS: msgspec.json.Decoder[Any] = msgspec.json.Decoder(with_known(SamplingParams, "sampling_params", strict=False))


def _params_of(raw: Raw) -> SamplingParams:
    try:
        params: SamplingParams = _PARAMS.decode(raw)
    except (msgspec.MsgspecError, RecursionError) as error:
        refuse("sampling_params", explained(str(error)))
    check_known(params, "sampling_params")
    return params


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked of one prompt: ``max_new_tokens``, None for as many as there is room for; how to sample them, and
    which logprobs are told; ``start``: the first token of the prompt that one is told of, None for none of them."""

    max_new_tokens: int | None
    sampling: Sampling
    start: int | None = None

    def telling(self, alternatives: int, start: int, tokens: int) -> Asked:
        """With logprobs, those of the prompt's ``tokens`` from ``start`` on; -1: of none. Raises ConfigError."""
        if start > tokens:
            refuse("logprob_start_len", f"{start} is behind the {tokens} tokens of its prompt")
        sampling = replace(
            self.sampling,
            logprobs=True,
            top_logprobs=alternatives,
            prompt_logprobs=alternatives if start >= 0 else None,
        )
        return replace(self, sampling=sampling, start=start if start >= 0 else None)


class GenerateRequest(Routed, kw_only=True, dict=True):
    """What SGLang takes as one value for all prompts or as a list with one for each stays bytes."""

    kind: ClassVar[Kind] = "generate"

    text: Raw = field(default_factory=null)
    input_ids: Raw = field(default_factory=null)
    sampling_params: Raw = field(default_factory=null)
    return_logprob: Raw = field(default_factory=null)
    logprob_start_len: Raw = field(default_factory=null)
    top_logprobs_num: Raw = field(default_factory=null)
    return_text_in_logprobs: bool | None = None

    def check(self) -> None:
        if (bytes(self.text) == b"null") == (bytes(self.input_ids) == b"null"):
            refuse("text", "or input_ids is required, and not both")
        if isinstance(self.params, list) and len({one.n or 1 for one in self.params}) > 1:
            refuse("sampling_params", "n is the same for all prompts of a request")

    @cached_property
    def params(self) -> SamplingParams | list[SamplingParams]:
        """For all prompts, or for each; decoded once. Raises ConfigError."""
        raw = self.sampling_params
        if len(raw) > MAX_PARAMS_BYTES:
            refuse("sampling_params", f"{len(raw)} bytes are more than {MAX_PARAMS_BYTES}")
        if bytes(raw) == b"null":
            return SamplingParams()
        if not bytes(raw).startswith(b"["):
            return _params_of(raw)
        several: list[Raw] = decoded(raw, list[Raw], "sampling_params", MAX_PARAMS_BYTES)
        if not 1 <= len(several) <= MAX_PROMPTS:
            refuse("sampling_params", f"{len(several)} values are not one for each of 1 to {MAX_PROMPTS} prompts")
        return [_params_of(one) for one in several]

    @property
    def choices(self) -> int:
        params = self.params[0] if isinstance(self.params, list) else self.params
        return params.n or 1

    @property
    def prompt_field(self) -> str:
        """The field that the prompts are in."""
        return "text" if bytes(self.text) != b"null" else "input_ids"

    @property
    def is_batch(self) -> bool:
        """Whether the answer is a list."""
        raw = bytes(getattr(self, self.prompt_field))
        return self.choices > 1 or (raw.startswith(b"[") and raw[1:64].lstrip()[:1] in (b'"', b"["))

    def prompts(self, most_tokens: int) -> list[Prompt]:
        """Raises ConfigError."""
        name = self.prompt_field
        prompts = prompts_of(getattr(self, name), name, most_tokens)[0]
        if any(isinstance(prompt, str) != (name == "text") for prompt in prompts):
            refuse(name, "has the wrong type; texts are text, token ids are input_ids")
        return prompts

    def asked(self, prompts: Sequence[Sequence[int]]) -> list[Asked]:
        """What is asked of each of the prompts, which are token ids by now. Raises ConfigError."""

        def each(values: Any, name: str) -> list[Any]:
            return [value_for(values, index, len(prompts), self.choices, name) for index in range(len(prompts))]

        def given(name: str, kind: Any) -> list[Any]:
            return each(values_of(getattr(self, name), kind, name, MAX_LIST_BYTES), name)

        several = self.params
        ways = each([_way(one) for one in several] if isinstance(several, list) else _way(several), "sampling_params")
        return [
            way.telling(alternatives or 0, -1 if start is None else start, len(prompt)) if told else way
            for way, told, start, alternatives, prompt in zip(
                ways,
                given("return_logprob", bool),
                given("logprob_start_len", Start),
                given("top_logprobs_num", TopLogprobs),
                prompts,
                strict=True,
            )
        ]


def _way(params: SamplingParams) -> Asked:
    """Without logprobs. Raises ConfigError."""
    return Asked(params.max_new_tokens, params.sampling())


#: (logprob, token, its text where it was asked for)
TokenLogprob = tuple[float | None, int, str | None]


class FinishReason(Struct, frozen=True, kw_only=True):
    type: str
    matched: int | str | UnsetType = UNSET
    length: int | UnsetType = UNSET


class MetaInfo(Struct, kw_only=True):
    id: str
    finish_reason: FinishReason | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    weight_version: str = "default"
    e2e_latency: float | UnsetType = UNSET
    input_token_logprobs: list[TokenLogprob] | UnsetType = UNSET
    output_token_logprobs: list[TokenLogprob] | UnsetType = UNSET
    input_top_logprobs: list[list[TokenLogprob] | None] | UnsetType = UNSET
    output_top_logprobs: list[list[TokenLogprob] | None] | UnsetType = UNSET


class Generated(Struct, kw_only=True):
    """One answer; ``index`` where there are several in one stream."""

    text: str
    output_ids: list[int]
    meta_info: MetaInfo
    index: int | UnsetType = UNSET
    handoff: Handoff | UnsetType = UNSET

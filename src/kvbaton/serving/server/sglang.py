"""SGLang's ``POST /generate``: what it is asked, and what it answers.

Rules: as of ``openai``. Streamed texts, tokens and logprobs are cumulative, as SGLang's are. Logprobs of a prompt are
told from ``logprob_start_len`` on, the first of them as null; left out, or -1, it is the prompt's end. Several prompts
are answered as a list, or as events with their ``index``.

This file must not know HTTP, engines' threads or tokenizers.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType, field

from kvbaton.serving.engine.request import Handoff, Sampling
from kvbaton.serving.server.fields import Kind, check_known, with_known
from kvbaton.serving.server.openai import (
    Choices,
    Count,
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
from kvbaton.serving.server.prompts import Prompt, prompts_of
from kvbaton.serving.server.raw import null, refuse
from kvbaton.serving.server.routing import Routed

#: max_new_tokens of a request that does not say, as SGLang's; clipped to what there is room for.
MAX_NEW_TOKENS = 128
MAX_PARAMS_BYTES = 256 << 10


class SamplingParams(Struct, frozen=True, kw_only=True):
    max_new_tokens: Count | None = None
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


_PARAMS: msgspec.json.Decoder[Any] = msgspec.json.Decoder(with_known(SamplingParams, "sampling_params", strict=False))


class GenerateRequest(Routed, kw_only=True, dict=True):
    kind: ClassVar[Kind] = "generate"

    text: Raw = field(default_factory=null)
    input_ids: Raw = field(default_factory=null)
    sampling_params: Raw = field(default_factory=null)
    return_logprob: bool | None = None
    logprob_start_len: Annotated[int, Meta(ge=-1, le=1 << 24)] | None = None
    top_logprobs_num: TopLogprobs | None = None
    return_text_in_logprobs: bool | None = None

    def check(self) -> None:
        if (bytes(self.text) == b"null") == (bytes(self.input_ids) == b"null"):
            refuse("text", "or input_ids is required, and not both")
        _ = self.params

    @cached_property
    def params(self) -> SamplingParams:
        """Decoded once. Raises ConfigError."""
        if bytes(self.sampling_params) == b"null":
            return SamplingParams()
        if len(self.sampling_params) > MAX_PARAMS_BYTES:
            refuse("sampling_params", f"{len(self.sampling_params)} bytes are more than {MAX_PARAMS_BYTES}")
        try:
            params: SamplingParams = _PARAMS.decode(self.sampling_params)
        except (msgspec.MsgspecError, RecursionError) as error:
            refuse("sampling_params", explained(str(error)))
        check_known(params, "sampling_params")
        return params

    @property
    def choices(self) -> int:
        return self.params.n or 1

    @property
    def is_batch(self) -> bool:
        """Whether the answer is a list."""
        raw = bytes(self.text) if bytes(self.text) != b"null" else bytes(self.input_ids)
        return self.choices > 1 or (raw.startswith(b"[") and raw[1:64].lstrip()[:1] in (b'"', b"["))

    def prompts(self, most_tokens: int) -> list[Prompt]:
        """Raises ConfigError."""
        name = "text" if bytes(self.text) != b"null" else "input_ids"
        prompts = prompts_of(getattr(self, name), name, most_tokens)[0]
        if any(isinstance(prompt, str) != (name == "text") for prompt in prompts):
            refuse(name, "has the wrong type; texts are text, token ids are input_ids")
        return prompts

    @property
    def logprob_start(self) -> int | None:
        """The first token of a prompt that a logprob is told of; None: there is none."""
        start = -1 if self.logprob_start_len is None or not self.return_logprob else self.logprob_start_len
        return None if start < 0 else start

    def sampling(self, *, max_tokens: int) -> Sampling:
        params = self.params
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if params.temperature is None else params.temperature,
            top_p=1.0 if params.top_p is None else params.top_p,
            seed=params.sampling_seed,
            stop=stops_of(params.stop),
            ignore_eos=bool(params.ignore_eos),
            logprobs=bool(self.return_logprob),
            top_logprobs=(self.top_logprobs_num or 0) if self.return_logprob else 0,
            choices=params.n or 1,
            top_k=max(0, params.top_k or 0),
            min_p=params.min_p or 0.0,
            repetition_penalty=1.0 if params.repetition_penalty is None else params.repetition_penalty,
            frequency_penalty=params.frequency_penalty or 0.0,
            presence_penalty=params.presence_penalty or 0.0,
            logit_bias=bias_of(params.logit_bias),
            min_tokens=params.min_new_tokens or 0,
            stop_token_ids=stop_tokens_of(params.stop_token_ids),
            skip_special_tokens=params.skip_special_tokens is not False,
            include_stop=bool(params.no_stop_trim),
            prompt_logprobs=None if self.logprob_start is None else self.top_logprobs_num or 0,
        )


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

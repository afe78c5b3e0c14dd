"""What a request may ask for: checked before it enters a queue, each refusal naming its field.

This file must not know of threads or peers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from kvbaton.errors import CapacityError, ConfigError, ContextLengthError
from kvbaton.manager import MAX_ROOM
from kvbaton.serving.engine.model import LoadedModel
from kvbaton.serving.engine.pool import Pools
from kvbaton.serving.engine.request import (
    MAX_CHOICES,
    MAX_LOGIT_BIAS,
    MAX_STOP_TOKENS,
    MAX_TOP_LOGPROBS,
    Request,
    Sampling,
)
from kvbaton.serving.engine.sequence_group import most_choices

#: Most stop strings, and characters of each: they are searched for at every token.
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
#: Largest bias, as OpenAI's; bounds of what changes logits.
MAX_BIAS = 100
_RANGES = {
    "top_k": (0, 1 << 31),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "frequency_penalty": (-2.0, 2.0),
    "presence_penalty": (-2.0, 2.0),
    "min_tokens": (0, 1 << 24),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Bounds of one scheduler.

    Args:
        max_positions: tokens that the model can see, prompt and answer together.
        vocab_size: token ids are below this.
        pool_tokens: tokens that the whole pool holds.
        keeps_answer: the answer's tokens are cached here too (everywhere but on prefill).
        needs_room: requests are half of a hand-off.
        has_text: there is a tokenizer, so stop strings can match.
        record_tokens: tokens of a prompt whose logprobs can be handed over.
        most_choices: how many answers of (prompt tokens, tokens in all) the empty pool has room for at once.
    """

    max_positions: int
    vocab_size: int
    pool_tokens: int
    keeps_answer: bool = True
    needs_room: bool = False
    has_text: bool = True
    record_tokens: int = 1 << 31
    most_choices: Callable[[int, int], int] = lambda _prompt, _tokens: MAX_CHOICES

    def cached_tokens(self, request: Request) -> int:
        """Tokens that ``request`` will ever have in the pool: the answer's last one is never computed."""
        if not self.keeps_answer:
            return len(request.prompt_tokens)
        return len(request.prompt_tokens) - request.answered + request.sampling.max_tokens - 1

    def validate(self, request: Request) -> None:
        """Raise ConfigError for what is wrong in itself, CapacityError for what can never fit."""
        _validate_sampling(request.sampling)
        _validate_adjustment(request.sampling, self.vocab_size)
        if request.sampling.stop and not self.has_text:
            raise ConfigError("stop: the model has no tokenizer, so no stop string can match")
        self._validate_prompt(request)
        if self.needs_room:
            if request.room is None:
                raise ConfigError("bootstrap_room: this server is one half of a pair; send requests through the router")
            if not 0 <= request.room <= MAX_ROOM:
                raise ConfigError(f"bootstrap_room: {request.room} is outside 0..2^63-1")

    def _validate_prompt(self, request: Request) -> None:
        prompt, answer = len(request.prompt_tokens) - request.answered, request.sampling.max_tokens
        if prompt <= 0:
            raise ConfigError("prompt: it has no tokens")
        if not 0 <= request.answered < answer:
            raise ConfigError(f"answered: {request.answered} tokens leave none of max_tokens={answer}")
        foreign = next((token for token in request.prompt_tokens if not 0 <= token < self.vocab_size), None)
        if foreign is not None:
            raise ConfigError(f"prompt: token {foreign} is outside the vocabulary of {self.vocab_size}")
        if prompt + answer > self.max_positions:
            raise ContextLengthError(
                f"max_tokens: a prompt of {prompt} tokens and max_tokens={answer} exceed "
                f"the model's {self.max_positions} positions"
            )
        if request.recorded_tokens > self.record_tokens:
            raise CapacityError(
                f"prompt_logprobs: those of {prompt} tokens are more than this server hands over, {self.record_tokens}"
            )
        needed = self.cached_tokens(request)
        if needed > self.pool_tokens:
            raise CapacityError(
                f"max_tokens: the request needs {needed} tokens of cache, the whole pool has {self.pool_tokens}; "
                "shorten it or start the server with more pages"
            )
        most = self.most_choices(prompt, needed) if self.keeps_answer else MAX_CHOICES
        if request.sampling.choices > most:
            raise CapacityError(
                f"n: {request.sampling.choices} answers of {needed} tokens each, prompt and answer, need more than the "
                f"whole pool, which has room for {most} at once; lower n or max_tokens"
            )


def _validate_sampling(sampling: Sampling) -> None:
    if sampling.max_tokens < 1:
        raise ConfigError(f"max_tokens: {sampling.max_tokens} must be at least 1")
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise ConfigError(f"temperature: {sampling.temperature} must be a number of at least 0")
    if not 0 < sampling.top_p <= 1:  # false for NaN
        raise ConfigError(f"top_p: {sampling.top_p} must be above 0 and at most 1")
    if not 1 <= sampling.choices <= MAX_CHOICES:
        raise ConfigError(f"n: {sampling.choices} is outside 1..{MAX_CHOICES}")
    if not 0 <= sampling.top_logprobs <= (MAX_TOP_LOGPROBS if sampling.logprobs else 0):
        raise ConfigError(
            f"top_logprobs: {sampling.top_logprobs} is outside 0..{MAX_TOP_LOGPROBS}, or without logprobs"
        )
    if not 0 <= (sampling.prompt_logprobs or 0) <= MAX_TOP_LOGPROBS:
        raise ConfigError(f"prompt_logprobs: {sampling.prompt_logprobs} is outside 0..{MAX_TOP_LOGPROBS}")
    if len(sampling.stop) > MAX_STOPS:
        raise ConfigError(f"stop: {len(sampling.stop)} strings are more than {MAX_STOPS}")
    if not all(0 < len(stop) <= MAX_STOP_CHARACTERS for stop in sampling.stop):
        raise ConfigError(f"stop: each string must have 1 to {MAX_STOP_CHARACTERS} characters")


def _validate_adjustment(sampling: Sampling, vocab_size: int) -> None:
    for name, (low, high) in _RANGES.items():
        value = getattr(sampling, name)
        if not low <= value <= high:  # true for NaN
            raise ConfigError(f"{name}: {value} is outside {low:g}..{high:g}")
    if sampling.min_tokens > sampling.max_tokens:
        raise ConfigError(f"min_tokens: {sampling.min_tokens} are more than max_tokens={sampling.max_tokens}")
    _validate_tokens(sampling, vocab_size)


def _validate_tokens(sampling: Sampling, vocab_size: int) -> None:
    """Those that a request names by their number."""
    if len(sampling.stop_token_ids) > MAX_STOP_TOKENS:
        raise ConfigError(f"stop_token_ids: {len(sampling.stop_token_ids)} are more than {MAX_STOP_TOKENS}")
    if len(sampling.logit_bias) > MAX_LOGIT_BIAS:
        raise ConfigError(f"logit_bias: {len(sampling.logit_bias)} tokens are more than {MAX_LOGIT_BIAS}")
    if not all(abs(bias) <= MAX_BIAS for _, bias in sampling.logit_bias):
        raise ConfigError(f"logit_bias: a value is outside -{MAX_BIAS}..{MAX_BIAS}")
    named = {"logit_bias": [token for token, _ in sampling.logit_bias], "stop_token_ids": sampling.stop_token_ids}
    for name, tokens in named.items():
        foreign = next((token for token in tokens if not 0 <= token < vocab_size), None)
        if foreign is not None:
            raise ConfigError(f"{name}: token {foreign} is outside the vocabulary of {vocab_size}")


def limits_of(model: LoadedModel, pools: Pools, *, keeps_answer: bool = True, needs_room: bool = False) -> Limits:
    """The limits that a model and its pools set."""
    return Limits(
        max_positions=model.geometry.max_positions,
        vocab_size=model.geometry.vocab_size,
        pool_tokens=pools.tokens,
        keeps_answer=keeps_answer,
        needs_room=needs_room,
        has_text=model.tokenizer is not None,
        record_tokens=pools.record_tokens if needs_room else 1 << 31,
        most_choices=lambda prompt, tokens: most_choices(pools, prompt, tokens),
    )

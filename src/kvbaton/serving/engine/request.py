"""What an engine is asked, and what it answers: plain data between the API server and the scheduler thread."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from kvbaton.errors import KVBatonError

#: Most answers to one prompt, and most alternatives told of beside each token: an aux row has room for these.
MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20
#: Most tokens with a bias, and most tokens that stop an answer.
MAX_LOGIT_BIAS = 1024
MAX_STOP_TOKENS = 64

#: Alternatives to one token: (token, natural logarithm of its probability), likeliest first.
Alternatives = tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class PromptToken:
    """What the model says of one token of a prompt, given those before it: ``rank`` 1 is the likeliest, ``top`` are the
    likeliest tokens of that place."""

    logprob: float
    rank: int
    top: Alternatives = ()


class HandedOnError(KVBatonError):
    """What is left of a request is another engine's, which has all of its cache now."""

    code = "handed_on"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How to pick tokens. ``temperature`` 0 is greedy. ``seed`` makes a sampled request repeatable.

    ``choices`` answers are given to the one prompt. ``top_logprobs`` alternatives are told of beside each token's own
    logprob; they need ``logprobs``. ``top_k`` 0: all tokens. ``logit_bias``: (token, what is added to its logit).
    ``min_tokens``: so many come before the answer may end. ``include_stop``: what stopped the answer is part of its
    text. ``prompt_logprobs``: alternatives to each token of the prompt that are told of beside its own logprob; None:
    nothing is.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False
    top_logprobs: int = 0
    choices: int = 1
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    skip_special_tokens: bool = True
    include_stop: bool = False
    prompt_logprobs: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt to continue.

    ``room`` and ``sources`` are set for disaggregated requests only: the router's room, and (decode side) the control
    addresses of the prefill group's ranks as resolved from the registry. ``dp_rank``: the data-parallel rank that is to
    serve it; None: whichever the server chooses. ``answered``: so many of the last prompt tokens are the answer so far,
    which another engine gave before it broke off: they count as its tokens everywhere, and are not told again.
    """

    request_id: str
    prompt_tokens: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    room: int | None = None
    sources: tuple[str, ...] = ()
    dp_rank: int | None = None
    answered: int = 0

    @property
    def asked_tokens(self) -> tuple[int, ...]:
        """The prompt by itself."""
        return self.prompt_tokens[: len(self.prompt_tokens) - self.answered]

    @property
    def answered_tokens(self) -> tuple[int, ...]:
        """The answer so far."""
        return self.prompt_tokens[len(self.prompt_tokens) - self.answered :]

    @property
    def recorded_tokens(self) -> int:
        """Tokens of the prompt whose logprobs are asked for: all, or none."""
        return 0 if self.sampling.prompt_logprobs is None else len(self.prompt_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class Handoff:
    """What the hand-off of a request moved and took.

    ``seconds`` runs from the grant of pages to the arrival and so contains the prefill; ``exposed_seconds`` is what
    disaggregation adds: from the last chunk being computed to its last byte having settled.
    """

    bytes: int
    seconds: float
    exposed_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """One step of one of a request's answers, of which ``index`` is the number.

    The last of an answer has ``finish_reason`` ("stop", "length"); ``unfinished`` other answers go on after it. An
    ``error`` (AbortedError: the caller, or somebody for it) is the last word on all of them. ``top_logprobs`` has one
    entry per token. ``matched``: the token or stop string that ended the answer. ``cached_tokens``: of the prompt, and
    ``prompt_logprobs``, one for each of its tokens but the first: told with the first output, where they are asked for.
    ``queued_seconds``: until the engine took the request up, told with the first output, too. ``rank``: the
    data-parallel rank that says it. ``departing``: no answer of the request goes on here, another engine is being given
    its cache; the last word is then a HandedOnError, or why it came to nothing.
    """

    index: int = 0
    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[Alternatives, ...] = ()
    finish_reason: str | None = None
    unfinished: int = 0
    error: KVBatonError | None = None
    handoff: Handoff | None = None
    matched: int | str | None = None
    cached_tokens: int = 0
    prompt_logprobs: tuple[PromptToken, ...] | None = None
    queued_seconds: float | None = None
    rank: int = 0
    departing: bool = False

    def untold(self) -> Output:
        """As whoever has asked for no token is told of it: one was drawn all the same."""
        reason = self.finish_reason and "length"
        return replace(self, tokens=(), text="", logprobs=(), top_logprobs=(), finish_reason=reason, matched=None)

    @property
    def ends_choice(self) -> bool:
        """Nothing follows in this answer."""
        return self.finish_reason is not None or self.error is not None

    @property
    def final(self) -> bool:
        """Nothing follows in any answer."""
        return self.ends_choice and not self.unfinished

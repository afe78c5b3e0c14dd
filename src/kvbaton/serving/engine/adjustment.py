"""What a request asks to be done to the logits before a token is picked: bias, penalties, tokens that may not come yet.

In the order of vLLM: ``logit_bias`` is added, what ``min_tokens`` forbids is taken out, then ``repetition_penalty``
(tokens of prompt and answer), ``frequency_penalty`` and ``presence_penalty`` (tokens of the answer). A function of the
request and of the tokens so far alone, so that prefill, which picks the first token, and decode do as one process does.

This file must not know of batches, pools or peers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from kvbaton.serving.engine.request import Request, Sampling

Row = npt.NDArray[np.float64]


class Adjustment:
    """Of one answer: feed it every token. ``ends`` are the tokens that would end the answer."""

    def __init__(self, sampling: Sampling, prompt_tokens: Sequence[int], ends: Collection[int]) -> None:
        self._sampling = sampling
        self._counts: Counter[int] = Counter()
        self._seen = set(prompt_tokens) if sampling.repetition_penalty != 1.0 else set[int]()
        self._ends = np.fromiter(ends, np.int64)
        self._biased = np.array([token for token, _ in sampling.logit_bias], np.int64)
        self._bias = np.array([bias for _, bias in sampling.logit_bias], np.float64)

    def push(self, token: int) -> None:
        self._counts[token] += 1

    def apply(self, logits: Row) -> None:
        """Change one row, in place."""
        if len(self._biased):
            logits[self._biased] += self._bias
        if self._counts.total() < self._sampling.min_tokens and len(self._ends):
            forbidden = logits[self._ends]
            logits[self._ends] = -np.inf
            if not np.isfinite(logits.max()):  # nothing else is left
                logits[self._ends] = forbidden
        self._repetition(logits)
        self._frequency(logits)

    def _repetition(self, logits: Row) -> None:
        penalty = self._sampling.repetition_penalty
        if penalty == 1.0:
            return
        self._seen |= self._counts.keys()
        seen = np.fromiter(self._seen, np.int64, len(self._seen))
        values = logits[seen]
        logits[seen] = np.where(values > 0, values / penalty, values * penalty)

    def _frequency(self, logits: Row) -> None:
        frequency, presence = self._sampling.frequency_penalty, self._sampling.presence_penalty
        if not self._counts or not (frequency or presence):
            return
        said = np.fromiter(self._counts.keys(), np.int64, len(self._counts))
        times = np.fromiter(self._counts.values(), np.float64, len(self._counts))
        logits[said] -= frequency * times + presence


def adjustment_of(request: Request, ends: Collection[int]) -> Adjustment | None:
    """One that has seen the answer so far; None where the request asks for nothing of it, so that a plain batch pays
    nothing."""
    sampling = request.sampling
    plain = (
        sampling.repetition_penalty == 1.0
        and not sampling.frequency_penalty
        and not sampling.presence_penalty
        and not sampling.logit_bias
        and not (sampling.min_tokens and ends)
    )
    if plain:
        return None
    adjustment = Adjustment(sampling, request.asked_tokens, ends)
    for token in request.answered_tokens:
        adjustment.push(token)
    return adjustment

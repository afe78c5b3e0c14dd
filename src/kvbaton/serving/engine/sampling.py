"""Picking tokens: greedy, temperature, top-k, top-p, min-p, seeded; a pure function of logits, the tokens so far, seed
and position.

Rules: the random number behind a token depends on (seed, position) alone, never on what was drawn before, on the
batch, or on the process: prefill draws the first token, decode the rest, and together they equal one process. Each of
a request's choices has a seed of its own, made of the request's. The
draw inverts the cumulative distribution in order of token id, not of probability: batch shape may change logits in
the last bit, and in this order such a change moves every boundary by no more than that, where a sort would let two
nearly equal tokens swap places. This file must not know of requests' text, pools or peers.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvbaton.errors import InternalError
from kvbaton.serving.engine.adjustment import Adjustment
from kvbaton.serving.engine.request import Alternatives, Sampling

#: Told instead of minus infinity, which JSON cannot say: OpenAI's number for what is out of the question.
LEAST_LOGPROB = -9999.0


@dataclass(frozen=True, slots=True)
class Draw:
    """One token to pick: ``position`` is the absolute one that the token will have."""

    sampling: Sampling
    seed: int
    position: int
    adjustment: Adjustment | None = None


@dataclass(frozen=True, slots=True)
class Pick:
    """A picked token and the natural logarithm of its probability under the model (temperature 1, no top-p); 0 where
    nobody in its batch has asked for logprobs.

    ``top`` are the likeliest tokens of that place, as many as were asked for, whether picked or not.
    """

    token: int
    logprob: float
    top: Alternatives = ()


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that (seed, position) stands for: 53 bits of a hash, the same on every machine."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed, position), digest_size=8, person=b"kvbaton draw").digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def pick_tokens(logits: Any, draws: Sequence[Draw]) -> list[Pick | InternalError]:
    """Pick one token per row of ``logits`` [rows, vocabulary]. A row that is not finite is that row's error."""
    logits = logits.float()
    greatest, likeliest = logits.max(dim=-1)  # what is not a number is the greatest
    finite, tokens = [math.isfinite(value) for value in greatest.tolist()], likeliest.tolist()
    for row, draw in enumerate(draws):
        if finite[row] and (draw.sampling.temperature > 0 or draw.adjustment is not None):
            tokens[row] = _pick(logits[row].cpu().numpy(), draw)
    logprobs, tops = _logprobs(logits, tokens, draws)
    return [
        Pick(tokens[row], logprobs[row], tops[row])
        if finite[row]
        else InternalError(f"the model's logits at position {draw.position} are not finite; try dtype float32")
        for row, draw in enumerate(draws)
    ]


def first_tokens(logits: Any, draws: Sequence[Draw]) -> list[Pick]:
    """One token for each of a request's choices, of the one row of ``logits`` [1, vocabulary] behind its prompt.

    Raises InternalError where the row is not finite.
    """
    picked = pick_tokens(logits.expand(len(draws), -1), draws)
    for pick in picked:
        if isinstance(pick, InternalError):
            raise pick
    return [pick for pick in picked if isinstance(pick, Pick)]


def _logprobs(logits: Any, tokens: Sequence[int], draws: Sequence[Draw]) -> tuple[list[float], list[Alternatives]]:
    """Of each row's token, and its alternatives; a pass over the vocabulary that is left out where nobody asks."""
    if not any(draw.sampling.logprobs for draw in draws):
        return [0.0] * len(draws), [()] * len(draws)
    totals = logits.logsumexp(dim=-1)
    chosen = torch.tensor(tokens, device=logits.device)[:, None]
    logprobs = (logits.gather(1, chosen)[:, 0] - totals).tolist()
    return logprobs, _tops(logits, totals, [draw.sampling.top_logprobs for draw in draws])


def _tops(logits: Any, totals: Any, counts: Sequence[int]) -> list[Alternatives]:
    """The ``counts[row]`` likeliest tokens of each row, or as many as the vocabulary has."""
    if not any(counts):
        return [()] * len(counts)
    values, tokens = logits.topk(min(max(counts), logits.shape[1]), dim=-1)
    logprobs = (values - totals[:, None]).clamp(min=LEAST_LOGPROB).tolist()
    return [
        tuple(zip(row_tokens[:count], row_logprobs[:count], strict=True))
        for row_tokens, row_logprobs, count in zip(tokens.tolist(), logprobs, counts, strict=True)
    ]


def _pick(logits: npt.NDArray[np.float32], draw: Draw) -> int:
    """Pick from logits of which the greatest is finite."""
    scaled, sampling = logits.astype(np.float64), draw.sampling
    if draw.adjustment is not None:
        draw.adjustment.apply(scaled)
    if sampling.temperature == 0:
        return int(scaled.argmax())
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the likeliest to minus infinity
        weights = np.exp((scaled - scaled.max()) / sampling.temperature)
    if 0 < sampling.top_k < len(weights):
        weights = np.where(_likeliest(weights, sampling.top_k), weights, 0.0)
    if sampling.top_p < 1.0:
        weights = np.where(_nucleus(weights, sampling.top_p), weights, 0.0)
    if sampling.min_p > 0.0:
        weights[weights < sampling.min_p] = 0.0  # the likeliest one has weight 1
    bounds = weights.cumsum()
    token = int(bounds.searchsorted(uniform(draw.seed, draw.position) * bounds[-1], side="right"))
    return min(token, int(weights.nonzero()[0][-1]))  # rounding may have made the last bound the draw itself


def _likeliest(weights: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.bool_]:
    """The ``count`` likeliest tokens; of equal ones the first."""
    keep = np.zeros(len(weights), dtype=np.bool_)
    keep[(-weights).argsort(kind="stable")[:count]] = True
    return keep


def _nucleus(weights: npt.NDArray[np.float64], top_p: float) -> npt.NDArray[np.bool_]:
    """The fewest likeliest tokens whose probabilities sum to at least ``top_p``."""
    order = (-weights).argsort(kind="stable")
    before = weights[order].cumsum() - weights[order]
    keep = np.zeros(len(weights), dtype=np.bool_)
    keep[order] = before < top_p * weights.sum()
    keep[order[0]] = True
    return keep

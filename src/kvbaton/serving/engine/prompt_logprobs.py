"""The logprobs of a prompt's own tokens: made of the logits of its chunks, handed over in pages of their own.

One record a token, which tells of the token that follows it::

    offset  0  logprob       f32   of the token that follows
            4  rank          u32   of that token; 1 is the likeliest
            8  alternatives  MAX_TOP_LOGPROBS of (logprob f32, token u32), likeliest first; unused ones are zero

So a chunk's records lie at its tokens, and travel with it. The last token of a prompt has none: what follows it is
drawn. All records of a prompt have a checksum, which the aux row carries.

This file must not know of pools, requests or peers.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvbaton.errors import InternalError, RemoteProtocolError
from kvbaton.serving.engine.request import MAX_TOP_LOGPROBS, PromptToken
from kvbaton.serving.engine.sampling import LEAST_LOGPROB

RECORD = np.dtype(
    [("logprob", "<f4"), ("rank", "<u4"), ("top", [("logprob", "<f4"), ("token", "<u4")], (MAX_TOP_LOGPROBS,))]
)
RECORD_BYTES = RECORD.itemsize
#: Rows of logits that are turned into float32 at once.
ROWS_AT_ONCE = 64

Records = npt.NDArray[np.void]


def no_records(count: int) -> Records:
    return np.zeros(count, RECORD)


def records_of(logits: Any, following: Sequence[int], alternatives: int) -> Records:
    """Of tokens behind which the model says ``logits`` [at least as many, vocabulary], and the prompt ``following``.

    Raises InternalError where a row is not finite.
    """
    records = no_records(len(following))
    for first in range(0, len(following), ROWS_AT_ONCE):
        part = slice(first, min(first + ROWS_AT_ONCE, len(following)))
        _fill(records[part], logits[part].float(), following[part], alternatives)
    return records


def _fill(records: Records, logits: Any, following: Sequence[int], alternatives: int) -> None:
    totals = logits.logsumexp(dim=-1, keepdim=True)
    if not bool(totals.isfinite().all()):
        raise InternalError("the model's logits within the prompt are not finite; try dtype float32")
    own = logits.gather(1, torch.tensor(following, device=logits.device)[:, None])
    records["logprob"] = (own - totals)[:, 0].clamp(min=LEAST_LOGPROB).cpu().numpy()
    records["rank"] = ((logits > own).sum(dim=-1) + 1).cpu().numpy()
    if alternatives:
        values, tokens = logits.topk(min(alternatives, logits.shape[1]), dim=-1)
        top = records["top"][:, : values.shape[1]]
        top["logprob"] = (values - totals).clamp(min=LEAST_LOGPROB).cpu().numpy()
        top["token"] = tokens.cpu().numpy()


def checksum(records: Records) -> int:
    return zlib.crc32(records.tobytes())


def check_records(records: Records, expected: int, vocabulary: int, room: int) -> None:
    """Raises RemoteProtocolError unless they are the records with this checksum, of such a vocabulary."""
    if checksum(records) != expected:
        raise RemoteProtocolError(
            "the logprobs of the prompt are damaged, or prefill was not asked for them; send both the same request",
            room=room,
        )
    if (records["rank"] > vocabulary).any() or (records["top"]["token"] >= vocabulary).any():
        raise RemoteProtocolError("the logprobs of the prompt name a token outside the vocabulary", room=room)


def prompt_tokens_of(records: Records, alternatives: int) -> tuple[PromptToken, ...]:
    """What is told of each token of a prompt but the first."""
    shown = min(alternatives, MAX_TOP_LOGPROBS)
    top = records["top"][:, :shown]
    rows = zip(
        records["logprob"].tolist(),
        records["rank"].tolist(),
        top["token"].tolist(),
        top["logprob"].tolist(),
        strict=True,
    )
    return tuple(
        PromptToken(logprob, rank, tuple(zip(tokens, logprobs, strict=True)))
        for logprob, rank, tokens, logprobs in rows
    )

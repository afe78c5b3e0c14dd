"""What a decode server has told of an answer, so that another pair can go on with it: the journal of a request.

The router adds ``kvbaton_journal`` to both legs of a request: what the answer is called, when it began, and the seed of
its random sequences, so that no attempt differs from another in these. A decode server that finds it puts a record in
front of each piece of its answer, an SSE comment (``:[...]``), and the router keeps the records of what it has passed
on, as they are. Where an attempt breaks off, the next one carries them: prefill computes the prompt and what was
answered, decode feeds the records to its formatter and to the answer's text, and tells what follows.

Rules: a record and the piece behind it are one event, so that no token is told twice or never. An answer that does not
stream has records without pieces, and comes whole behind the last of them. Once a prompt's choices have tokens of their
own each unfinished one goes on as a prompt by itself, with a room by itself. Clients never see or send any of it.

This file must not know HTTP, engines' threads or workers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import msgspec
from msgspec import Meta, Raw, Struct

from kvbaton.discovery.registry import MAX_RANKS
from kvbaton.serving.engine.request import Alternatives, Output, PromptToken, Sampling
from kvbaton.serving.engine.seed import SEED_MASK, seed_of_choice
from kvbaton.serving.server.raw import decoded, refuse

JOURNAL_FIELD = "kvbaton_journal"
#: Of an answer that does not stream, told as records: the whole of it is the data of the last event.
RECORDS_TYPE = "application/vnd.kvbaton.records"
#: Largest journal; an answer that has more of it cannot be continued.
MAX_JOURNAL_BYTES = 8 << 20
#: Seeds of routers are below this, those of engines are taken modulo 2^64.
_SEED_END = 1 << 63


class Record(Struct, frozen=True, array_like=True):
    """One output of one answer, without what only this attempt is about."""

    index: Annotated[int, Meta(ge=0)]
    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[Alternatives, ...] = ()
    finish_reason: str | None = None
    matched: int | str | None = None
    cached_tokens: int = 0
    prompt_logprobs: tuple[PromptToken, ...] | None = None

    @property
    def output(self) -> Output:
        return Output(**msgspec.structs.asdict(self))


class Notice(Struct, frozen=True, omit_defaults=True):
    """What else a decode server has to say to its router, one at a time.

    Args:
        status: what an ``error`` event behind it would have had, had it come before the first byte.
        leaving: the server is to stop: whoever asks its ranks at these control addresses gets the cache.
        departed: no more comes of the answer; the rest of the stream tells how handing it on has ended.
    """

    status: int = 0
    leaving: tuple[str, ...] = ()
    departed: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """What one engine request is about: a prompt with ``sampling.choices`` answers, of which ``number`` is the first's;
    or one answer that goes on, whose ``answered`` tokens are the last ones of ``tokens``."""

    number: int
    tokens: tuple[int, ...]
    sampling: Sampling
    answered: int = 0


class Journal(Struct, frozen=True, kw_only=True):
    """``id`` and ``created`` are the answer's; ``seed`` is of the first prompt if the client names none. ``sources``:
    the ranks that hand on what they have of it, instead of a prefill group."""

    id: Annotated[str, Meta(min_length=1, max_length=64, pattern="^[0-9a-zA-Z-]+$")]
    created: Annotated[int, Meta(ge=0)]
    seed: Annotated[int, Meta(ge=0, le=_SEED_END - 1)]
    sources: Annotated[tuple[str, ...], Meta(max_length=MAX_RANKS)] = ()
    records: tuple[Record, ...] = ()

    @classmethod
    def of(cls, raw: Raw) -> Journal | None:
        """The field's value. Raises ConfigError."""
        journal: Journal | None = decoded(raw, cls, JOURNAL_FIELD, MAX_JOURNAL_BYTES)
        return journal

    def parts(self, prompts: Sequence[tuple[int, ...]], samplings: Sequence[Sampling]) -> list[Part]:
        """What is still to be answered, of prompts with as many choices each. Raises ConfigError for records of no
        answer of this request."""
        answers: defaultdict[int, list[int]] = defaultdict(list)
        ended = set[int]()
        for record in self.records:
            answers[record.index] += record.tokens
            if record.finish_reason is not None:
                ended.add(record.index)
        choices = samplings[0].choices
        if answers and max(answers) >= len(prompts) * choices:
            refuse(JOURNAL_FIELD, f"answer {max(answers)} is none of {len(prompts) * choices}")
        parts = []
        for place, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
            seed = sampling.seed if sampling.seed is not None else seed_of_choice(self.seed, place)
            numbers = range(place * choices, (place + 1) * choices)
            if not any(number in answers for number in numbers):
                parts.append(Part(numbers.start, prompt, replace(sampling, seed=seed)))
                continue
            parts += [
                Part(
                    number,
                    (*prompt, *answers[number]),
                    replace(
                        sampling,
                        seed=seed_of_choice(seed & SEED_MASK, number - numbers.start),
                        choices=1,
                        prompt_logprobs=None,  # they are in the records
                    ),
                    len(answers[number]),
                )
                for number in numbers
                if number not in ended
            ]
        return parts


def fresh(prompts: Sequence[tuple[int, ...]], samplings: Sequence[Sampling]) -> list[Part]:
    """The parts of a request without a journal."""
    pairs = zip(prompts, samplings, strict=True)
    return [Part(place * sampling.choices, prompt, sampling) for place, (prompt, sampling) in enumerate(pairs)]


def record(output: Output) -> bytes:
    """The line in front of an output's piece."""
    found = Record(
        output.index,
        output.tokens,
        output.text,
        output.logprobs,
        output.top_logprobs,
        output.finish_reason,
        output.matched,
        output.cached_tokens,
        output.prompt_logprobs,
    )
    return b":" + msgspec.json.encode(found) + b"\n"


def notice(said: Notice) -> bytes:
    """The line of a notice."""
    return b":" + msgspec.json.encode(said) + b"\n"


def notice_of(record: bytes) -> Notice | None:
    """The notice that a line holds; None for a record of an output. Raises msgspec.MsgspecError."""
    return msgspec.json.decode(record, type=Notice) if record.startswith(b"{") else None


def encoded(head: Journal, records: Sequence[bytes]) -> Raw:
    """The field's value: a journal without records, and the records that were kept, as they came."""
    start = msgspec.json.encode(head)
    return Raw(start.removesuffix(b"[]}") + b"[" + b",".join(records) + b"]}")

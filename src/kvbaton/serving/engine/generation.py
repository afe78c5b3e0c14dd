"""An answer in the making: the state of one choice of a request from its first token to its last.

What another engine has answered already is pushed through text and adjustment without being told, so that stop strings,
unfinished characters and penalties do not see where it broke off.

This file must not know of peers, batches or queues.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvbaton.errors import RemoteProtocolError
from kvbaton.serving.engine.adjustment import adjustment_of
from kvbaton.serving.engine.job import Job
from kvbaton.serving.engine.model import LoadedModel
from kvbaton.serving.engine.pool import BlockTable
from kvbaton.serving.engine.request import Handoff, Output, PromptToken
from kvbaton.serving.engine.runner import Step
from kvbaton.serving.engine.sampling import Draw, Pick
from kvbaton.serving.engine.seed import seed_of_choice
from kvbaton.serving.engine.text import TextStream


@dataclass(frozen=True, kw_only=True, slots=True)
class Opening:
    """What is told once of a request, with its first output."""

    handoff: Handoff | None = None
    cached_tokens: int = 0
    prompt_logprobs: tuple[PromptToken, ...] | None = None


class Generation:
    """``block_table`` has everything but the newest token, which the next step computes. ``seed`` is the one in use,
    ``index`` the choice's number."""

    def __init__(self, job: Job, model: LoadedModel, block_table: BlockTable, seed: int, index: int = 0) -> None:
        request, sampling = job.request, job.request.sampling
        self.job = job
        self.block_table = block_table
        self._index = index
        self._seed = seed_of_choice(seed, index)
        self._tokens = list(request.prompt_tokens)
        self._newest = -1
        self._position = len(request.prompt_tokens) - 1
        ends = model.ends_of(sampling)
        self._adjustment = adjustment_of(request, ends)
        self._text = TextStream(
            model.tokenizer,
            request.asked_tokens,
            stops=sampling.stop,
            ends=ends,
            max_tokens=sampling.max_tokens,
            min_tokens=sampling.min_tokens,
            include_stop=sampling.include_stop,
            skip_special_tokens=sampling.skip_special_tokens,
        )
        for token in request.answered_tokens:
            if self._text.push(token).finish_reason is not None:
                raise RemoteProtocolError("the answer that is to go on has ended already", room=request.room)

    def draw(self) -> Draw:
        """How the next token is to be picked."""
        return Draw(self.job.request.sampling, self._seed, self._position + 1, self._adjustment)

    def step(self) -> Step:
        """What the model must compute before the next token can be picked."""
        return Step(self._newest, self._position, self.block_table)

    @property
    def index(self) -> int:
        """The choice's number."""
        return self._index

    @property
    def seed(self) -> int:
        """The choice's own."""
        return self._seed

    @property
    def tokens(self) -> Sequence[int]:
        """Prompt and answer so far."""
        return self._tokens

    @property
    def cached_tokens(self) -> Sequence[int]:
        """The tokens that ``block_table`` has: all but the newest."""
        return self._tokens[: self._position]

    def push(self, pick: Pick, opening: Opening | None = None) -> Output:
        """Take the next token. Returns what to tell the caller. Raises InternalError (no text for this token)."""
        self._newest = pick.token
        self._tokens.append(pick.token)
        self._position += 1
        if self._adjustment is not None:
            self._adjustment.push(pick.token)
        piece = self._text.push(pick.token)
        sampling, opening = self.job.request.sampling, opening or _NOTHING
        return Output(
            index=self._index,
            tokens=(pick.token,),
            text=piece.text,
            logprobs=(pick.logprob,) if sampling.logprobs else (),
            top_logprobs=(pick.top,) if sampling.top_logprobs else (),
            finish_reason=piece.finish_reason,
            handoff=opening.handoff,
            matched=piece.matched,
            cached_tokens=opening.cached_tokens,
            prompt_logprobs=opening.prompt_logprobs,
        )

    def __repr__(self) -> str:
        return f"Generation({self.job!r} choice {self._index} at position {self._position})"


_NOTHING = Opening()


def generations(job: Job, model: LoadedModel, block_tables: Sequence[BlockTable], seed: int) -> list[Generation]:
    """One for each choice of a request.

    Raises InternalError (no text for the prompt's last tokens), RemoteProtocolError (nothing is left to answer).
    """
    return [Generation(job, model, block_table, seed, index) for index, block_table in enumerate(block_tables)]

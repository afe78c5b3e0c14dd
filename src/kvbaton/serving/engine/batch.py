"""The continuous batch: answers that grow by one token per step, together.

Rules: requests join and leave between steps. A request's failure is its own: when a step of the whole batch fails,
every answer is run by itself, and only the requests of those that fail again are ended, with all of their answers.
Pages go back before the caller hears the last word, so that who waits for it finds them free.

This file must not know of peers or prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kvbaton.errors import AbortedError, ConfigError, InternalError, KVBatonError
from kvbaton.serving.engine.generation import Generation, Opening
from kvbaton.serving.engine.job import Job
from kvbaton.serving.engine.request import Output
from kvbaton.serving.engine.runner import ModelRunner
from kvbaton.serving.engine.sampling import Pick, pick_tokens


class ContinuousBatch:
    """At most ``max_batch`` answers grow at once; the others wait in order. ``release`` takes back what one held."""

    def __init__(self, runner: ModelRunner, release: Callable[[Generation], None], max_batch: int) -> None:
        if max_batch < 1:
            raise ConfigError(f"max_batch={max_batch} must be at least 1")
        self._runner = runner
        self._release = release
        self._max_batch = max_batch
        self._members: list[Generation] = []
        self._leaving: dict[Generation, Callable[[Generation, Pick], None]] = {}

    def __len__(self) -> int:
        return len(self._members)

    @property
    def running(self) -> int:
        return min(len(self._members), self._max_batch)

    def join(
        self,
        choices: Sequence[Generation],
        firsts: Sequence[Pick],
        opening: Opening,
    ) -> None:
        """Add a request's answers with their first tokens; each stays only if that is not its last one, too.

        ``opening`` is told with the first of them.
        """
        self._members += choices
        for generation, first in zip(choices, firsts, strict=True):
            self._push(generation, first, opening if generation is choices[0] else None)

    def choices_of(self, job: Job) -> list[Generation]:
        """Those that have not ended."""
        return [member for member in self._members if member.job is job]

    def depart(self, generation: Generation, left: Callable[[Generation, Pick], None]) -> None:
        """Take an answer out behind its next step: ``left`` gets the token that nobody has been told of; the pages,
        which then have everything before it, are the caller's."""
        self._leaving[generation] = left
        self._members.remove(generation)
        self._members.insert(0, generation)

    def drop(self, generation: Generation) -> None:
        """Take an answer out and give its pages back, without a word."""
        self._leaving.pop(generation, None)
        self._members.remove(generation)
        self._release(generation)

    def remove(self, job: Job, error: KVBatonError) -> bool:
        """Take ``job`` out, give its pages back and tell its caller. False if it is not here."""
        return self._end(job, Output(error=error))

    def step(self) -> bool:
        """One token for each running answer. False if there is none."""
        batch = self._members[: self._max_batch]
        if not batch:
            return False
        for generation, picked in zip(batch, self._pick(batch), strict=True):
            if isinstance(picked, Pick) and generation in self._leaving:
                self._members.remove(generation)
                self._leaving.pop(generation)(generation, picked)
            elif isinstance(picked, Pick):
                self._push(generation, picked)
            else:
                self._end(generation.job, Output(error=picked))
        return True

    def _pick(self, batch: Sequence[Generation]) -> list[Pick | InternalError]:
        try:
            return pick_tokens(self._logits(batch), [generation.draw() for generation in batch])
        except InternalError as error:
            if len(batch) == 1:
                return [error]
        return [picked for generation in batch for picked in self._pick([generation])]

    def _logits(self, batch: Sequence[Generation]) -> Any:
        return self._runner.decode([generation.step() for generation in batch])

    def _push(self, generation: Generation, pick: Pick, opening: Opening | None = None) -> None:
        if generation.job.done:  # another of its answers has ended it meanwhile
            return
        try:
            output = generation.push(pick, opening)
        except KVBatonError as error:
            self._end(generation.job, Output(error=error))
            return
        if output.ends_choice:
            self._members.remove(generation)
            self._release(generation)
        generation.job.emit(output)
        if generation.job.deserted:
            self.remove(generation.job, AbortedError("nobody listens any more"))

    def _end(self, job: Job, last: Output) -> bool:
        """End every answer of ``job``. False if it has none here."""
        choices = self.choices_of(job)
        for generation in choices:
            self.drop(generation)
        if choices:
            job.emit(last)
        return bool(choices)

    def __repr__(self) -> str:
        return f"ContinuousBatch({self.running} running of {len(self)})"

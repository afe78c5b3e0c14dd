"""Prefill and decode in one process (mode ``null``): the reference that a pair of processes must equal.

A round is a chunk of the oldest prompts, then one step of the batch, so that neither starves the other. The tokens of a
chunk are those of one long prompt or of several short ones; prompts of which it has the same tokens are computed in one
pass, which costs less than one after the other.

This file must not know of peers.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kvbaton.errors import KVBatonError
from kvbaton.serving.engine.batch import ContinuousBatch
from kvbaton.serving.engine.generation import Generation, Opening, generations
from kvbaton.serving.engine.job import Job
from kvbaton.serving.engine.limits import Limits, limits_of
from kvbaton.serving.engine.model import LoadedModel
from kvbaton.serving.engine.pool import Pools
from kvbaton.serving.engine.prompt import PromptRun, advance_together
from kvbaton.serving.engine.request import Output
from kvbaton.serving.engine.runner import ModelRunner
from kvbaton.serving.engine.sampling import first_tokens
from kvbaton.serving.engine.scheduler import Role, Scheduler, SchedulerConfig
from kvbaton.serving.engine.seed import seed_of
from kvbaton.serving.engine.sequence_group import SequenceGroup, allocate_group
from kvbaton.serving.engine.stats import Stats


@dataclass(frozen=True, slots=True, eq=False)
class _Prompt:
    job: Job
    run: PromptRun
    sequences: SequenceGroup


class Unified(Role):
    """Queues: ``waiting`` for pages, prompts in ``prefill``, the batch."""

    def __init__(
        self, model: LoadedModel, pools: Pools, runner: ModelRunner, limits: Limits, config: SchedulerConfig
    ) -> None:
        self._model = model
        self._pools = pools
        self._limits = limits
        self._chunk_tokens = config.chunked_prefill_size
        self._runner = runner
        self._waiting: deque[Job] = deque()
        self._prompts: list[_Prompt] = []
        self._sequences: dict[Job, SequenceGroup] = {}
        self._batch = ContinuousBatch(self._runner, self._release, config.max_batch)

    def add(self, job: Job) -> None:
        self._waiting.append(job)

    def end(self, job: Job, error: KVBatonError) -> None:
        prompt = next((prompt for prompt in self._prompts if prompt.job is job), None)
        if job in self._waiting:
            self._waiting.remove(job)
            job.fail(error)
        elif prompt is not None:
            self._drop_prompt(prompt, Output(error=error))
        else:
            self._batch.remove(job, error)

    def step(self) -> bool:
        chunks = self._next_chunks()
        for (chunk, _), prompts in chunks.items():
            self._compute(prompts, chunk)
        return self._batch.step() or bool(chunks)

    def _next_chunks(self) -> dict[tuple[range, bool], list[_Prompt]]:
        """What this round computes of prompts: a chunk of the oldest, and of those after it that fit beside it; by what
        those of one pass have in common."""
        chunks: dict[tuple[range, bool], list[_Prompt]] = {}
        tokens = 0
        for prompt in self._oldest_first():
            chunk = prompt.run.chunk(self._chunk_tokens, self._pools.page_size)
            tokens += len(chunk)
            if chunks and tokens > self._chunk_tokens:
                break
            chunks.setdefault((chunk, prompt.run.every), []).append(prompt)
        return chunks

    def _oldest_first(self) -> Iterator[_Prompt]:
        """Prompts that have pages; then requests, each admitted when it is asked for."""
        yield from self._prompts
        while (prompt := self._admit()) is not None:
            yield prompt

    def _admit(self) -> _Prompt | None:
        """The oldest request, once there are pages for all that it may ever cache."""
        if not self._waiting:
            return None
        job = self._waiting[0]
        prompt, tokens = job.request.prompt_tokens, self._limits.cached_tokens(job.request)
        sampling = job.request.sampling
        sequences = allocate_group(self._pools, len(prompt), tokens, sampling.choices)
        if sequences is None:
            return None
        self._waiting.popleft()
        job.take_up()
        self._prompts.append(_Prompt(job, PromptRun(prompt, sequences.first, sampling.prompt_logprobs), sequences))
        return self._prompts[-1]

    def _compute(self, prompts: Sequence[_Prompt], chunk: range) -> None:
        """The same tokens of several prompts. Where that fails each is computed by itself, and those that fail end."""
        try:
            logits = advance_together([prompt.run for prompt in prompts], self._runner, chunk)
        except KVBatonError as error:
            if len(prompts) == 1:
                self._drop_prompt(prompts[0], Output(error=error))
                return
            for prompt in prompts:
                self._compute([prompt], chunk)
            return
        for prompt, last in zip(prompts, logits, strict=True):
            if prompt.run.finished:
                self._begin_answers(prompt, last)

    def _begin_answers(self, prompt: _Prompt, logits: Any) -> None:
        try:
            self._runner.copy(prompt.sequences.copies(self._pools, prompt.run.computed))
            choices = generations(prompt.job, self._model, prompt.sequences.block_tables, seed_of(prompt.job.request))
            firsts = first_tokens(logits, [choice.draw() for choice in choices])
        except KVBatonError as error:
            self._drop_prompt(prompt, Output(error=error))
            return
        self._prompts.remove(prompt)
        self._sequences[prompt.job] = prompt.sequences
        self._batch.join(choices, firsts, Opening(prompt_logprobs=prompt.run.prompt_logprobs()))

    def _drop_prompt(self, prompt: _Prompt, last: Output) -> None:
        self._prompts.remove(prompt)
        prompt.sequences.free(self._pools)
        prompt.job.emit(last)

    def _release(self, generation: Generation) -> None:
        sequences = self._sequences[generation.job]
        sequences.end(self._pools, generation.block_table)
        if not sequences.open:
            del self._sequences[generation.job]

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._prompts or len(self._batch))

    def stats(self) -> Stats:
        return Stats(
            pages_free=self._pools.pages_free,
            pages_used=self._pools.pages_used,
            pages_leased=0,
            slots_used=self._pools.slots.used,
            running=self._batch.running,
            queues={
                "waiting": len(self._waiting),
                "prefill": len(self._prompts),
                "ready": len(self._batch) - self._batch.running,
            },
        )


def unified_scheduler(
    model: LoadedModel, pools: Pools, config: SchedulerConfig | None = None, *, runner: ModelRunner | None = None
) -> Scheduler:
    """A scheduler that answers by itself. Start it, or use it as a context manager. ``runner``: a group leader's."""
    config = config or SchedulerConfig()
    limits = limits_of(model, pools)
    role = Unified(model, pools, runner or ModelRunner(model, pools), limits, config)
    return Scheduler(role, limits, config, wakeup=threading.Event(), name="unified")

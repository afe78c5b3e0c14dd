"""Prefill and decode in one process (mode ``null``): the reference that a pair of processes must equal.

A round is one chunk of the oldest prompt, then one step of the batch, so that neither starves the other.
This file must not know of peers.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

from kvbaton.errors import KVBatonError
from kvbaton.serving.engine.batch import ContinuousBatch
from kvbaton.serving.engine.generation import Generation, Opening, generations
from kvbaton.serving.engine.job import Job
from kvbaton.serving.engine.limits import Limits, limits_of
from kvbaton.serving.engine.model import LoadedModel
from kvbaton.serving.engine.pool import Pools
from kvbaton.serving.engine.prompt import PromptRun
from kvbaton.serving.engine.request import Output
from kvbaton.serving.engine.runner import ModelRunner
from kvbaton.serving.engine.sampling import first_tokens, seed_of
from kvbaton.serving.engine.scheduler import Role, Scheduler, SchedulerConfig, Stats
from kvbaton.serving.engine.sequence_group import SequenceGroup, allocate_group


@dataclass(frozen=True, slots=True)
class _Prompt:
    job: Job
    run: PromptRun
    sequences: SequenceGroup


class Unified(Role):
    """Queues: ``waiting`` for pages, one prompt in ``prefill``, the batch."""

    def __init__(
        self, model: LoadedModel, pools: Pools, runner: ModelRunner, limits: Limits, config: SchedulerConfig
    ) -> None:
        self._model = model
        self._pools = pools
        self._limits = limits
        self._chunk_tokens = config.chunked_prefill_size
        self._runner = runner
        self._waiting: deque[Job] = deque()
        self._prompt: _Prompt | None = None
        self._sequences: dict[Job, SequenceGroup] = {}
        self._batch = ContinuousBatch(self._runner, self._release, config.max_batch)

    def add(self, job: Job) -> None:
        self._waiting.append(job)

    def end(self, job: Job, error: KVBatonError) -> None:
        if job in self._waiting:
            self._waiting.remove(job)
            job.fail(error)
        elif self._prompt is not None and self._prompt.job is job:
            self._drop_prompt(self._prompt, Output(error=error))
        else:
            self._batch.remove(job, error)

    def step(self) -> bool:
        if self._prompt is None:
            self._prompt = self._admit()
        worked = self._prompt is not None
        if self._prompt is not None:
            self._compute(self._prompt)
        return self._batch.step() or worked

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
        return _Prompt(job, PromptRun(prompt, sequences.first, sampling.prompt_logprobs), sequences)

    def _compute(self, prompt: _Prompt) -> None:
        try:
            logits = prompt.run.advance(self._runner, self._chunk_tokens, self._pools.page_size)
            if not prompt.run.finished:
                return
            self._runner.copy(prompt.sequences.copies(self._pools, prompt.run.computed))
            choices = generations(prompt.job, self._model, prompt.sequences.block_tables, seed_of(prompt.job.request))
            firsts = first_tokens(logits, [choice.draw() for choice in choices])
        except KVBatonError as error:
            self._drop_prompt(prompt, Output(error=error))
            return
        self._prompt = None
        self._sequences[prompt.job] = prompt.sequences
        self._batch.join(choices, firsts, Opening(prompt_logprobs=prompt.run.prompt_logprobs()))

    def _drop_prompt(self, prompt: _Prompt, last: Output) -> None:
        self._prompt = None
        prompt.sequences.free(self._pools)
        prompt.job.emit(last)

    def _release(self, generation: Generation) -> None:
        sequences = self._sequences[generation.job]
        sequences.end(self._pools, generation.block_table)
        if not sequences.open:
            del self._sequences[generation.job]

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._prompt or len(self._batch))

    def stats(self) -> Stats:
        return Stats(
            pages_free=self._pools.pages_free,
            pages_used=self._pools.pages_used,
            pages_leased=0,
            slots_used=self._pools.slots.used,
            running=self._batch.running,
            queues={
                "waiting": len(self._waiting),
                "prefill": int(self._prompt is not None),
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

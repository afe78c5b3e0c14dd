"""The embedded engine against transformers' own ``generate``, in one process, taking turns.

Both run the same weights on the same threads and answer the same prompts, given as token ids, greedily and to the same
length; the model is a random 12-layer Qwen3 of 768 wide in float32. Either computes on a thread that ends with its
round: threads that OpenMP keeps for another one would slow it down (:mod:`kvbaton.serving.engine.threads`). Medians of
wall and of processor time are compared: on a shared machine the second is the steadier one. What picking costs is timed
beside the steps that it follows: all of :func:`pick_tokens` for a plain greedy batch, over an argmax alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch

from kvbaton.serving.engine.model import LoadedModel, load_model
from kvbaton.serving.engine.pool import Pools
from kvbaton.serving.engine.request import Sampling
from kvbaton.serving.engine.runner import ModelRunner, Step
from kvbaton.serving.engine.sampling import Draw, pick_tokens
from kvbaton.serving.engine.threads import aside
from lab.rounds import Prompts, Round, Scenario, answer, pools_of, prompts_of, timed, write_model

#: Steps of a batch that picking is timed beside.
STEPS = 15


@dataclass(slots=True)
class Result:
    """``equal`` answers of ``answers``, over all rounds. ``picking``: what picking adds to an argmax, over the
    processor time of a step."""

    scenario: Scenario
    engine: list[Round] = field(default_factory=list)
    generate: list[Round] = field(default_factory=list)
    equal: int = 0
    answers: int = 0
    picking: float = 0.0

    def tokens_per_second(self, rounds: Sequence[Round]) -> float:
        return self.scenario.tokens_per_second(median(one.wall for one in rounds))

    @property
    def wall_ratio(self) -> float:
        """Of tokens per second: above 1 the engine is the faster one."""
        return median(one.wall for one in self.generate) / median(one.wall for one in self.engine)

    @property
    def processor_ratio(self) -> float:
        return median(one.processor for one in self.generate) / median(one.processor for one in self.engine)


class Throughput:
    """The model, made in ``directory`` where it is not there yet, and both contestants over it."""

    def __init__(self, directory: Path, threads: int) -> None:
        write_model(directory)
        self._model = load_model(str(directory), threads=threads)

    def measure(self, scenario: Scenario, rounds: int) -> Result:
        """``rounds`` of each contestant in turn, after a short one that warms up. Raises InternalError."""
        result = Result(scenario)
        pools = pools_of(self._model)
        warm_up = prompts_of(Scenario(scenario.prompts, 16, 2), seed=-1)
        answer(self._model, pools, warm_up, 2)
        aside(partial(generate, self._model, warm_up, 2))
        for number in range(rounds):
            prompts = prompts_of(scenario, number)
            ours, one = timed(partial(answer, self._model, pools, prompts, scenario.answer_tokens))
            theirs, other = timed(partial(aside, partial(generate, self._model, prompts, scenario.answer_tokens)))
            result.engine.append(one)
            result.generate.append(other)
            result.equal += sum(a == b for a, b in zip(ours, theirs, strict=True))
            result.answers += len(prompts)
        result.picking = aside(partial(_picking, self._model, pools, scenario))
        return result


def generate(model: LoadedModel, prompts: Prompts, count: int) -> list[list[int]]:
    """What transformers' own ``generate`` says to prompts of one length: ``count`` tokens each, greedily."""
    with torch.inference_mode():
        tokens = torch.tensor(prompts)
        whole: Any = model.network.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
        )
    answers: list[list[int]] = whole[:, tokens.shape[1] :].tolist()
    return answers


def _picking(model: LoadedModel, pools: Pools, scenario: Scenario) -> float:
    """What :class:`Result` says of it."""
    runner, length = ModelRunner(model, pools), scenario.prompt_tokens
    tables = [table for _ in range(scenario.prompts) if (table := pools.allocate(length + 1)) is not None]
    draw = Draw(Sampling(temperature=0.0), 1, length + 1)
    seconds: list[tuple[float, float, float]] = []
    for _ in range(STEPS):
        times = [process_time()]
        logits = runner.decode([Step(4, length, table) for table in tables])
        times.append(process_time())
        pick_tokens(logits, [draw] * len(tables))
        times.append(process_time())
        logits.argmax(dim=-1).tolist()
        times.append(process_time())
        seconds.append((times[1] - times[0], times[2] - times[1], times[3] - times[2]))
    for table in tables:
        pools.free(table)
    step, pick, argmax = (float(median(column)) for column in zip(*seconds, strict=True))
    return (pick - argmax) / step

"""The embedded engine against transformers' own ``generate``, in one process, taking turns.

Both run the same weights on the same threads and answer the same prompts, given as token ids, greedily and to the same
length; the model is a random 12-layer Qwen3 of 768 wide in float32. Medians of wall and of processor time are compared:
on a shared machine the second is the steadier one. What picking costs is timed beside the steps that it follows: all
of :func:`pick_tokens` for a plain greedy batch, over an argmax alone.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3Config
from transformers.utils import logging

from kvbaton.errors import InternalError
from kvbaton.serving.engine.memory import PoolConfig
from kvbaton.serving.engine.model import LoadedModel, load_model
from kvbaton.serving.engine.pool import Pools
from kvbaton.serving.engine.request import Output, Request, Sampling
from kvbaton.serving.engine.runner import ModelRunner, Step
from kvbaton.serving.engine.sampling import Draw, pick_tokens
from kvbaton.serving.engine.unified import unified_scheduler

VOCABULARY = 32_000
SEED = 7
PATIENCE_SECONDS = 600.0
#: Steps of a batch that picking is timed beside.
STEPS = 15
Prompts = Sequence[tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Scenario:
    """``prompts`` of ``prompt_tokens`` each, all at once; each is answered with ``answer_tokens``."""

    prompts: int
    prompt_tokens: int
    answer_tokens: int

    def __str__(self) -> str:
        return f"{self.prompts} x {self.prompt_tokens:,} + {self.answer_tokens}"


SUITE = (Scenario(8, 256, 64), Scenario(1, 1024, 32), Scenario(16, 64, 64))


@dataclass(frozen=True, slots=True)
class Round:
    """Of one contestant, in seconds."""

    wall: float
    processor: float


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
        return self.scenario.prompts * self.scenario.answer_tokens / median(one.wall for one in rounds)

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
        if not (directory / "config.json").is_file():
            _write_model(directory)
        self._model = load_model(str(directory), threads=threads)

    def measure(self, scenario: Scenario, rounds: int) -> Result:
        """``rounds`` of each contestant in turn, after a short one that warms up. Raises InternalError."""
        result = Result(scenario)
        pools = Pools(self._model.geometry, PoolConfig(pages=1024), model=self._model.fingerprint)
        warm_up = _prompts(Scenario(scenario.prompts, 16, 2), seed=-1)
        _answer(self._model, pools, warm_up, 2)
        _generate(self._model, warm_up, 2)
        for number in range(rounds):
            prompts = _prompts(scenario, number)
            ours, one = _timed(partial(_answer, self._model, pools, prompts, scenario.answer_tokens))
            theirs, other = _timed(partial(_generate, self._model, prompts, scenario.answer_tokens))
            result.engine.append(one)
            result.generate.append(other)
            result.equal += sum(a == b for a, b in zip(ours, theirs, strict=True))
            result.answers += len(prompts)
        result.picking = _picking(self._model, pools, scenario)
        return result


def _write_model(directory: Path) -> None:
    logging.disable_progress_bar()
    torch.manual_seed(SEED)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=4096,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=3,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)


def _prompts(scenario: Scenario, seed: int) -> Prompts:
    source = random.Random(seed)
    return [
        tuple(source.randrange(4, VOCABULARY) for _ in range(scenario.prompt_tokens)) for _ in range(scenario.prompts)
    ]


def _timed(run: Callable[[], list[list[int]]]) -> tuple[list[list[int]], Round]:
    wall, processor = perf_counter(), process_time()
    answers = run()
    return answers, Round(perf_counter() - wall, process_time() - processor)


def _answer(model: LoadedModel, pools: Pools, prompts: Prompts, count: int) -> list[list[int]]:
    """The engine's answers, in the order of the prompts."""
    answers: list[list[int]] = [[] for _ in prompts]
    failures: list[Exception] = []
    ended = threading.Semaphore(0)

    def collect(number: int, output: Output) -> None:
        answers[number] += output.tokens
        if output.error is not None:
            failures.append(output.error)
        if output.final:
            ended.release()

    sampling = Sampling(max_tokens=count, temperature=0.0, ignore_eos=True)
    with unified_scheduler(model, pools) as engine:
        for number, prompt in enumerate(prompts):
            request = Request(request_id=str(number), prompt_tokens=prompt, sampling=sampling)
            engine.submit(request, partial(collect, number))
        for _ in prompts:
            if not ended.acquire(timeout=PATIENCE_SECONDS):
                raise InternalError(f"no answer within {PATIENCE_SECONDS:.0f} s")
    if failures:
        raise InternalError(f"an answer failed: {failures[0]}")
    return answers


def _generate(model: LoadedModel, prompts: Prompts, count: int) -> list[list[int]]:
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

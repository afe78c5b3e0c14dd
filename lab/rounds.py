"""Rounds of the embedded engine: what is asked of it, and how long it takes; beside others, or as a process by itself.

``python -m lab.rounds MODEL THREADS``: a line on stdin asks for a round (a Scenario and a seed, JSON), a line on stdout
answers it. It needs nothing of kvbaton that has not been there from the first engine on, so that another revision of
kvbaton in ``PYTHONPATH`` is what it times.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter, process_time

import msgspec
import torch
from transformers import AutoModelForCausalLM, Qwen3Config
from transformers.utils import logging

from kvbaton.errors import InternalError
from kvbaton.serving.engine.memory import PoolConfig
from kvbaton.serving.engine.model import LoadedModel, load_model
from kvbaton.serving.engine.pool import Pools
from kvbaton.serving.engine.request import Output, Request, Sampling
from kvbaton.serving.engine.unified import unified_scheduler

VOCABULARY = 32_000
SEED = 7
PAGES = 1024
PATIENCE_SECONDS = 600.0
Prompts = Sequence[tuple[int, ...]]


class Scenario(msgspec.Struct, frozen=True):
    """``prompts`` of ``prompt_tokens`` each, all at once; each is answered with ``answer_tokens``."""

    prompts: int
    prompt_tokens: int
    answer_tokens: int

    def __str__(self) -> str:
        return f"{self.prompts} x {self.prompt_tokens:,} + {self.answer_tokens}"

    def tokens_per_second(self, seconds: float) -> float:
        return self.prompts * self.answer_tokens / seconds


class Round(msgspec.Struct, frozen=True):
    """Of one contestant, in seconds."""

    wall: float
    processor: float


class Order(msgspec.Struct, frozen=True):
    scenario: Scenario
    seed: int


class Played(msgspec.Struct, frozen=True):
    round: Round
    answers: list[list[int]]


SUITE = (Scenario(8, 256, 64), Scenario(1, 1024, 32), Scenario(16, 64, 64))


def pools_of(model: LoadedModel) -> Pools:
    return Pools(model.geometry, PoolConfig(pages=PAGES), model=model.fingerprint)


def main(directory: str, threads: int) -> None:
    model = load_model(directory, threads=threads)
    pools = pools_of(model)
    for line in sys.stdin:
        order = msgspec.json.decode(line, type=Order)
        prompts = prompts_of(order.scenario, order.seed)
        answers, taken = timed(partial(answer, model, pools, prompts, order.scenario.answer_tokens))
        print(msgspec.json.encode(Played(taken, answers)).decode(), flush=True)


def write_model(directory: Path) -> None:
    """A random 12-layer Qwen3 of 768 wide, unless it is there."""
    if (directory / "config.json").is_file():
        return
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


def prompts_of(scenario: Scenario, seed: int) -> Prompts:
    source = random.Random(seed)
    return [
        tuple(source.randrange(4, VOCABULARY) for _ in range(scenario.prompt_tokens)) for _ in range(scenario.prompts)
    ]


def timed(run: Callable[[], list[list[int]]]) -> tuple[list[list[int]], Round]:
    wall, processor = perf_counter(), process_time()
    answers = run()
    return answers, Round(perf_counter() - wall, process_time() - processor)


def answer(model: LoadedModel, pools: Pools, prompts: Prompts, count: int) -> list[list[int]]:
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


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

"""What the engine tests share: tiny models, prompts, and a caller that collects its answer."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvbaton.serving.engine.memory import PoolConfig
from kvbaton.serving.engine.model import LoadedModel, load_model
from kvbaton.serving.engine.pool import Pools
from kvbaton.serving.engine.request import Output, Request, Sampling
from kvbaton.serving.engine.scheduler import Scheduler
from lab.conformance.families import make_config, write_weights

PATIENCE_SECONDS = 30
EOS = 256
VOCABULARY = 300
MAX_POSITIONS = 512


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, so that a character may take several; token 256 ends an answer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", clean_up_tokenization_spaces=False)


def write_model(family: str, directory: Path) -> Path:
    """A random model whose logits are far enough apart for greedy tokens to be compared."""
    config = make_config(family, vocab_size=VOCABULARY, max_positions=MAX_POSITIONS, eos=EOS)
    byte_tokenizer().save_pretrained(directory)
    return write_weights(config, directory)


class LoadedModels:
    """Models by family, each loaded when it is first asked for."""

    def __init__(self, directories: dict[str, Path]) -> None:
        self._directories = directories
        self._loaded: dict[str, LoadedModel] = {}

    def __getitem__(self, family: str) -> LoadedModel:
        if family not in self._loaded:
            self._loaded[family] = load_model(str(self._directories[family]), threads=1)
        return self._loaded[family]


def poison(pools: Pools) -> None:
    """Make whatever nobody has written yet unfit to be read."""
    memories = [*pools.paged.values(), *([pools.states] if pools.states is not None else [])]
    for memory in memories:
        for tensor in memory.tensors.values():
            tensor.fill_(float("nan"))


def make_pools(model: LoadedModel, **sizes: object) -> Pools:
    return Pools(model.geometry, PoolConfig(**{"pages": 256, **sizes}), model=model.fingerprint)


def make_prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    source = random.Random(length * 1000 + seed)
    return tuple(source.randrange(256) for _ in range(length))


def generate(model: LoadedModel, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The reference: greedy tokens of the same model in transformers' own loop."""
    with torch.inference_mode():
        answer = model.network.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
        )
    return tuple(answer[0, len(prompt) :].tolist())


def greedy(prompt: tuple[int, ...], count: int, request_id: str = "greedy", **fields: object) -> Request:
    sampling = Sampling(max_tokens=count, temperature=0.0, ignore_eos=True)
    return Request(request_id=request_id, prompt_tokens=prompt, sampling=sampling, **fields)  # type: ignore[arg-type]


@dataclass
class Caller:
    """Collects the outputs of one request; ``ended`` is set by the last."""

    outputs: list[Output] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    first: threading.Event = field(default_factory=threading.Event)
    departing: threading.Event = field(default_factory=threading.Event)

    def __call__(self, output: Output) -> None:
        assert not self.ended.is_set(), "an output came after the last one"
        self.outputs.append(output)
        self.first.set()
        if output.departing:
            self.departing.set()
        if output.final:
            self.ended.set()

    def wait(self) -> Caller:
        assert self.ended.wait(PATIENCE_SECONDS), f"no end after {PATIENCE_SECONDS} s: {self.outputs[-3:]}"
        return self

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(token for output in self.outputs for token in output.tokens)

    @property
    def text(self) -> str:
        return "".join(output.text for output in self.outputs)

    @property
    def logprobs(self) -> tuple[float, ...]:
        return tuple(value for output in self.outputs for value in output.logprobs)

    def choice(self, index: int) -> tuple[Output, ...]:
        """The outputs of one answer."""
        return tuple(output for output in self.outputs if output.index == index)

    def answers(self) -> list[tuple[int, ...]]:
        """The tokens of each answer, in order."""
        count = max((output.index for output in self.outputs), default=-1) + 1
        return [tuple(token for output in self.choice(i) for token in output.tokens) for i in range(count)]

    @property
    def last(self) -> Output:
        return self.outputs[-1]


def call(scheduler: Scheduler, request: Request) -> Caller:
    caller = Caller()
    scheduler.submit(request, caller)
    return caller

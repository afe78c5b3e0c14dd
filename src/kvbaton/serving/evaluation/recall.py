"""In-context recall: a task that a model can answer only from an intact KV cache.

A prompt lists random pairs and ends by asking for one of them::

    k2=Z9QX; a7=3MB0;q0=77RT;
    d5=K1W4;?a7=            ->  3MB0

Rules:

* Every key (lower-case letter, digit) occurs once among the pairs and once in the question. Every value is
  ``ANSWER_LENGTH`` random characters. No weight can hold the answer: it is only in the cache, at ``pair_span``.
* The model's next ``ANSWER_LENGTH`` greedy tokens are the answer, with one token per character.
* Pairs are separated by ``;``, ``;`` and a space, or ``;`` and a newline, at random, so that prompts of one pair
  count end at every offset within a cache block.
* The same arguments give the same prompts on every machine.

This module uses the standard library only. It must not know of models, tokenizers or transports.
"""

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass

ANSWER_LENGTH = 4
"""Characters, and so tokens of a character-level tokenizer, in every answer."""

FULL_LENGTH_PAIRS = (38, 64)
"""Fewest and most pairs of a full-length prompt: about 320 to 570 characters."""

KEYS = tuple(letter + digit for letter in string.ascii_lowercase for digit in string.digits)
VALUE_CHARACTERS = string.ascii_uppercase + string.digits
SEPARATORS = (";", "; ", ";\n")


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallPrompt:
    """One question and the only right answer to it."""

    prompt: str
    answer: str

    @property
    def key(self) -> str:
        """The key that the prompt asks for."""
        return self.prompt.rpartition("?")[2].removesuffix("=")

    @property
    def pair_span(self) -> tuple[int, int]:
        """Where the asked pair lies: its first character and the one after its last, counted from 0."""
        start = self.prompt.index(f"{self.key}=")
        return start, start + len(self.key) + 1 + ANSWER_LENGTH


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallScore:
    """How many of a run's answers were right."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """The right answers' share, from 0 to 1; 0 for a run without prompts."""
        return self.correct / self.total if self.total else 0.0


def make_pairs(source: random.Random, count: int) -> dict[str, str]:
    """Draw ``count`` distinct keys, each with a random value, in the order in which they are to be listed.

    Raises ValueError when there are not that many keys.
    """
    if not 1 <= count <= len(KEYS):
        raise ValueError(f"a recall prompt holds 1 to {len(KEYS)} pairs, not {count}")
    return {key: "".join(source.choices(VALUE_CHARACTERS, k=ANSWER_LENGTH)) for key in source.sample(KEYS, count)}


def list_pairs(source: random.Random, pairs: dict[str, str]) -> str:
    """Write the pairs out, with a random separator after each."""
    return "".join(f"{key}={value}{source.choice(SEPARATORS)}" for key, value in pairs.items())


def question(key: str) -> str:
    """The text that ends a prompt; the value of ``key`` is its continuation."""
    return f"?{key}="


def make_prompts(count: int, seed: int, *, pairs: tuple[int, int] = FULL_LENGTH_PAIRS) -> list[RecallPrompt]:
    """Make ``count`` prompts of ``pairs[0]`` to ``pairs[1]`` pairs each (both included), the same ones for one seed.

    A prompt of n pairs has 8n + 4 to 9n + 4 characters. Raises ValueError for a range that no prompt can have.
    """
    fewest, most = pairs
    if fewest > most:
        raise ValueError(f"the fewest pairs ({fewest}) exceed the most ({most})")
    source = random.Random(seed)
    prompts = []
    for _ in range(count):
        drawn = make_pairs(source, source.randint(fewest, most))
        key = source.choice(list(drawn))
        prompts.append(RecallPrompt(prompt=list_pairs(source, drawn) + question(key), answer=drawn[key]))
    return prompts


def is_correct(prompt: RecallPrompt, continuation: str) -> bool:
    """Whether generated text begins with the answer; what follows the answer does not count."""
    return continuation.startswith(prompt.answer)


def score(prompts: Sequence[RecallPrompt], continuations: Sequence[str]) -> RecallScore:
    """Score one continuation per prompt, in the same order. Raises ValueError when their numbers differ."""
    correct = sum(is_correct(prompt, text) for prompt, text in zip(prompts, continuations, strict=True))
    return RecallScore(correct=correct, total=len(prompts))

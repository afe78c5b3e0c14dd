"""What clients ask: prompts that begin alike, and loads of which no two requests are of one size."""

from __future__ import annotations

import random
from dataclasses import dataclass

from kvbaton.serving.evaluation.recall import list_pairs, make_pairs, question

#: Different beginnings, as of system prompts: more than one decode server's cache holds, fewer than all of them do.
BEGINNINGS = 12
#: Pairs of a beginning and of what follows it; a pair is 8 to 9 tokens.
BEGINNING_PAIRS = 100
OWN_PAIRS = 8
SHORT_TOKENS, LONG_TOKENS = 4, 48


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """One request."""

    prompt: str
    max_tokens: int


def shared(seed: int, count: int) -> list[Asked]:
    """Each of :data:`BEGINNINGS` as often as the others, in random order, with a question of its own."""
    rng = random.Random(f"shared {seed}")
    beginnings = [_pairs(rng, BEGINNING_PAIRS) for _ in range(BEGINNINGS)]
    order = [number % BEGINNINGS for number in range(count)]
    rng.shuffle(order)
    return [Asked(prompt=beginnings[number] + _question(rng), max_tokens=SHORT_TOKENS) for number in order]


def mixed(seed: int, count: int) -> list[Asked]:
    """Half of it begins alike, a third of all requests in one way; the others have nothing in common. One answer in
    four is long."""
    rng = random.Random(f"mixed {seed}")
    beginnings = [_pairs(rng, BEGINNING_PAIRS) for _ in range(BEGINNINGS)]
    made = []
    for _ in range(count):
        kind = rng.random()
        if kind < 1 / 3:
            start = beginnings[0]
        elif kind < 1 / 2:
            start = rng.choice(beginnings[1:])
        else:
            start = _pairs(rng, rng.randint(1, BEGINNING_PAIRS))
        made.append(
            Asked(prompt=start + _question(rng), max_tokens=LONG_TOKENS if rng.random() < 1 / 4 else SHORT_TOKENS)
        )
    return made


WORKLOADS = {"shared prefixes": shared, "mixed load": mixed}


def _pairs(rng: random.Random, count: int) -> str:
    return list_pairs(rng, make_pairs(rng, count))


def _question(rng: random.Random) -> str:
    own = make_pairs(rng, OWN_PAIRS)
    return list_pairs(rng, own) + question(rng.choice(list(own)))

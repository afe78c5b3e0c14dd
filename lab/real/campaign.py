"""SmolLM2-135M single and as a pair with unequal TP and page sizes.

Rules: the pair answers as ``generate`` does, token for token, whatever the language; lm-eval is given the same texts,
and so prints the same score, by both.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvbaton.serving.engine.model import load_model
from kvbaton.serving.fleet import Fleet
from lab.clients.campaign import READY_SECONDS, post, scored_by
from lab.clients.lm_eval import LmEval
from lab.clients.row import Row
from lab.real import niah
from lab.throughput import generate

NAME = "SmolLM2-135M-Instruct"
ANSWER_TOKENS = 12
#: It has 3 KV heads. A later flag wins over an earlier one.
PAIR = "prefill TP 3, pages of 16; decode TP 1, pages of 8"
_COMMON = ("--page-size", "8", "--max-total-tokens", "4096")
_PREFILL = ("--tp", "3", "--page-size", "16")
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Water boils at 100 degrees Celsius because",
    "Once upon a time, in a small village by the sea, there lived",
    "Die Hauptstadt von Österreich heißt",
    "El perro corre por el parque y",
    "日本の首都は",
    "中国的首都是北京",
    "서울은 대한민국의",
    "I love pizza 🍕🍕 and 🚀 because",
    "👨‍👩‍👧‍👦 is a family of",
    "Q: What is 7 times 8?\nA: Let us think step by step. " * 6,
)


async def perform(python: Path, model: Path, build: Path, *, samples: int, tell: Callable[[Row], None]) -> list[Row]:
    """Everything; each row is told as it comes."""
    rows: list[Row] = []
    prompts, expected = await asyncio.to_thread(generated, model)
    fleet = Fleet(build, model=str(model), reference=True, extra=_COMMON, prefill_extra=[_PREFILL])
    async with fleet:
        for server in fleet.servers:
            await fleet.ready(server, READY_SECONDS)
        assert fleet.reference is not None  # noqa: S101 - asked for above
        for way, url in (("the single process", fleet.reference.url), (PAIR, fleet.router.url)):
            rows.append(await _equal(fleet, way, url, prompts, expected))
            tell(rows[-1])
        directory = build / "lm_eval"
        asked = LmEval(
            python=python,
            directory=directory,
            tasks=(niah.TASK,),
            model="default",
            tokenizer=model,
            limit=samples,
            variables=niah.write_task(directory),
        )
        for row in await scored_by(asked, fleet.router.url, fleet.reference.url):
            rows.append(row)
            tell(row)
    return rows


def generated(model: Path) -> tuple[list[list[int]], list[list[int]]]:
    """The prompts as token ids, and how transformers' own ``generate`` goes on, greedily."""
    loaded = load_model(str(model))
    prompts: list[list[int]] = [loaded.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    return prompts, [generate(loaded, [tuple(prompt)], ANSWER_TOKENS)[0] for prompt in prompts]


async def _equal(fleet: Fleet, way: str, url: str, prompts: Sequence[list[int]], expected: Sequence[list[int]]) -> Row:
    started = time.monotonic()
    fields = {"max_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}

    async def tokens(text: str) -> Any:
        answer = await post(fleet.http, url, "/v1/completions", {"prompt": text, **fields})
        return answer["choices"][0]["token_ids"], answer["usage"]["prompt_tokens"]

    found = await asyncio.gather(*map(tokens, PROMPTS))
    wrong = [
        number
        for number, (answer, prompt, wanted) in enumerate(zip(found, prompts, expected, strict=True))
        if answer != (wanted, len(prompt))
    ]
    return Row(
        client=NAME,
        what=f"{way}: {ANSWER_TOKENS} tokens behind each prompt, equal to generate's",
        ok=len(prompts) - len(wrong),
        asked=len(prompts),
        seconds=time.monotonic() - started,
        said=", ".join(f"prompt {number} differs" for number in wrong),
    )

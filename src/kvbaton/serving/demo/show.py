"""What the demo asks, how it asks, and what makes an answer equal. Knows HTTP, not the terminal."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import aiohttp
import msgspec

from kvbaton.errors import TransferFailedError
from kvbaton.serving.evaluation.recall import ANSWER_LENGTH, make_prompts

PAGE_SIZE = 16
CHUNK_TOKENS = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One request: ``title`` says why it is asked."""

    title: str
    prompt: str
    max_tokens: int = ANSWER_LENGTH + 1
    temperature: float = 0.0
    seed: int | None = None

    def body(self, *, stream: bool = False) -> dict[str, Any]:
        body: dict[str, Any] = {
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "return_token_ids": True,
            "stream": stream,
        }
        if self.seed is not None:
            body["seed"] = self.seed
        return body


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoAnswer:
    """What came back. ``error`` is empty when tokens did."""

    text: str = ""
    tokens: tuple[int, ...] = ()
    bytes: int = 0
    seconds: float = 0.0
    exposed_seconds: float = 0.0
    error: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """A question, its answer by way of prefill and decode, and the single process's."""

    question: Question
    answer: DemoAnswer
    reference: DemoAnswer

    @property
    def equal(self) -> bool:
        """Token for token."""
        return not self.answer.error and not self.reference.error and self.answer.tokens == self.reference.tokens


def edge_questions() -> list[Question]:
    """Prompts at the edges of pages and chunks. The bundled model has one token per character."""
    long = make_prompts(1, seed=11)[0].prompt
    return [
        Question(title="1 token", prompt="a"),
        Question(title=f"exactly 2 pages ({2 * PAGE_SIZE} tokens)", prompt=long[-2 * PAGE_SIZE :]),
        Question(title=f"2 pages and 1 token ({2 * PAGE_SIZE + 1})", prompt=long[-2 * PAGE_SIZE - 1 :]),
        Question(title=f"{-(-len(long) // CHUNK_TOKENS)} chunks ({len(long)} tokens)", prompt=long),
        Question(title="sampled, with a seed", prompt=long[-200:], temperature=0.9, seed=5, max_tokens=12),
    ]


def concurrent_questions(count: int) -> list[Question]:
    """Recall prompts, asked all at once."""
    return [
        Question(title=f"recall {number + 1}", prompt=prompt.prompt)
        for number, prompt in enumerate(make_prompts(count, seed=12))
    ]


#: What a body must be said to be.
JSON = {"Content-Type": "application/json"}


async def ask(http: aiohttp.ClientSession, url: str, question: Question) -> DemoAnswer:
    """One answer, whole."""
    async with http.post(f"{url}/v1/completions", data=_payload(question.body()), headers=JSON) as response:
        payload = await response.read()
    if response.status != 200:
        return DemoAnswer(error=f"HTTP {response.status}: {payload.decode(errors='replace')}")
    answer = msgspec.json.decode(payload)
    choice, handoff = answer["choices"][0], answer.get("handoff") or {}
    return DemoAnswer(
        text=choice["text"],
        tokens=tuple(choice["token_ids"]),
        bytes=handoff.get("bytes", 0),
        seconds=handoff.get("seconds", 0.0),
        exposed_seconds=handoff.get("exposed_seconds", 0.0),
    )


async def ask_all(http: aiohttp.ClientSession, url: str, questions: Sequence[Question]) -> list[DemoAnswer]:
    """All at once."""
    return list(await asyncio.gather(*(ask(http, url, question) for question in questions)))


async def stream(http: aiohttp.ClientSession, url: str, question: Question) -> AsyncIterator[str]:
    """The pieces of one answer as they come. Raises TransferFailedError if the server reports an error."""
    async with http.post(f"{url}/v1/completions", data=_payload(question.body(stream=True)), headers=JSON) as response:
        if response.status != 200:
            raise TransferFailedError(f"HTTP {response.status}: {(await response.text())[:500]}")
        async for line in response.content:
            if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                continue
            event = msgspec.json.decode(line[len(b"data: ") :])
            if "error" in event:
                raise TransferFailedError(str(event["error"]))
            for choice in event["choices"]:
                yield choice["text"]


def _payload(body: dict[str, Any]) -> BytesIO:
    return BytesIO(msgspec.json.encode(body))

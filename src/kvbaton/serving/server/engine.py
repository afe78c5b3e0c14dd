"""What a server needs of an engine, and the bridge from the engine's thread to the event loop.

Rules: an engine calls back from its own thread and never waits for the loop; the bridge holds at most the outputs of
the answers to one HTTP request (``max_tokens`` bounds them). Leaving an :class:`OutputStream` before its last output
aborts what has not ended.

This file must not know HTTP, models or peers.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Protocol

from kvbaton.errors import KVBatonError
from kvbaton.serving.engine.request import HandedOnError, Output, Request
from kvbaton.serving.engine.stats import Stats
from kvbaton.serving.server.messages import Turn


class Engine(Protocol):
    """``kvbaton.serving.engine.scheduler.Scheduler`` is one. Every method may be called from any thread."""

    def submit(self, request: Request, on_output: Callable[[Output], None]) -> None:
        """Queue a request. ``on_output`` is called from the engine's thread, last with a final Output; outputs of
        its choices come in any order.

        Raises ConfigError, CapacityError, OverloadedError, or InternalError when the engine has died.
        """

    def abort(self, request_id: str, reason: str = ...) -> None:
        """End a request soon; an unknown or ended one is ignored."""

    def end_all(self, error: KVBatonError) -> None:
        """End every request soon, with that error."""

    def hand_on(self, request_ids: Sequence[str], room: int) -> None:
        """Let the engine that opens ``room`` and those behind it have what is left of the answers of these requests, in
        their order. Their outputs are soon ``departing``; or nothing happens."""

    def stats(self) -> Stats:
        """A snapshot of pages and queues."""

    @property
    def failure(self) -> KVBatonError | None:
        """Why the engine is gone for good; None while it lives."""


class Tokenizer(Protocol):
    """Text to tokens and back."""

    def encode(self, text: str, *, special: bool = True) -> Sequence[int]:
        """Tokens of a prompt; ``special``: with whatever the model wants in front of one."""

    def encode_chat(self, turns: Sequence[Turn], options: Mapping[str, Any] | None = None) -> Sequence[int]:
        """Tokens of messages up to where the assistant's answer begins; ``options`` are for the template.

        Raises ConfigError when the model has no chat template or the template refuses the messages.
        """

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of a few tokens, special ones included."""

    def token_bytes(self, token: int) -> bytes:
        """What one token stands for, also where that is a part of a character."""

    def is_special(self, token: int) -> bool:
        """Whether it stands for no text of an answer."""


class OutputStream:
    """The outputs of some requests, as they come; ``requests``: each by the number of its first answer. Use as a
    context manager, inside one event loop. ``heard`` is called with each one first."""

    def __init__(
        self,
        engine: Engine,
        requests: Mapping[int, Request],
        heard: Callable[[Output], None],
    ) -> None:
        self._heard = heard
        self._engine = engine
        self._requests = requests
        self._open = 0  # of those that are submitted
        self._loop = asyncio.get_running_loop()
        self._arrived: deque[Output] = deque()
        self._news = asyncio.Event()
        self._departing = 0

    def submit(self) -> None:
        """Hand the requests to the engine. Raises what the engine's submit raises."""
        for first, request in self._requests.items():
            self._engine.submit(request, partial(self._on_output, first))
            self._open += 1

    def __enter__(self) -> OutputStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open:
            for request in self._requests.values():
                self._engine.abort(request.request_id, "the client has gone")

    async def next(self) -> Output:
        """What is new of one choice since the last call, as one Output; waits for the first of it.

        Raises the error that ended the request.
        """
        output = await self._take()
        while output.departing or isinstance(output.error, HandedOnError):  # all of the requests go, or none
            self._departing += output.departing
            self._open -= output.final
            if self._departing == self._open or not self._open:
                break
            output = await self._take()
        if isinstance(output.error, HandedOnError):
            raise output.error
        if output.departing:
            return output
        while self._arrived and not output.ends_choice and _continues(output, self._arrived[0]):
            output = _joined(output, self._arrived.popleft())
        if output.final:
            self._open -= 1
            if self._open and output.error is None:
                output = replace(output, unfinished=self._open)
        if output.error is not None:
            raise output.error
        self._heard(output)
        return output

    async def _take(self) -> Output:
        while not self._arrived:
            self._news.clear()
            await self._news.wait()
        return self._arrived.popleft()

    def _on_output(self, first: int, output: Output) -> None:
        """On the engine's thread. ``first``: the number of the prompt's first answer."""
        self._arrived.append(replace(output, index=first + output.index) if first else output)
        self._loop.call_soon_threadsafe(self._news.set)

    def __repr__(self) -> str:
        ids = [request.request_id for request in self._requests.values()]
        return f"<OutputStream {ids}{'' if self._open else ' finished'}>"


def _continues(first: Output, second: Output) -> bool:
    """Whether ``second`` is more of the same answer."""
    return second.index == first.index and second.error is None and not second.departing


def _joined(first: Output, second: Output) -> Output:
    return Output(
        index=first.index,
        tokens=first.tokens + second.tokens,
        text=first.text + second.text,
        logprobs=first.logprobs + second.logprobs,
        top_logprobs=first.top_logprobs + second.top_logprobs,
        finish_reason=second.finish_reason,
        unfinished=second.unfinished,
        handoff=first.handoff or second.handoff,
        matched=second.matched,
        cached_tokens=first.cached_tokens,
        prompt_logprobs=first.prompt_logprobs,
        queued_seconds=first.queued_seconds,
        rank=first.rank,
    )

"""What a server needs of an engine, and the bridge from the engine's thread to the event loop.

Rules: an engine calls back from its own thread and never waits for the loop; the bridge holds at most the outputs of
one answer (``max_tokens`` bounds them). Leaving an :class:`OutputStream` before its last output aborts the request.

This file must not know HTTP, models or peers.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Protocol

from kvbaton.errors import KVBatonError
from kvbaton.serving.engine.request import Output, Request
from kvbaton.serving.engine.scheduler import Stats


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

    def stats(self) -> Stats:
        """A snapshot of pages and queues."""

    @property
    def failure(self) -> KVBatonError | None:
        """Why the engine is gone for good; None while it lives."""


class Tokenizer(Protocol):
    """Text to tokens and back."""

    def encode(self, text: str) -> Sequence[int]:
        """Tokens of a prompt, with whatever the model wants in front of one."""

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> Sequence[int]:
        """Tokens of (role, text) messages up to where the assistant's answer begins.

        Raises ConfigError when the model has no chat template or the template refuses the messages.
        """

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of a few tokens, special ones included."""


class OutputStream:
    """The outputs of one request, as they come. Use as a context manager, inside one event loop."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self._engine = engine
        self._request = request
        self._loop = asyncio.get_running_loop()
        self._arrived: deque[Output] = deque()
        self._news = asyncio.Event()
        self._finished = True  # nothing to abort before it is submitted

    def submit(self) -> None:
        """Hand the request to the engine. Raises what the engine's submit raises."""
        self._engine.submit(self._request, self._on_output)
        self._finished = False

    def __enter__(self) -> OutputStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._finished:
            self._engine.abort(self._request.request_id, "the client has gone")

    async def next(self) -> Output:
        """What is new of one choice since the last call, as one Output; waits for the first of it.

        Raises the error that ended the request.
        """
        while not self._arrived:
            self._news.clear()
            await self._news.wait()
        output = self._arrived.popleft()
        while self._arrived and not output.ends_choice and _continues(output, self._arrived[0]):
            output = _joined(output, self._arrived.popleft())
        self._finished = output.final
        if output.error is not None:
            raise output.error
        return output

    def _on_output(self, output: Output) -> None:
        """On the engine's thread."""
        self._arrived.append(output)
        self._loop.call_soon_threadsafe(self._news.set)

    def __repr__(self) -> str:
        return f"<OutputStream {self._request.request_id}{' finished' if self._finished else ''}>"


def _continues(first: Output, second: Output) -> bool:
    """Whether ``second`` is more of the same answer."""
    return second.index == first.index and second.error is None


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
    )

"""An engine without a model: it answers as it was told, so that a server can be tested by itself.

A script maps a request to outputs. Those it lists come at once, on the thread that submits; a request whose last output
is not final stays alive until it is aborted or :meth:`ScriptedEngine.emit` ends it, from any thread.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kvbaton.errors import AbortedError, ConfigError, InternalError, KVBatonError
from kvbaton.serving.engine.request import Output, Request
from kvbaton.serving.engine.stats import Stats
from kvbaton.serving.server.messages import Turn

PATIENCE_SECONDS = 10.0


def spell(text: str, *, finish_reason: str | None = "stop") -> list[Output]:
    """One output per character, its token the character's code point."""
    outputs = [Output(tokens=(ord(letter),), text=letter, logprobs=(-0.5,)) for letter in text[:-1]]
    last = Output(tokens=(ord(text[-1]),), text=text[-1], logprobs=(-0.5,), finish_reason=finish_reason)
    return [*outputs, last]


def spell_all(text: str, choices: int, **arguments: Any) -> list[Output]:
    """:func:`spell` for each of ``choices`` answers, letter by letter in turn."""
    spelt = spell(text, **arguments)
    outputs = [replace(output, index=index) for output in spelt for index in range(choices)]
    ending = outputs[-choices:]
    return outputs[:-choices] + [replace(last, unfinished=choices - 1 - index) for index, last in enumerate(ending)]


class ScriptedEngine:
    """Implements ``kvbaton.serving.server.engine.Engine``."""

    def __init__(self, script: Callable[[Request], Iterable[Output]]) -> None:
        self.script = script
        self.refusal: KVBatonError | None = None  # raised by every submit
        self.requests: list[Request] = []
        self.aborted: list[str] = []
        self.handed_on: dict[int, tuple[str, ...]] = {}
        self._live: dict[str, Callable[[Output], None]] = {}
        self._changed = threading.Condition()

    @property
    def live(self) -> set[str]:
        """Requests that have had no final output."""
        return set(self._live)

    def submit(self, request: Request, on_output: Callable[[Output], None]) -> None:
        if self.refusal is not None:
            raise self.refusal
        outputs = list(self.script(request))
        with self._changed:
            self.requests.append(request)
            self._live[request.request_id] = on_output
            self._changed.notify_all()
        for output in outputs:
            self.emit(request.request_id, output)

    def emit(self, request_id: str, output: Output) -> None:
        """Say one more thing on a live request."""
        with self._changed:
            on_output = self._live.get(request_id)
            if on_output is not None and output.final:
                del self._live[request_id]
            self._changed.notify_all()
        if on_output is not None:
            on_output(output)

    def abort(self, request_id: str, reason: str = "") -> None:
        with self._changed:
            self.aborted.append(request_id)
        self.emit(request_id, Output(error=AbortedError(reason)))

    def end_all(self, error: KVBatonError) -> None:
        for request_id in self.live:
            self.emit(request_id, Output(error=error))

    def hand_on(self, request_ids: Sequence[str], room: int) -> None:
        """As an engine does all of whose targets come; ``handed_on`` has the rooms."""
        self.handed_on[room] = tuple(request_ids)
        for request_id in request_ids:
            self.emit(request_id, Output(departing=True))

    def stats(self) -> Stats:
        return Stats(
            pages_free=10,
            pages_used=2 * len(self._live),
            pages_leased=0,
            slots_used=0,
            running=len(self._live),
            queues={"waiting": 0},
            prefix_lookups=3,
            prefix_hit_tokens=48,
        )

    @property
    def failure(self) -> KVBatonError | None:
        return self.refusal if isinstance(self.refusal, InternalError) else None

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something that happened here makes ``condition`` true. Raises TimeoutError."""

        def wait() -> bool:
            with self._changed:
                return self._changed.wait_for(condition, PATIENCE_SECONDS)

        if not await asyncio.to_thread(wait):
            raise TimeoutError(f"{self!r} never came to {condition}")

    def __repr__(self) -> str:
        return f"<ScriptedEngine {len(self.requests)} requests, live {sorted(self._live)}, aborted {self.aborted}>"


class CharacterTokenizer:
    """Implements ``kvbaton.serving.server.engine.Tokenizer``: a token is a character's code point."""

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        del special  # there are none
        return [ord(letter) for letter in text]

    def encode_chat(self, turns: Iterable[Turn], options: Mapping[str, Any] | None = None) -> list[int]:
        del options  # there is no template
        said = "".join(f"<{turn['role']}>{turn['content']}" for turn in turns)
        return self.encode(said + "<assistant>")

    def decode(self, tokens: Iterable[int]) -> str:
        try:
            return "".join(map(chr, tokens))
        except (OverflowError, ValueError):
            raise ConfigError("tokens: one of them is outside the vocabulary") from None

    def token_bytes(self, token: int) -> bytes:
        return chr(token).encode()

    def is_special(self, token: int) -> bool:
        del token
        return False

"""Tokens to text while they come: incremental detokenisation, stop strings, end of sequence.

Rules: text leaves only when no later token can change it: not the first bytes of a character, and not what may turn
out to be the start of a stop string. A stop string itself is never part of the text. A stop string is looked for in
the answer only, never across the end of the prompt.

This file must not know of schedulers, pools or sampling.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kvbaton.errors import InternalError

#: Prompt tokens decoded in front of the answer, so that a leading space is judged as in running text.
CONTEXT_TOKENS = 5
#: Tokens that may wait for the rest of a character; more than any character has means that the bytes are no text.
PENDING_TOKENS = 8
_UNFINISHED = "\ufffd"


class Detokenizer:
    """Text of one growing token sequence, in pieces. Without a tokenizer every piece is empty."""

    def __init__(self, tokenizer: Any, prompt_tokens: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt_tokens[-CONTEXT_TOKENS:])
        self._shown = self._decode(self._tokens)
        self._context = len(self._tokens)

    def push(self, token: int) -> str:
        """The text that ``token`` completes; empty while a character is unfinished."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        if text.endswith(_UNFINISHED) and len(self._tokens) - self._context < PENDING_TOKENS:
            return ""
        return self._take(text)

    def flush(self) -> str:
        """What is still held back, unfinished characters included."""
        return self._take(self._decode(self._tokens)) if len(self._tokens) > self._context else ""

    def _take(self, text: str) -> str:
        """Show ``text`` and forget the tokens before those just shown, which stay as context."""
        piece = text[len(self._shown) :]
        self._tokens = self._tokens[self._context :]
        self._shown = self._decode(self._tokens)
        self._context = len(self._tokens)
        return piece

    def _decode(self, tokens: Sequence[int]) -> str:
        if self._tokenizer is None or not tokens:
            return ""
        try:
            return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        except Exception as error:  # tokenizers have no common base
            raise InternalError(f"the tokenizer cannot decode {list(tokens)}: {error!r}") from error


class StopMatcher:
    """Cuts a text at the first of ``stops``, holding back what may be the start of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that may be shown, whether a stop string ended it)."""
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token adds: text that may be shown now, and whether the answer ends with it."""

    text: str
    finish_reason: Literal["stop", "length"] | None = None


class TextStream:
    """The text of one answer of at most ``max_tokens`` tokens."""

    def __init__(
        self,
        tokenizer: Any,
        prompt_tokens: Sequence[int],
        *,
        stops: Sequence[str],
        eos_tokens: Collection[int],
        max_tokens: int,
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt_tokens)
        self._matcher = StopMatcher(stops)
        self._eos_tokens = eos_tokens
        self._remaining = max_tokens

    def push(self, token: int) -> Piece:
        self._remaining -= 1
        ended = token in self._eos_tokens
        text = "" if ended else self._detokenizer.push(token)
        if not ended and self._remaining > 0:
            shown, stopped = self._matcher.push(text)
            return Piece(shown, "stop" if stopped else None)
        shown, stopped = self._matcher.push(text + self._detokenizer.flush())
        if not stopped:
            shown += self._matcher.flush()
        return Piece(shown, "stop" if ended or stopped else "length")

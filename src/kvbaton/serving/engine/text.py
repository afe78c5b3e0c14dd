"""Tokens to text while they come: incremental detokenisation, stop strings, end of sequence.

Rules: text leaves only when no later token can change it: not the first bytes of a character, and not what may turn
out to be the start of a stop string. A stop string itself is never part of the text. A stop string is looked for in
the answer only, never across the end of the prompt.

This file must not know of schedulers, pools or sampling.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kvbaton.errors import InternalError

#: Prompt tokens decoded in front of the answer, so that a leading space is judged as in running text.
CONTEXT_TOKENS = 5
#: Tokens that may wait for the rest of a character; more than any character has means that the bytes are no text.
PENDING_TOKENS = 8
_UNFINISHED = "\ufffd"
logger = logging.getLogger(__name__)


class Detokenizer:
    """Text of one growing token sequence, in pieces. Without a tokenizer every piece is empty."""

    def __init__(self, tokenizer: Any, prompt_tokens: Sequence[int], *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skips = skip_special_tokens
        self._tokens = list(prompt_tokens[-CONTEXT_TOKENS:])
        self._context = len(self._tokens)
        shown = self._decode(self._tokens)
        self._shown = shown.removesuffix(_UNFINISHED)
        self._prompt_unfinished = self._shown != shown

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
        if self._prompt_unfinished:  # the answer has completed the prompt's last character, or that is none
            self._prompt_unfinished = False
            piece = piece.removeprefix(_UNFINISHED)
        self._tokens = self._tokens[self._context :]
        self._shown = self._decode(self._tokens)
        self._context = len(self._tokens)
        return piece

    def _decode(self, tokens: Sequence[int]) -> str:
        if self._tokenizer is None or not tokens:
            return ""
        try:
            return str(
                self._tokenizer.decode(tokens, skip_special_tokens=self._skips, clean_up_tokenization_spaces=False)
            )
        except Exception as error:  # tokenizers have no common base
            logger.exception("the tokenizer cannot decode %s", list(tokens))
            raise InternalError(
                f"the tokenizer cannot decode {list(tokens)}; the log of this server says why"
            ) from error


class StopMatcher:
    """Cuts a text at the first of ``stops``, holding back what may be the start of one.

    ``include``: the stop string stays. :attr:`matched` is the one that was found.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> tuple[str, bool]:
        """(text that may be shown, whether a stop string ended it)."""
        text = self._held + text
        found = [(at, stop) for at, stop in ((text.find(stop), stop) for stop in self._stops) if at >= 0]
        if found:
            self._held = ""
            at, self.matched = min(found, key=lambda each: each[0])
            return text[: at + (len(self.matched) if self._include else 0)], True
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
    """What one token adds: text that may be shown now, and whether the answer ends with it, and by which token or
    string."""

    text: str
    finish_reason: Literal["stop", "length"] | None = None
    matched: int | str | None = None


class TextStream:
    """The text of one answer of ``min_tokens`` to ``max_tokens`` tokens.

    ``ends``: tokens that end it; ``include_stop``: their text, or that of the stop string, is part of it.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_tokens: Sequence[int],
        *,
        stops: Sequence[str],
        ends: Collection[int],
        max_tokens: int,
        min_tokens: int = 0,
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt_tokens, skip_special_tokens=skip_special_tokens)
        self._matcher = StopMatcher(stops, include=include_stop)
        self._include = include_stop
        self._ends = ends
        self._remaining = max_tokens
        self._required = min_tokens

    def push(self, token: int) -> Piece:
        self._remaining -= 1
        self._required -= 1
        ended = token in self._ends
        text = self._detokenizer.push(token) if not ended or self._include else ""
        if self._required > 0:  # no stop string counts yet
            return Piece(text)
        if not ended and self._remaining > 0:
            shown, stopped = self._matcher.push(text)
            return Piece(shown, "stop" if stopped else None, self._matcher.matched)
        shown, stopped = self._matcher.push(text + self._detokenizer.flush())
        if stopped:
            return Piece(shown, "stop", self._matcher.matched)
        shown += self._matcher.flush()
        return Piece(shown, "stop", token) if ended else Piece(shown, "length")

"""A prompt in front of its answers, as ``echo`` asks for it: its text, and where in it each token begins.

Rules: a prompt that came as text is said again as it came; what the tokenizer puts in front of every text is a token
without characters. One that came as token ids may end within a character: U+FFFD stands for it, unless the answer
completes it.

This file must not know requests or engines.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from kvbaton.serving.server.engine import Tokenizer
from kvbaton.serving.server.prompts import Prompt
from kvbaton.serving.server.token_text import MAX_CHARACTER_TOKENS, UNFINISHED


class Echo:
    """Of one prompt: ``tokens`` is what became of what was ``given``. ``text`` is without the character that the prompt
    begins and does not end."""

    def __init__(self, tokenizer: Tokenizer, given: Prompt, tokens: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = tokens
        self._is_text = isinstance(given, str)
        self.text, self._owed = (given, b"") if isinstance(given, str) else self._decoded()

    def _decoded(self) -> tuple[str, bytes]:
        """The text of token ids, and the bytes of a character that it ends within. Raises ConfigError."""
        text = self._tokenizer.decode(self._tokens)
        if not text.endswith(UNFINISHED):
            return text, b""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(b"".join(map(self._tokenizer.token_bytes, self._tokens[-MAX_CHARACTER_TOKENS:])))
        owed, _ = decoder.getstate()
        return (text.removesuffix(UNFINISHED), owed) if owed else (text, b"")

    def data(self) -> list[bytes]:
        """What each token adds to the text."""
        data = [self._tokenizer.token_bytes(token) for token in self._tokens]
        if not self._is_text:
            return data
        added, first = self._tokenizer.encode(""), 0
        while first < min(len(added), len(data)) and self._tokens[first] == added[first]:
            data[first] = b""
            first += 1
        if first < len(data) and not self.text.startswith(" "):  # some tokenizers begin every text with one
            data[first] = data[first].removeprefix(b" ")
        return data

    def unfinished(self) -> Unfinished | None:
        """The character at the end of the prompt, for one of its answers."""
        return Unfinished(self._owed) if self._owed else None


class Unfinished:
    """A character that the prompt begins: feed it the bytes of the answer's tokens until its text comes."""

    def __init__(self, owed: bytes) -> None:
        self._data = owed

    def push(self, data: bytes) -> None:
        self._data += data

    @property
    def text(self) -> str:
        """What stands for it in front of the answer's text, where the answer does not complete it."""
        return UNFINISHED if self._data.decode("utf-8", "replace").startswith(UNFINISHED) else ""

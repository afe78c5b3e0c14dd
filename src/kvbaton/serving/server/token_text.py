"""What is told of one token beside its logprob: its text, its own bytes, and where it begins.

Rules: ``bytes`` are the token's own, also where it is a part of a character only; its text is then ``bytes:\\xe6…`` as
OpenAI writes it, so that two such tokens differ. Offsets count characters of the answer: every part of a character
begins where the character does.

This file must not know requests or engines.
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass

from kvbaton.serving.server.engine import Tokenizer


@dataclass(frozen=True, slots=True)
class TokenText:
    text: str
    data: bytes


def token_text(tokenizer: Tokenizer | None, token: int) -> TokenText:
    if tokenizer is None:
        text = f"token_id:{token}"
        return TokenText(text, text.encode())
    data = tokenizer.token_bytes(token)
    try:
        return TokenText(data.decode(), data)
    except UnicodeDecodeError:
        return TokenText("bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data)


class Offsets:
    """Where the tokens of one answer begin, in characters; feed it all of them in order."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._characters = 0

    def next(self, data: bytes) -> int:
        """Where the token with these bytes begins."""
        start = self._characters
        self._characters += len(self._decoder.decode(data))
        return start

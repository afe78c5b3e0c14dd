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

#: What stands for a character that is not whole, and the most tokens that are one.
UNFINISHED = "\ufffd"
MAX_CHARACTER_TOKENS = 4


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
    """Where the tokens of one answer begin, in characters; feed it all of them in order.

    ``before``: bytes of the prompt's last tokens. A character that they begin and the answer ends is the answer's; one
    that stays unfinished is the prompt's.
    """

    def __init__(self, before: bytes = b"") -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder.decode(before)
        self._owed = bool(self._decoder.getstate()[0])
        self._characters = 0

    def next(self, data: bytes) -> int:
        """Where the token with these bytes begins."""
        start = self._characters
        text = self._decoder.decode(data)
        if text and self._owed:
            self._owed = False
            text = text.removeprefix(UNFINISHED)
        self._characters += len(text)
        return start

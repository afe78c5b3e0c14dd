"""A transformers tokenizer as the servers use it.

Rules: its own copy, behind a lock: fast tokenizers refuse to be used by two threads at once, and the engine decodes
with the original. A chat template is a program of the model directory: transformers renders it in Jinja's sandbox, here
without the lock, and for :data:`TEMPLATE_SECONDS` at most; one that takes longer than others do rests most of the time,
so that it does not keep the interpreter from the threads that serve.
"""

from __future__ import annotations

import copy
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from types import FrameType
from typing import Any

from kvbaton.errors import ConfigError
from kvbaton.serving.server.messages import Turn
from kvbaton.serving.server.token_text import UNFINISHED

#: A chat template has been rendered by then.
TEMPLATE_SECONDS = 5.0
#: It runs for so long without a rest; from then on it runs and rests in turn.
BRISK_SECONDS = 0.05
RUN_SECONDS, REST_SECONDS = 0.001, 0.02
#: Tokens whose bytes are remembered.
MAX_TOKENS_KNOWN = 1 << 16


class ServerTokenizer:
    """Implements :class:`kvbaton.serving.server.engine.Tokenizer`."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._lock = threading.Lock()
        self._special = frozenset(getattr(tokenizer, "all_special_ids", ()))
        #: A token to decode others behind: some tokenizers take the space from the front of a text.
        self._anchor = tuple(self.encode("a", special=False))[-1:]
        self._anchor_text = self.decode(self._anchor)
        self.token_bytes = lru_cache(MAX_TOKENS_KNOWN)(self._token_bytes)

    def encode(self, text: str, *, special: bool = True) -> Sequence[int]:
        with self._lock:
            return [int(token) for token in self._tokenizer.encode(text, add_special_tokens=special)]

    def encode_chat(self, turns: Sequence[Turn], options: Mapping[str, Any] | None = None) -> Sequence[int]:
        if not getattr(self._tokenizer, "chat_template", None):
            raise ConfigError("messages: the model has no chat template; use /v1/completions")
        given = {"add_generation_prompt": True, **(options or {})}
        try:
            with _deadline(TEMPLATE_SECONDS):
                text = self._tokenizer.apply_chat_template(list(turns), tokenize=False, **given)
        except Exception as error:  # noqa: BLE001 - templates are programs: they raise what they like at bad input
            raise ConfigError(f"messages: the model's chat template refuses them: {error}") from None
        with self._lock:
            return [int(token) for token in self._tokenizer.encode(text, add_special_tokens=False)]

    def decode(self, tokens: Sequence[int]) -> str:
        try:
            with self._lock:
                return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False))
        except (OverflowError, ValueError, TypeError, IndexError):  # tokenizers have no common base
            raise ConfigError("tokens: one of them is outside the vocabulary") from None

    def is_special(self, token: int) -> bool:
        return token in self._special

    def _token_bytes(self, token: int) -> bytes:
        text = self.decode([*self._anchor, token]).removeprefix(self._anchor_text)
        if UNFINISHED not in text:
            return text.encode()
        with self._lock:
            piece = self._tokenizer.convert_ids_to_tokens(token)
        return _own_bytes(str(piece)) or text.encode()


def _own_bytes(piece: str) -> bytes:
    """The bytes that a piece of a vocabulary stands for: ``<0xE6>``, or letters of GPT-2's alphabet for bytes."""
    fallback = _FALLBACK.fullmatch(piece)
    if fallback:
        return bytes([int(fallback[1], 16)])
    found = [_ALPHABET.get(letter) for letter in piece]
    return b"" if None in found else bytes(byte for byte in found if byte is not None)


def _alphabet() -> dict[str, int]:
    """GPT-2's: printable bytes are themselves, the others the characters from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + number): byte for number, byte in enumerate(others)}


_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ALPHABET = _alphabet()


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in this thread, between two lines of what is called in the block, once it has taken so long.

    A thread cannot be stopped from outside; a trace function is asked at every line of Python that the thread runs.
    """
    begun = time.monotonic()
    rest_at = begun + BRISK_SECONDS

    def check(_frame: FrameType, _event: str, _argument: object) -> Any:
        nonlocal rest_at
        now = time.monotonic()
        if now > begun + seconds:
            raise TimeoutError(f"it takes more than {seconds:g} s")
        if now > rest_at:
            time.sleep(REST_SECONDS)
            rest_at = time.monotonic() + RUN_SECONDS
        return check

    before = sys.gettrace()
    sys.settrace(check)
    try:
        yield
    finally:
        sys.settrace(before)

"""A transformers tokenizer as the servers use it.

Rules: its own copy, behind a lock: fast tokenizers refuse to be used by two threads at once, and the engine decodes
with the original. A chat template is a program of the model directory: transformers renders it in Jinja's sandbox, here
without the lock, and for :data:`TEMPLATE_SECONDS` at most; one that takes longer than others do rests most of the time,
so that it does not keep the interpreter from the threads that serve.
"""

from __future__ import annotations

import copy
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from kvbaton.errors import ConfigError

#: A chat template has been rendered by then.
TEMPLATE_SECONDS = 5.0
#: It runs for so long without a rest; from then on it runs and rests in turn.
BRISK_SECONDS = 0.05
RUN_SECONDS, REST_SECONDS = 0.001, 0.02


class ServerTokenizer:
    """Implements :class:`kvbaton.serving.server.engine.Tokenizer`."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._lock = threading.Lock()

    def encode(self, text: str) -> Sequence[int]:
        with self._lock:
            return [int(token) for token in self._tokenizer.encode(text)]

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> Sequence[int]:
        if not getattr(self._tokenizer, "chat_template", None):
            raise ConfigError("messages: the model has no chat template; use /v1/completions")
        turns = [{"role": role, "content": text} for role, text in messages]
        try:
            with _deadline(TEMPLATE_SECONDS):
                text = self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # noqa: BLE001 - templates are programs: they raise what they like at bad input
            raise ConfigError(f"messages: the model's chat template refuses them: {error}") from None
        with self._lock:
            return [int(token) for token in self._tokenizer.encode(text, add_special_tokens=False)]

    def decode(self, tokens: Sequence[int]) -> str:
        with self._lock:
            return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False))


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

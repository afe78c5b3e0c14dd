"""A transformers tokenizer as the servers use it.

Rules: its own copy, behind a lock: fast tokenizers refuse to be used by two threads at once, and the engine decodes
with the original.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any

from kvbaton.errors import ConfigError


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
        with self._lock:
            try:
                text = self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            except Exception as error:  # noqa: BLE001 - templates are programs: they raise what they like at bad input
                raise ConfigError(f"messages: the model's chat template refuses them: {error}") from None
            return [int(token) for token in self._tokenizer.encode(text, add_special_tokens=False)]

    def decode(self, tokens: Sequence[int]) -> str:
        with self._lock:
            return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False))

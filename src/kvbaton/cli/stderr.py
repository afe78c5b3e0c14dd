"""stderr that loses what it cannot write: a full disk under the logs must not stop a server or spoil its exit."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class ForgivingStream:
    """A text stream whose writes never raise OSError. Everything else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def forgiving_stderr() -> Iterator[None]:
    """For the length of the block. Afterwards what is left to write and cannot be is given up, so that the interpreter
    does not turn it into exit code 120."""
    stream = sys.stderr
    sys.stderr = ForgivingStream(stream)
    try:
        yield
    finally:
        sys.stderr = stream
        try:
            stream.flush()
        except OSError:
            _abandon(stream)


def _abandon(stream: TextIO) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, stream.fileno())
    finally:
        os.close(nowhere)

"""Finds the messages in a ZMTP byte stream, so that a proxy can wait for one of them.

Only unencrypted streams (no shared secret) can be read. What is no message of ours passes unread. Framing: a greeting
of 64 bytes, then frames of a flags byte, a length of one byte or eight, and a body (ZMTP 3.1, RFC 37).
"""

from __future__ import annotations

from collections.abc import Iterator

from kvbaton.errors import MessageError
from kvbaton.protocol.messages import AnyMessage, decode

GREETING_BYTES = 64
_LONG = 0x02
_COMMAND = 0x04


class Frames:
    """One direction of one connection."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._greeting_left = GREETING_BYTES

    def feed(self, data: bytes) -> Iterator[tuple[bytes, AnyMessage | None]]:
        """Whole frames as they were sent, each with the message that it is, if it is one. The greeting passes as it
        comes: its two sides wait for each other's first bytes."""
        greeting, data = data[: self._greeting_left], data[self._greeting_left :]
        self._greeting_left -= len(greeting)
        if greeting:
            yield greeting, None
        self._buffer += data
        while (size := self._whole()) is not None:
            frame = bytes(self._buffer[:size])
            del self._buffer[:size]
            yield frame, self._message(frame)

    def _whole(self) -> int | None:
        """Bytes of the first frame, None while it is incomplete."""
        held = self._buffer
        header = 9 if held and held[0] & _LONG else 2
        if len(held) < header:
            return None
        size = header + int.from_bytes(held[1:header], "big")
        return size if len(held) >= size else None

    def _message(self, frame: bytes) -> AnyMessage | None:
        if frame[0] & _COMMAND:
            return None
        try:
            return decode(frame[9 if frame[0] & _LONG else 2 :])
        except MessageError:
            return None

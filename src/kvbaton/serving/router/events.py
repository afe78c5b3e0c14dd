"""A worker's stream, cut into server-sent events.

This file must not know HTTP, or what an event says.
"""

from __future__ import annotations

_END = b"\n\n"


class Events:
    """Cuts a stream into its events, each without the empty line behind it. Bytes after the last one are held."""

    def __init__(self) -> None:
        self._held = bytearray()

    @property
    def held_bytes(self) -> int:
        return len(self._held)

    def feed(self, piece: bytes) -> list[bytes]:
        searched = max(0, len(self._held) - 1)
        self._held += piece
        found, start = [], 0
        at = self._held.find(_END, searched)
        while at >= 0:
            found.append(bytes(self._held[start:at]))
            start = at + len(_END)
            at = self._held.find(_END, start)
        del self._held[:start]
        return found

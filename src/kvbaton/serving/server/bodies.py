"""Request bodies, read within bounds: bytes of one, bytes of all that are large, and time.

Rules: what is too large is refused by its Content-Length, before it is read, or where it passes the bound; nothing is
ever decompressed (a few bytes would become gigabytes). Small bodies always find room, their number is the
admission limit's business; large ones share a budget, so that many at once are refused instead of filling the memory,
and are handed out one after the other, so that what is made of them leaves the event loop to others in between.

This file must not know what a body means.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from kvbaton.errors import OverloadedError

#: Largest body: a million token ids with room to spare.
MAX_BODY_BYTES = 16 << 20
#: Largest body that a router takes: it adds fields of its own before a worker reads it.
MAX_ROUTED_BODY_BYTES = MAX_BODY_BYTES - (64 << 10)
#: A body of at most this size is not counted.
SMALL_BODY_BYTES = 64 << 10
#: Most bytes of counted bodies at a time.
MAX_BODIES_BYTES = 256 << 20
#: Bytes of counted bodies that are handed out in a second: what is made of 16 MiB takes the event loop up to 0.2 s.
LARGE_BYTES_EACH_SECOND = 32 << 20
#: Times as long as one of them kept the event loop, others have it before the next: all of them have a twentieth of it.
#: A request waits in three processes; with a tenth each, three of a hundred met such bodies in two of them.
REST = 19
#: A body has arrived by then.
BODY_SECONDS = 30.0


class Bodies:
    """Reads bodies for one server."""

    def __init__(
        self,
        *,
        most_bytes: int = MAX_BODY_BYTES,
        all_bytes: int = MAX_BODIES_BYTES,
        small_bytes: int = SMALL_BODY_BYTES,
        each_second: int = LARGE_BYTES_EACH_SECOND,
        seconds: float = BODY_SECONDS,
    ) -> None:
        self._most_bytes = most_bytes
        self._all_bytes = all_bytes
        self._small_bytes = small_bytes
        self._seconds = seconds
        self._held = 0
        self._each_second = each_second
        self._turns = asyncio.Lock()
        self._next_turn = 0.0

    def __repr__(self) -> str:
        return f"<Bodies {self._held} of {self._all_bytes} bytes>"

    @property
    def held_bytes(self) -> int:
        """Bytes of large bodies that are being read or used."""
        return self._held

    @asynccontextmanager
    async def read(self, http: web.Request) -> AsyncIterator[bytes]:
        """The whole body; counted for the length of the block.

        Raises HTTPRequestEntityTooLarge, HTTPUnsupportedMediaType, HTTPRequestTimeout, OverloadedError.
        """
        if http.headers.get("Content-Encoding", "identity").lower() not in ("", "identity"):
            raise web.HTTPUnsupportedMediaType(reason="Compressed bodies are not taken")
        if (http.content_length or 0) > self._most_bytes:
            raise web.HTTPRequestEntityTooLarge(self._most_bytes, http.content_length or 0)
        body = bytearray()
        counted = 0
        try:
            try:
                async with asyncio.timeout(self._seconds):
                    async for piece in http.content.iter_any():
                        body += piece
                        if len(body) > self._most_bytes:
                            raise web.HTTPRequestEntityTooLarge(self._most_bytes, len(body))
                        if len(body) > self._small_bytes:
                            counted += self._take(len(body) - counted)
            except TimeoutError:
                raise web.HTTPRequestTimeout(reason=f"No complete body within {self._seconds:g} s") from None
            whole = bytes(body)
            body.clear()
            if counted:
                await self._turn(counted)
            yield whole
        finally:
            self._held -= counted

    async def _turn(self, size: int) -> None:
        """Wait until a large body may be looked at. Their sum is bounded, and so is this."""
        async with self._turns:
            await asyncio.sleep(self._next_turn - time.monotonic())
            begun = time.monotonic()
            self._next_turn = begun + size / self._each_second
            asyncio.get_running_loop().call_soon(self._note_busy, begun)

    def _note_busy(self, begun: float) -> None:
        """What is made of a body at once is made by now: the event loop is others' for :data:`REST` times as long."""
        now = time.monotonic()
        self._next_turn = max(self._next_turn, now + REST * (now - begun))

    def _take(self, size: int) -> int:
        if self._held + size > self._all_bytes:
            raise OverloadedError("too many large requests are being read at once; try again later")
        self._held += size
        return size

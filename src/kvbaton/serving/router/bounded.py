"""A worker's answer, read up to a bound."""

from __future__ import annotations

import aiohttp


async def bounded(response: aiohttp.ClientResponse, most_bytes: int) -> bytes:
    """The body. Raises aiohttp.ClientPayloadError for a longer one."""
    body = bytearray()
    async for piece in response.content.iter_any():
        body += piece
        if len(body) > most_bytes:
            raise aiohttp.ClientPayloadError(f"it answers more than {most_bytes} bytes")
    return bytes(body)

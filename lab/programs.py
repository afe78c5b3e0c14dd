"""Programs that a lab starts: what they print, and how they end, each within a deadline."""

from __future__ import annotations

import asyncio

#: A server that was asked to end has ended by then.
STOP_SECONDS = 20.0


async def output(process: asyncio.subprocess.Process, seconds: float) -> tuple[bytes, bytes]:
    """What a program prints on stdout and stderr until it ends. Raises TimeoutError, and kills it then."""
    try:
        async with asyncio.timeout(seconds):
            said, complaint = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return said, complaint


async def stop(process: asyncio.subprocess.Process) -> None:
    """End a server, by force where it does not end by itself."""
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(STOP_SECONDS):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()

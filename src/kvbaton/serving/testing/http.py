"""Real HTTP servers on loopback, inside one test's event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from aiohttp import web

from kvbaton.serving.server.lifecycle import listen, port_of, reserve

_T = TypeVar("_T")
PATIENCE_SECONDS = 20.0


def run(test: Coroutine[Any, Any, _T]) -> _T:
    """Run one asynchronous test, within a bound."""

    async def bounded() -> _T:
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await test

    return asyncio.run(bounded())


@asynccontextmanager
async def serving(app: web.Application, *, port: int = 0) -> AsyncIterator[str]:
    """Serve ``app`` for the length of the block; gives its URL."""
    with reserve("127.0.0.1", port) as bound:
        runner = await listen(app, bound)
        try:
            yield f"http://127.0.0.1:{port_of(bound)}"
        finally:
            await runner.cleanup()

"""How every HTTP port of ours is served: no versions told, nothing decompressed, silent connections closed in time.

This file must not know routes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from kvbaton.discovery.connections import KEEPALIVE_SECONDS, Connections
from kvbaton.discovery.guard import Handler, hide_versions

#: How long cancelled handlers may take to end.
CLEANUP_SECONDS = 5.0


class _NoNoise(logging.Filter):
    """Bytes that are no HTTP cost the log nothing: anybody can send them, and each would be a traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


_http_log = logging.getLogger("kvbaton.http")
_http_log.addFilter(_NoNoise())


def make_runner(app: web.Application) -> web.AppRunner:
    """A runner that serves an application; ``cleanup()`` ends it."""
    hide_versions()
    runner = web.AppRunner(
        app,
        handler_cancellation=True,
        access_log=None,
        handle_signals=False,
        shutdown_timeout=CLEANUP_SECONDS,
        keepalive_timeout=KEEPALIVE_SECONDS,
        auto_decompress=False,
        logger=_http_log,
    )
    _watch(app, runner)
    return runner


def _watch(app: web.Application, runner: web.AppRunner) -> None:
    """Watch the connections of an application for as long as it runs."""
    connections = Connections()

    async def watch(http: web.Request, handler: Handler) -> web.StreamResponse:
        return await connections.watch(http, handler)

    async def sweeping(_app: web.Application) -> AsyncIterator[None]:
        sweeper = asyncio.create_task(
            connections.sweep_forever(lambda: runner.server.connections if runner.server is not None else ())
        )
        try:
            yield
        finally:
            sweeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sweeper

    app.middlewares.insert(0, web.middleware(watch))
    app.cleanup_ctx.append(sweeping)

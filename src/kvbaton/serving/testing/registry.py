"""A bootstrap registry with one prefill rank that nobody dials, so that a decode server finds a group."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from kvbaton.discovery.client import RegistryClient
from kvbaton.discovery.registry import Registry, Route
from kvbaton.discovery.server import registry_app
from kvbaton.serving.testing.http import serving

ADDRESS = "tcp://127.0.0.1:41000"


@asynccontextmanager
async def one_rank(name: str = "prefill", secret: str | None = None) -> AsyncIterator[tuple[RegistryClient, int]]:
    """A client for it, and its port at 127.0.0.1."""
    registry = Registry()
    registry.register(Route(instance=name, group=name, address=ADDRESS, layout_digest="", http_port=1), 0.0)
    async with AsyncExitStack() as closing:
        client = await closing.enter_async_context(RegistryClient(attempts=1, secret=secret))
        app = registry_app(registry, clock=lambda: 0.0, secret=secret)
        url = await closing.enter_async_context(serving(app))
        yield client, int(url.rpartition(":")[2])

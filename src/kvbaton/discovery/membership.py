"""The bootstrap registry for a rank without an event loop: a thread that serves it, registers there and asks it.

Rules:

- Only ``start`` and ``close`` wait, each for a bounded time. ``sources`` returns a future to be polled.
- A registry that cannot be reached is tried again for as long as the rank lives. What trying cannot cure (another
  secret, a place of the registry's own process) is logged, and raised by ``registered``; lookups go on.
- ``close`` withdraws the registration, so that nobody is sent here any more, and cancels lookups that are under way.

This file must not know managers, rooms' states or layouts.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from concurrent.futures import Future
from contextlib import suppress

from kvbaton.discovery.access import is_printable_host
from kvbaton.discovery.client import RegistryClient
from kvbaton.discovery.names import ServerNames
from kvbaton.discovery.registry import Registered, Registry, Route
from kvbaton.discovery.server import registry_app, start_registry
from kvbaton.errors import ConfigError, KVBatonError, LocalProtocolError, OverloadedError

#: How long ``start`` waits for the registry to listen, and ``close`` for the registration to be withdrawn.
START_SECONDS = 10.0
WITHDRAW_SECONDS = 2.0
#: Most lookups that are under way; each ends by the client's own deadlines.
MAX_LOOKUPS = 4096
_log = logging.getLogger(__name__)


def parse_registry(text: str) -> tuple[str, int]:
    """``HOST:PORT`` of a registry. Raises ConfigError."""
    host, _, port = text.rpartition(":")
    if not is_printable_host(host) or not (port.isascii() and port.isdecimal()) or not 0 < int(port) <= 65535:
        raise ConfigError(f"registry: {text!r} is not HOST:PORT, as in 10.0.0.1:8998")
    return host, int(port)


class Membership:
    """See the module. ``close`` is idempotent.

    Args:
        registry: ``HOST:PORT`` that is registered with, and asked by default.
        route: this rank, as others are to find it; None: it only asks.
        serve: run the registry here, at ``registry``.
        secret: the deployment's shared secret.
    """

    def __init__(
        self, registry: str, *, route: Route | None = None, serve: bool = False, secret: str | None = None
    ) -> None:
        self._home = parse_registry(registry)
        self._route = route
        self._serve = serve
        self._secret = secret
        self._listening: Future[None] = Future()
        self._registered = route is None
        self._refusal: KVBatonError | None = None
        self._slots = threading.BoundedSemaphore(MAX_LOOKUPS)
        self._loop = asyncio.new_event_loop()
        self._client = RegistryClient(secret=secret)
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="kvbaton-registry", daemon=True)

    def start(self) -> None:
        """Start the thread; with ``serve`` the registry listens when this returns. Raises ConfigError."""
        self._thread.start()
        self._listening.result(START_SECONDS)

    @property
    def registered(self) -> bool:
        """Whether the registry has accepted this rank. Raises what waiting cannot cure."""
        if self._refusal is not None:
            raise self._refusal.again()
        return self._registered

    def sources(self, room: int, *, registry: str = "", dp_rank: int | None = None) -> Future[tuple[str, ...]]:
        """Control addresses of the ranks that prefill ``room``; see :meth:`RegistryClient.sources`.

        The future raises RegistryError, AuthenticationError or ConfigError. Raises OverloadedError at once where
        :data:`MAX_LOOKUPS` are under way, LocalProtocolError unless this runs.
        """
        host, port = parse_registry(registry) if registry else self._home
        if not self._thread.is_alive() or self._stop.is_set():
            raise LocalProtocolError("the registry's client is not running: start the manager, or make a new one")
        if not self._slots.acquire(blocking=False):
            raise OverloadedError(f"{MAX_LOOKUPS} lookups are under way; try again later", room=room)
        asking = self._client.sources(host, port, room, named=dp_rank)
        try:
            found = asyncio.run_coroutine_threadsafe(asking, self._loop)
        except RuntimeError:  # the loop has ended just now
            asking.close()
            self._slots.release()
            raise LocalProtocolError("the registry's client is closed; make a new manager") from None
        found.add_done_callback(lambda _: self._slots.release())
        return found

    def close(self) -> None:
        """Withdraw, stop serving, end the thread."""
        if self._thread.is_alive():
            with suppress(RuntimeError):  # the loop has ended just now
                self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()
        elif self._thread.ident is None and not self._loop.is_closed():
            self._loop.close()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._live())

    async def _live(self) -> None:
        async with self._client:
            server = None
            try:
                if self._serve:
                    host, port = self._home
                    own = (self._route,) if self._route is not None else ()
                    app = registry_app(Registry(own=own), secret=self._secret, names=ServerNames.of(host))
                    server = await start_registry(app, host=host, port=port, secret=self._secret)
            except KVBatonError as error:
                self._listening.set_exception(error)
                return
            self._listening.set_result(None)
            staying = asyncio.create_task(self._stay())
            await self._stop.wait()
            staying.cancel()
            await asyncio.gather(staying, return_exceptions=True)
            if server is None:
                await self._withdraw()
            lookups = asyncio.all_tasks() - {asyncio.current_task()}
            for lookup in lookups:
                lookup.cancel()
            await asyncio.gather(*lookups, return_exceptions=True)
            if server is not None:
                await server.cleanup()

    async def _stay(self) -> None:
        """Be registered until cancelled."""
        if self._route is None:
            return
        if self._serve:  # the registry has known it from the start
            self._registered = True
            return

        def registered(_answer: Registered) -> None:
            self._registered = True

        try:
            await self._client.register_forever(*self._home, self._route, registered=registered)
        except KVBatonError as error:
            _log.error("this rank is not registered: %s", error)
            self._registered, self._refusal = False, error

    async def _withdraw(self) -> None:
        if self._route is not None and self._registered:
            with suppress(KVBatonError, TimeoutError):
                async with asyncio.timeout(WITHDRAW_SECONDS):
                    await self._client.unregister(*self._home, self._route.instance)

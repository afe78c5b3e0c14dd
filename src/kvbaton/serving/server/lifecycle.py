"""A server's life: reserve its port, listen, take requests until a signal, drain, stop.

Rules: SIGTERM and SIGINT end admission (``/ready`` turns 503, new requests are refused with Retry-After) and leave the
requests inside a grace period; what is still inside then is ended by its engine, or cancelled. A second signal ends the
grace period. The port stays open while draining, so that probes and metrics answer to the end.

This file must not know of engines or routes.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import signal
import socket
from collections.abc import Callable

from aiohttp import web

from kvbaton.discovery.connections import raise_file_limit
from kvbaton.discovery.listening import make_runner
from kvbaton.discovery.names import plain
from kvbaton.errors import ConfigError
from kvbaton.serving.server.admission import AdmissionLimit
from kvbaton.serving.server.loop_errors import LoopErrors

#: Connections that wait to be accepted.
BACKLOG = 1024
#: New connections that one turn of the loop takes: those that are served already come in between. A new one with its
#: request is about 0.2 ms.
ACCEPTED_AT_ONCE = 4
SIGNALS = (signal.SIGTERM, signal.SIGINT)
_log = logging.getLogger(__name__)


def reserve(host: str, port: int, *, flag: str = "--port") -> socket.socket:
    """Bind, but do not listen: fails before a model is loaded, and nobody connects to a server that is not there yet.

    Raises ConfigError.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(plain(host), port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"cannot listen at {host}:{port}: {error.strerror or error}") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _cannot_listen(host, port, error, flag) from None
    return bound


def port_of(bound: socket.socket) -> int:
    """The port that a reserved socket has: the system's choice where 0 was asked for."""
    return int(bound.getsockname()[1])


async def listen(app: web.Application, bound: socket.socket, *, flag: str = "--port") -> web.AppRunner:
    """Start answering on a reserved socket. ``cleanup()`` of the runner ends it. Raises ConfigError."""
    raise_file_limit()
    asyncio.get_running_loop().set_exception_handler(LoopErrors())
    runner = make_runner(app)
    await runner.setup()
    host, port = bound.getsockname()[:2]
    try:
        await web.SockSite(runner, bound, backlog=ACCEPTED_AT_ONCE).start()
        bound.listen(BACKLOG)  # asyncio takes one number for both
    except OSError as error:
        await runner.cleanup()
        raise _cannot_listen(host, port, error, flag) from None
    return runner


def keep_what_is_loaded() -> None:
    """Let the garbage collector look at nothing that is in memory now, in this process and those that it forks.

    Libraries and a model are some 400,000 objects, for which one full collection stops every thread for a quarter of a
    second, driver and event loop included; a flood of connections or rooms brings one about.
    """
    gc.collect()
    gc.freeze()


class Signals:
    """SIGTERM and SIGINT as events of this loop. Use as a context manager."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()

    def __enter__(self) -> Signals:
        for number in SIGNALS:
            self._loop.add_signal_handler(number, self._received)
        return self

    def __exit__(self, *_: object) -> None:
        for number in SIGNALS:
            self._loop.remove_signal_handler(number)

    def _received(self) -> None:
        if self.stop.is_set():
            self.hurry.set()
        self.stop.set()


async def drain(admission: AdmissionLimit, *, grace_period_secs: float, hurry: asyncio.Event) -> bool:
    """End admission and wait until no request is in flight. False if requests were left when the grace period ended."""
    admission.shut()
    if admission.in_flight:
        _log.info("stopping; %d requests have %g s to finish", admission.in_flight, grace_period_secs)
    emptied = asyncio.create_task(admission.emptied(grace_period_secs))
    hurried = asyncio.create_task(hurry.wait())
    await asyncio.wait({emptied, hurried}, return_when=asyncio.FIRST_COMPLETED)
    for task in (emptied, hurried):
        task.cancel()
    await asyncio.gather(emptied, hurried, return_exceptions=True)
    if admission.in_flight:
        _log.warning("the grace period is over; %d requests are ended", admission.in_flight)
    return admission.in_flight == 0


async def run(
    app: web.Application,
    admission: AdmissionLimit,
    bound: socket.socket,
    *,
    grace_period_secs: float,
    listening: Callable[[int], None] = lambda _port: None,
) -> None:
    """Serve one application until a signal, then drain. ``listening`` is told the port."""
    with Signals() as signals:
        runner = await listen(app, bound)
        try:
            listening(port_of(bound))
            await signals.stop.wait()
            await drain(admission, grace_period_secs=grace_period_secs, hurry=signals.hurry)
        finally:
            await runner.cleanup()


def _cannot_listen(host: str, port: int, error: OSError, flag: str) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(
            f"port {port} at {host} is in use", hint=f"stop what listens there, or choose another {flag}"
        )
    return ConfigError(f"cannot listen at {host}:{port}: {error.strerror or error}")

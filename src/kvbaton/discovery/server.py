"""The registry over HTTP: ``PUT /route``, ``GET /route``, ``DELETE /route?instance=&key=``, ``GET /dp_rank?room=``,
``GET /health``.

Rules:

- JSON in, JSON out; a registration is at most :data:`MAX_ROUTE_BYTES`.
- With a secret, looking up and registering are two doors (:mod:`kvbaton.discovery.doors`).
- Without a secret the server may listen on loopback only (:func:`start_registry` refuses anything else), and takes no
  request that does not name this machine.
- An answer that is no success carries ``{"error": {"code", "message"}}``: 400 wrong registration, 401 wrong secret
  or host, 409 a place of the serving process's own ranks, 503 a place that is held, a group that is not complete, or a
  full table.

This file must not know ranks' layouts, or anything of the table but its methods.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

from aiohttp import web

from kvbaton.discovery.access import require_secret
from kvbaton.discovery.doors import HEALTH_PATH, body_of, doors
from kvbaton.discovery.guard import Handler, guard
from kvbaton.discovery.json_response import json_response
from kvbaton.discovery.listening import make_runner
from kvbaton.discovery.names import ServerNames
from kvbaton.discovery.placement import Placements
from kvbaton.discovery.registry import Registry, RoomRank, decode_registration
from kvbaton.errors import (
    AuthenticationError,
    ConfigError,
    KVBatonError,
    LocalProtocolError,
    OverloadedError,
    RegistryError,
)

DEFAULT_PORT = 8998
#: Largest registration in bytes.
MAX_ROUTE_BYTES = 16 << 10
MAX_ROOM_DIGITS = 20
#: Seconds that a client is asked to wait while the group is not complete.
RETRY_AFTER_SECONDS = 1

Middleware = Callable[[web.Request, Handler], Awaitable[web.StreamResponse]]

_STATUS: tuple[tuple[type[KVBatonError], int], ...] = (
    (ConfigError, 400),
    (AuthenticationError, 401),
    (LocalProtocolError, 409),
    (OverloadedError, 503),
    (RegistryError, 503),
)


def registry_app(
    registry: Registry,
    placements: Placements | None = None,
    *,
    secret: str | None = None,
    names: ServerNames | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> web.Application:
    """The aiohttp application around one table.

    ``placements``: where the group's rooms are, for those who ask. ``names``: the hosts under which the registry is
    asked, besides the address where a connection arrives; None: loopback's.
    """
    placed = placements if placements is not None else Placements()
    names = names if names is not None else ServerNames()

    async def register(request: web.Request) -> web.Response:
        registration = decode_registration(await body_of(request))
        return json_response(registry.register(registration.route, clock(), lock=registration.lock))

    async def lookup(_request: web.Request) -> web.Response:
        return json_response(registry.lookup(clock()))

    async def dp_rank(request: web.Request) -> web.Response:
        room = request.query.get("room", "")
        if not (room.isascii() and room.isdecimal() and len(room) <= MAX_ROOM_DIGITS):
            raise ConfigError("room: name the room, as in GET /dp_rank?room=7")
        return json_response(RoomRank(dp_rank=placed.find(int(room), clock())))

    async def unregister(request: web.Request) -> web.Response:
        instance = request.query.get("instance", "")
        if not instance:
            raise ConfigError("instance: name the instance to take out, as in DELETE /route?instance=ID&key=KEY")
        return json_response({"removed": registry.unregister(instance, clock(), key=request.query.get("key", ""))})

    async def health(_request: web.Request) -> web.Response:
        return json_response({"status": "ok"})

    app = web.Application(
        middlewares=[web.middleware(_errors), web.middleware(guard(names)), *_doors(secret, names, clock)],
        client_max_size=MAX_ROUTE_BYTES,
    )
    app.router.add_put("/route", register)
    app.router.add_get("/route", lookup)
    app.router.add_delete("/route", unregister)
    app.router.add_get("/dp_rank", dp_rank)
    app.router.add_get(HEALTH_PATH, health)
    return app


def middlewares(secret: str, names: ServerNames) -> list[Middleware]:
    """For the application of somebody else that is asked, and registered at, as a registry is."""
    return [web.middleware(_errors), *_doors(secret, names, time.monotonic)]


async def start_registry(app: web.Application, *, host: str, port: int, secret: str | None = None) -> web.AppRunner:
    """Listen. Raises ConfigError for an open bind without a secret and for a port in use; ``cleanup()`` ends it."""
    require_secret(host, secret, what="the bootstrap registry")
    runner = make_runner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        await runner.cleanup()
        raise ConfigError(
            f"the bootstrap registry cannot listen at {host}:{port}: {error.strerror or error}",
            hint="choose another --disaggregation-bootstrap-port",
        ) from None
    return runner


def _doors(secret: str | None, names: ServerNames, clock: Callable[[], float]) -> list[Middleware]:
    return [] if secret is None else [web.middleware(doors(secret, names, clock=clock))]


async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """A middleware's function: errors as JSON, with their status."""
    try:
        return await handler(request)
    except KVBatonError as error:
        status = next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
        return _failure(status, error.code, str(error))
    except web.HTTPException as error:
        response = _failure(error.status, "http", f"{request.method} {request.path}: {error.reason}")
        if "Allow" in error.headers:  # RFC 9110: a 405 says what would be allowed
            response.headers["Allow"] = error.headers["Allow"]
        return response


def _failure(status: int, code: str, message: str) -> web.Response:
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if status == 503 else {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return json_response({"error": {"code": code, "message": message}}, status=status, headers=headers)

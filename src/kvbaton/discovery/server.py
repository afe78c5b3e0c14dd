"""The registry over HTTP: ``PUT /route``, ``GET /route``, ``DELETE /route?instance=``, ``GET /dp_rank?room=``,
``GET /health``.

Rules:

- JSON in, JSON out; a registration is at most :data:`MAX_ROUTE_BYTES`.
- With a secret, looking up needs a token that was made for looking up at this host and port, or the secret itself;
  registering and withdrawing need a token for that and a code over the whole registration. The answer to a look-up
  carries a code, too, over itself and what the question asks it to repeat: who does not know the secret answers nobody.
- Without a secret the server may listen on loopback only (:func:`start_registry` refuses anything else), and takes no
  request that does not name this machine.
- An answer that is no success carries ``{"error": {"code", "message"}}``: 400 wrong registration, 401 wrong secret
  or host, 409 a place of the serving process's own ranks, 503 a place that is held, a group that is not complete, or a
  full table.

This file must not know ranks' layouts, or anything of the table but its methods.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from aiohttp import web

from kvbaton.discovery.access import (
    MAC_HEADER,
    MAX_NONCE_CHARACTERS,
    NONCE_HEADER,
    bearer_matches,
    is_secret,
    mac_matches,
    mac_of,
    require_secret,
)
from kvbaton.discovery.guard import Handler, guard, hide_versions
from kvbaton.discovery.json_response import json_response
from kvbaton.discovery.names import ALLOWED_HOST_FLAG, ServerNames, audience_of, split
from kvbaton.discovery.placement import Placements
from kvbaton.discovery.registry import Registry, RoomRank, decode_route
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
#: A registration has arrived by then.
BODY_SECONDS = 10.0
MAX_ROOM_DIGITS = 20
#: Seconds that a client is asked to wait while the group is not complete.
RETRY_AFTER_SECONDS = 1

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
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await request.read()
        except TimeoutError:
            raise web.HTTPRequestTimeout() from None
        _check_mac(request, secret, body)
        return json_response(registry.register(decode_route(body), clock()))

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
            raise ConfigError("instance: name the instance to take out, as in DELETE /route?instance=ID")
        _check_mac(request, secret, instance.encode())
        return json_response({"removed": registry.unregister(instance, clock())})

    async def health(_request: web.Request) -> web.Response:
        return json_response({"status": "ok"})

    app = web.Application(
        middlewares=[
            web.middleware(_errors),
            web.middleware(guard(names)),
            web.middleware(_authenticate(secret, names)),
        ],
        client_max_size=MAX_ROUTE_BYTES,
    )
    app.router.add_put("/route", register)
    app.router.add_get("/route", lookup)
    app.router.add_delete("/route", unregister)
    app.router.add_get("/dp_rank", dp_rank)
    app.router.add_get("/health", health)
    return app


async def start_registry(app: web.Application, *, host: str, port: int, secret: str | None = None) -> web.AppRunner:
    """Listen. Raises ConfigError for an open bind without a secret and for a port in use; ``cleanup()`` ends it."""
    require_secret(host, secret, what="the bootstrap registry")
    hide_versions()
    runner = web.AppRunner(app, access_log=None)
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


def doors(secret: str, names: ServerNames) -> tuple[Callable[..., Awaitable[web.StreamResponse]], ...]:
    """Middlewares for the application of somebody else that is asked, and registered at, as a registry is."""

    async def unchanged(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.method not in ("GET", "HEAD"):
            _check_mac(request, secret, await request.read())
        return await handler(request)

    return web.middleware(_errors), web.middleware(_authenticate(secret, names)), web.middleware(unchanged)


def _authenticate(secret: str | None, names: ServerNames) -> Callable[..., Awaitable[web.StreamResponse]]:
    async def authenticate(request: web.Request, handler: Handler) -> web.StreamResponse:
        if secret is None or request.path == "/health":
            return await handler(request)
        _check_token(request, secret, names)
        response = await handler(request)
        nonce = request.headers.get(NONCE_HEADER, "")
        if 0 < len(nonce) <= MAX_NONCE_CHARACTERS and isinstance(response, web.Response):
            parts = (_audience(request), request.path_qs, nonce)
            response.headers[MAC_HEADER] = mac_of(
                secret, "answer", *(part.encode() for part in parts), bytes(response.body or b"")
            )
        return response

    return authenticate


def _check_token(request: web.Request, secret: str, names: ServerNames) -> None:
    """Raises AuthenticationError unless the one who asks may look up, or register."""
    header, audience = request.headers.get("Authorization"), _audience(request)
    asks = request.method in ("GET", "HEAD")
    if asks and is_secret(header, secret):
        return
    if is_secret(header, secret) or not bearer_matches(header, secret, "look-up" if asks else "register", audience):
        raise AuthenticationError(
            "the registry needs this deployment's shared secret as a bearer token"
            if header is None
            else "the bearer token is not this deployment's shared secret, or is for something else"
        )
    transport = request.transport
    arrived_at = transport.get_extra_info("sockname") if transport is not None else None
    if not (arrived_at and names.is_audience(audience, arrived_at)):
        raise AuthenticationError(
            f"this registry is not {audience[:100]}, which the token is for; where it is reached under another name, "
            f"start its server with {ALLOWED_HOST_FLAG} HOST:PORT"
        )


def _check_mac(request: web.Request, secret: str | None, content: bytes) -> None:
    """Raises AuthenticationError unless the registration, or withdrawal, is as the one who knows the secret made it."""
    if secret is not None and not mac_matches(
        request.headers.get(MAC_HEADER),
        secret,
        "registration",
        _audience(request).encode(),
        request.method.encode(),
        content,
    ):
        raise AuthenticationError("the registration was changed on its way, or made by somebody without the secret")


def _audience(request: web.Request) -> str:
    return audience_of(*split(request.headers.get("Host", "")))


async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
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

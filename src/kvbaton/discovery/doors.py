"""What a registry asks of those who look up and of those who register, where there is a shared secret.

Rules:

- Looking up (GET) needs a token that was made for looking up at this host and port, or the secret itself.
- Everything else needs a token for registering there, and a code that is right and new
  (:mod:`kvbaton.discovery.proof`).
- An answer carries a code, too: who does not know the secret answers nobody.
- A token is looked at before a byte of the body.

:func:`doors` goes before our own registry and before that of somebody else (SGLang's).

This file must not know what is registered.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from aiohttp import web

from kvbaton.discovery.access import bearer_matches, is_secret
from kvbaton.discovery.freshness import Freshness
from kvbaton.discovery.guard import Handler, audience, is_for_us
from kvbaton.discovery.json_response import json_response
from kvbaton.discovery.names import ALLOWED_HOST_FLAG, ServerNames
from kvbaton.discovery.proof import (
    MAC_HEADER,
    MAX_NONCE_CHARACTERS,
    NONCE_HEADER,
    TIME_HEADER,
    TIME_PATH,
    answer_code,
    is_code,
    message_code,
)
from kvbaton.errors import AuthenticationError

#: Open to everybody: probes ask it.
HEALTH_PATH = "/health"
#: A registration has arrived by then.
BODY_SECONDS = 10.0


def doors(
    secret: str, names: ServerNames, *, clock: Callable[[], float] = time.monotonic
) -> Callable[[web.Request, Handler], Awaitable[web.StreamResponse]]:
    """A middleware's function. It raises AuthenticationError (token, code, host), RegistryError (a message that is not
    new) and OverloadedError."""
    freshness = Freshness(clock)

    async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path == HEALTH_PATH:
            return await handler(request)
        asks = request.method in ("GET", "HEAD")
        _check_token(request, secret, names, asks=asks)
        if not asks:
            freshness.take(*await _signed(request, secret))
        if asks and request.path == TIME_PATH:
            response: web.StreamResponse = json_response({"time": freshness.now()})
        else:
            response = await handler(request)
        return _proven(request, response, secret)

    return guarded


async def body_of(request: web.Request) -> bytes:
    """The whole body. Raises HTTPRequestTimeout."""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            body: bytes = await request.read()
            return body
    except TimeoutError:
        raise web.HTTPRequestTimeout() from None


def _check_token(request: web.Request, secret: str, names: ServerNames, *, asks: bool) -> None:
    """Raises AuthenticationError unless the one who asks may look up, or register."""
    header, place = request.headers.get("Authorization"), audience(request)
    if asks and is_secret(header, secret):
        return
    if is_secret(header, secret) or not bearer_matches(header, secret, "look-up" if asks else "register", place):
        raise AuthenticationError(
            "the registry needs this deployment's shared secret as a bearer token"
            if header is None
            else "the bearer token is not this deployment's shared secret, or is for something else"
        )
    if not is_for_us(request, names):
        raise AuthenticationError(
            f"this registry is not {place[:100]}, which the token is for; where it is reached under another name, "
            f"start its server with {ALLOWED_HOST_FLAG} HOST:PORT"
        )


async def _signed(request: web.Request, secret: str) -> tuple[str, str]:
    """The time that a message names, and its code. Raises AuthenticationError unless the code is right."""
    told, nonce = request.headers.get(TIME_HEADER, ""), request.headers.get(NONCE_HEADER, "")
    code = message_code(secret, audience(request), nonce, told, request.method, request.path_qs, await body_of(request))
    if not is_code(request.headers.get(MAC_HEADER), code):
        raise AuthenticationError("the registration was changed on its way, or made by somebody without the secret")
    return told, code


def _proven(request: web.Request, response: web.StreamResponse, secret: str) -> web.StreamResponse:
    """The answer, with its code where the question has a nonce."""
    nonce = request.headers.get(NONCE_HEADER, "")
    if 0 < len(nonce) <= MAX_NONCE_CHARACTERS and isinstance(response, web.Response):
        response.headers[MAC_HEADER] = answer_code(
            secret, audience(request), nonce, request.path_qs, bytes(response.body or b"")
        )
    return response

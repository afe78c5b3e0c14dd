"""Errors as HTTP: one table from the error tree to status codes, and the OpenAI error body.

Rules: 4xx is the client's doing, 429 and 503 (with Retry-After) may be cured by waiting, 504 is a deadline, 499 says
that the request was aborted, 502 that the other side said or wrote what must not be, 500 is a bug of ours. What is no
KVBatonError becomes one here and nowhere else.

This file must not know of engines, workers or routes.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import web

from kvbaton.errors import (
    AbortedError,
    AuthenticationError,
    ConfigError,
    DisconnectedError,
    ExpiredError,
    IncompatibleError,
    InternalError,
    KVBatonError,
    LocalProtocolError,
    OverloadedError,
    PeerLostError,
    RegistryError,
    RemoteProtocolError,
    TransferFailedError,
    TransportError,
    UnknownModelError,
)
from kvbaton.serving.engine.request import HandedOnError
from kvbaton.serving.server.openai import ErrorBody, ErrorDetail, param_of

#: Seconds that a client is asked to wait before it tries again.
RETRY_AFTER_SECONDS = 1
#: The client, or an operator, ended the request (nginx's number for it).
CLIENT_CLOSED_REQUEST = 499

#: Code of a refusal by a server that is about to stop: nothing of the request was started, another server may try.
DRAINING = "draining"
#: Statuses that say when to try again.
TRY_AGAIN = (429, 503)


class DrainingError(OverloadedError):
    """This server is about to stop and takes no new requests."""

    code = DRAINING


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_log = logging.getLogger(__name__)
#: First match wins, so leaves come before their roots.
_TABLE: tuple[tuple[type[KVBatonError], int, str], ...] = (
    (UnknownModelError, 404, "invalid_request_error"),
    (ConfigError, 400, "invalid_request_error"),
    (AuthenticationError, 401, "authentication_error"),
    (LocalProtocolError, 409, "conflict_error"),  # a room or a request id that is live already
    (AbortedError, CLIENT_CLOSED_REQUEST, "aborted_error"),
    (RemoteProtocolError, 502, "bad_gateway_error"),
    (ExpiredError, 504, "timeout_error"),
    (TransferFailedError, 503, "service_unavailable_error"),
    (PeerLostError, 503, "service_unavailable_error"),
    (DisconnectedError, 503, "service_unavailable_error"),
    (TransportError, 503, "service_unavailable_error"),
    (RegistryError, 503, "service_unavailable_error"),
    (DrainingError, 503, "service_unavailable_error"),
    (HandedOnError, 503, "service_unavailable_error"),
    (OverloadedError, 429, "rate_limit_error"),
    (IncompatibleError, 503, "service_unavailable_error"),
)


def status_of(error: KVBatonError) -> int:
    return _row(error)[0]


def body_of(error: KVBatonError) -> ErrorBody:
    """The OpenAI error body; ``param`` is the field that a client's mistake is in, where the message names one."""
    status, kind = _row(error)
    param = param_of(error.message) if status in (400, 404) else None
    return ErrorBody(ErrorDetail(message=str(error), type=kind, code=error.code, param=param))


def response_of(error: KVBatonError) -> web.Response:
    status = status_of(error)
    reason = "Client Closed Request" if status == CLIENT_CLOSED_REQUEST else None
    return _response(status, body_of(error), reason=reason)


async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Middleware: every failure before the first byte leaves as an OpenAI error with its status."""
    try:
        return await handler(request)
    except KVBatonError as error:
        return response_of(error)
    except web.HTTPException as error:
        message = f"{request.method} {request.path}: {error.reason}"
        response = _response(error.status, ErrorBody(ErrorDetail(message=message, type="http_error", code="http")))
        if "Allow" in error.headers:  # RFC 9110: a 405 says what would be allowed
            response.headers["Allow"] = error.headers["Allow"]
        return response
    except ConnectionError:  # a write found the client gone; nobody reads this, and aiohttp takes it without a word
        return response_of(AbortedError("the client has gone"))
    except Exception:  # noqa: BLE001 - the top of a handler: a bug must end one request and be told to its client
        _log.exception("%s %s failed", request.method, request.path)
        return response_of(InternalError("the server failed on this request; its log says where"))


def _row(error: KVBatonError) -> tuple[int, str]:
    return next(((status, kind) for cls, status, kind in _TABLE if isinstance(error, cls)), (500, "internal_error"))


def _response(status: int, body: ErrorBody, *, reason: str | None = None) -> web.Response:
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if status in TRY_AGAIN else {}
    return web.Response(
        status=status,
        reason=reason,
        body=msgspec.json.encode(body),
        headers=headers,
        content_type="application/json",
    )

"""What every HTTP port asks of a request before it looks at it.

It names this server, no other site's page has sent it, unless the operator lets that site in, and its body is said to
be JSON: a browser sends that to another site only when it is allowed to. So it asks first (CORS); what it then needs to
read the answer is :func:`read_across`'s.

This file must not know routes or secrets.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

from aiohttp import web, web_response

from kvbaton.discovery.names import ServerNames, audience_of, split

JSON = "application/json"
#: All that the ``Server`` header says: no versions of anything.
SERVER = "kvbaton"

#: Of an answer's headers, those that a page of another site may read.
EXPOSED = "X-Request-Id, X-KVBaton-Room, Retry-After"
ASKS_METHOD = "Access-Control-Request-Method"
#: How long a browser need not ask again.
REMEMBERED_SECONDS = 600
_HEADER_NAMES = re.compile(r"[A-Za-z0-9, -]{1,1024}")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def guard(names: ServerNames) -> Callable[[web.Request, Handler], Awaitable[web.StreamResponse]]:
    """A middleware's function. It raises AuthenticationError (host, origin) and HTTPUnsupportedMediaType (body), and
    answers a browser that asks whether it may send what another site's page wants it to."""

    async def guarded(http: web.Request, handler: Handler) -> web.StreamResponse:
        names.check(http.headers.get("Host"), http.headers.get("Origin"), here=_arrived_at(http)[0])
        if http.method == "OPTIONS" and ASKS_METHOD in http.headers and _admitted(http, names):
            return _may_send(http)
        is_routed = http.match_info.http_exception is None
        if is_routed and http.method in ("POST", "PUT", "PATCH") and http.content_type != JSON:
            raise web.HTTPUnsupportedMediaType(reason=f"The body must be {JSON}, and its Content-Type say so")
        return await handler(http)

    return guarded


def audience(http: web.Request) -> str:
    """``HOST:PORT`` that a request is for, by its ``Host``, as tokens are made for it."""
    return audience_of(*split(http.headers.get("Host", "")))


def is_for_us(http: web.Request, names: ServerNames) -> bool:
    """Whether :func:`audience` is this server."""
    return names.is_audience(audience(http), _arrived_at(http))


def _arrived_at(http: web.Request) -> tuple[str, int]:
    """Host and port of this server, at which a connection has arrived."""
    address = http.transport.get_extra_info("sockname") if http.transport is not None else None
    return (str(address[0]), int(address[1])) if address else ("", 0)


def read_across(names: ServerNames) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    """A signal's function, ``app.on_response_prepare``: pages of the sites that are let in may read every answer."""

    async def tell(http: web.Request, response: web.StreamResponse) -> None:
        if names.origins:
            response.headers.add("Vary", "Origin")
        if _admitted(http, names):
            response.headers["Access-Control-Allow-Origin"] = http.headers["Origin"]
            response.headers["Access-Control-Expose-Headers"] = EXPOSED

    return tell


def _admitted(http: web.Request, names: ServerNames) -> bool:
    origin = http.headers.get("Origin")
    return origin is not None and names.admits(origin)


def _may_send(http: web.Request) -> web.Response:
    """Headers are the client's business: none of ours trusts one that a page can set without knowing a secret."""
    headers = {"Access-Control-Allow-Methods": "GET, POST, OPTIONS", "Access-Control-Max-Age": str(REMEMBERED_SECONDS)}
    asked = http.headers.get("Access-Control-Request-Headers", "")
    if _HEADER_NAMES.fullmatch(asked):
        headers["Access-Control-Allow-Headers"] = asked
    return web.Response(status=204, headers=headers)


def hide_versions() -> None:
    """Let no answer name the versions of Python and aiohttp, those to what is no HTTP included."""
    web_response.SERVER_SOFTWARE = SERVER

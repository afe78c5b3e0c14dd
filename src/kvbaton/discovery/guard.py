"""What every HTTP port asks of a request before it looks at it.

It names this server, no other site's page has sent it, and its body is said to be JSON: a browser sends that to another
site only when it is allowed to.

This file must not know routes or secrets.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web, web_response

from kvbaton.discovery.names import ServerNames, audience_of, split

JSON = "application/json"
#: All that the ``Server`` header says: no versions of anything.
SERVER = "kvbaton"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def guard(names: ServerNames) -> Callable[[web.Request, Handler], Awaitable[web.StreamResponse]]:
    """A middleware's function. It raises AuthenticationError (host, origin) and HTTPUnsupportedMediaType (body)."""

    async def guarded(http: web.Request, handler: Handler) -> web.StreamResponse:
        names.check(http.headers.get("Host"), http.headers.get("Origin"), here=_arrived_at(http)[0])
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


def hide_versions() -> None:
    """Let no answer name the versions of Python and aiohttp, those to what is no HTTP included."""
    web_response.SERVER_SOFTWARE = SERVER

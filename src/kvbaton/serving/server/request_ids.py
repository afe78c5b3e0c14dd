"""``X-Request-Id``: by what a client, or a proxy in front of it, finds its request again; every answer has one.

Rules: what the client calls it comes back; without a name that may stand in a header and a log, the server gives one.
It is for people: requests are ended by their ``rid``.

This file must not know routes.
"""

from __future__ import annotations

import re
import uuid

from aiohttp import web

HEADER = "X-Request-Id"
_NAME = re.compile(r"[!-~]{1,128}")
_KEY = web.RequestKey("request_id", str)


def request_id_of(http: web.Request) -> str:
    """The same at each call."""
    known = http.get(_KEY)
    if known is not None:
        return str(known)
    given = http.headers.get(HEADER, "")
    http[_KEY] = name = given if _NAME.fullmatch(given) else uuid.uuid4().hex
    return name


async def tell_request_id(http: web.Request, response: web.StreamResponse) -> None:
    """A signal's function: ``app.on_response_prepare``."""
    response.headers[HEADER] = request_id_of(http)

"""A room's story over HTTP: ``GET /story/{room}``, one side on a server, both sides on the router.

Rules: a story names peers, addresses and sizes, so it is for operators: with a secret it needs the secret as a bearer
token, without one it is told to this machine only. Ages cross the wire, clocks never do.

This file must not know engines, legs or the protocol.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from aiohttp import web
from msgspec import Struct

from kvbaton.discovery.names import ServerNames
from kvbaton.errors import ConfigError
from kvbaton.manager import MAX_ROOM
from kvbaton.serving.server.operators import require_operator

PATH = "/story/{room}"


class StoryLine(Struct, frozen=True):
    """One event, or (age 0, "now ...") what is awaited."""

    seconds_ago: float
    text: str


class Side(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one server says of a room. ``error``: why it says nothing."""

    role: str
    url: str = ""
    instance: str = ""
    lines: tuple[StoryLine, ...] = ()
    error: str = ""


class RoomStory(Struct, frozen=True, kw_only=True):
    """Everything that is known of a room."""

    room: int
    sides: tuple[Side, ...]


def room_of(http: web.Request, secret: str | None, names: ServerNames) -> int:
    """The room that an operator asks for. Raises AuthenticationError, ConfigError."""
    require_operator(http, secret, names, what="a room's story")
    text = http.match_info["room"]
    if not (text.isascii() and text.isdecimal() and len(text) <= 19 and int(text) <= MAX_ROOM):
        raise ConfigError(f"room: {text[:40]!r} is not a room (0 to 2^63-1)")
    return int(text)


def response(room: int, sides: Sequence[Side]) -> web.Response:
    """The story; 404 where nobody has heard of the room."""
    known = any(side.lines for side in sides)
    body = msgspec.json.encode(RoomStory(room=room, sides=tuple(sides)))
    return web.Response(status=200 if known else 404, body=body, content_type="application/json")

"""``kvbaton story ROOM``: one room's timeline, both sides merged, and what each side waits for now."""

from __future__ import annotations

import argparse
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from kvbaton.discovery.access import bearer, read_secret
from kvbaton.discovery.names import audience_of_url
from kvbaton.errors import AuthenticationError, ConfigError, PeerLostError

if TYPE_CHECKING:
    from kvbaton.serving.server.story import Side

TIMEOUT_SECONDS = 10.0
MAX_ANSWER_BYTES = 4 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("room", type=int, metavar="ROOM", help="the router tells it in the header X-KVBaton-Room")
    parser.add_argument(
        "--url", action="append", metavar="URL", help="a router, or a prefill and a decode server; repeatable"
    )
    parser.add_argument(
        "--secret-file", type=Path, default=None, help="shared secret; needed where the servers have one"
    )
    parser.add_argument("--json", action="store_true", help="data on stdout instead of lines")


def run(options: argparse.Namespace) -> int:
    if not options.url:
        raise ConfigError("--url is needed: a router, or each half of the pair")
    secret = read_secret(options.secret_file) if options.secret_file is not None else None
    sides = [side for url in options.url for side in fetch(url.rstrip("/"), options.room, secret)]
    if options.json:
        body = {"room": options.room, "sides": sides}
        sys.stdout.write(msgspec.json.encode(body).decode() + "\n")
    else:
        print("\n".join(render(options.room, sides)))
    return 0 if any(side.lines for side in sides) else 1


def fetch(url: str, room: int, secret: str | None) -> Sequence[Side]:
    """What a server or a router says of a room. Raises ConfigError, AuthenticationError, PeerLostError."""
    try:
        from kvbaton.serving.server.story import RoomStory
    except ModuleNotFoundError as error:
        raise ConfigError(f"a story needs the package {error.name!r}", hint="pip install 'kvbaton[serve]'") from None
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--url {url!r} is not a URL like http://127.0.0.1:8000")
    headers = dict(bearer(secret, "story", audience_of_url(url)))
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"{url}/story/{room}", headers=headers), timeout=TIMEOUT_SECONDS
        ) as response:
            payload = response.read(MAX_ANSWER_BYTES)
    except urllib.error.HTTPError as error:
        payload = error.read(MAX_ANSWER_BYTES)
        if error.code == 401:
            raise AuthenticationError(f"{url} refuses: {_message(payload)}", hint="pass --secret-file") from None
        if error.code != 404:
            raise PeerLostError(f"{url} answers HTTP {error.code}: {_message(payload)}") from None
    except OSError as error:
        raise PeerLostError(f"{url} does not answer: {getattr(error, 'reason', None) or error}") from None
    try:
        story = msgspec.json.decode(payload, type=RoomStory)
    except msgspec.MsgspecError as error:
        raise PeerLostError(f"{url} does not answer as a kvbaton server does: {error}") from None
    return [msgspec.structs.replace(side, url=side.url or url) for side in story.sides]


def _message(payload: bytes) -> str:
    try:
        return str(msgspec.json.decode(payload)["error"]["message"])
    except (msgspec.MsgspecError, KeyError, TypeError):
        return payload[:200].decode(errors="replace")


def render(room: int, sides: Sequence[Side]) -> list[str]:
    """Lines for a person: who speaks, then all lines by age, then what is awaited."""
    lines = [f"room {room}"]
    lines += [f"  {side.role:<8} {side.url} {side.error or side.instance}" for side in sides]
    events = [(line, side.role) for side in sides for line in side.lines]
    if not events:
        return [*lines, "nobody has heard of this room, or it is forgotten"]
    past = [(line, role) for line, role in events if line.seconds_ago > 0]
    now = [(line, role) for line, role in events if line.seconds_ago <= 0]
    for line, role in sorted(past, key=lambda item: -item[0].seconds_ago):
        lines.append(f"{-line.seconds_ago:12.6f} s  {role:<8} {line.text}")
    lines += [f"{'now':>12}    {role:<8} {line.text.removeprefix('now ')}" for line, role in now]
    if not now:
        lines.append(f"{'now':>12}    over: neither side holds or awaits anything")
    return lines

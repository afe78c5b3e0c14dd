"""Who may ask a server about its insides: holders of the shared secret; without one, this machine only. And who may
name rooms there: the deployment's router."""

from __future__ import annotations

from aiohttp import web

from kvbaton.discovery.access import (
    ROUTER_HEADER,
    bearer_matches,
    is_local_name,
    is_loopback,
    is_secret,
    token_matches,
)
from kvbaton.discovery.guard import audience, is_for_us
from kvbaton.discovery.names import ALLOWED_HOST_FLAG, ServerNames
from kvbaton.errors import AuthenticationError

#: What is said beside a refusal where tokens are made for a name that this server does not know as its own.
OTHER_NAME = f"; where it is reached under another name than it listens at, start it with {ALLOWED_HOST_FLAG} HOST:PORT"


def is_operator(http: web.Request, secret: str | None, names: ServerNames) -> bool:
    """Whether the sender has shown that it knows the shared secret, or a token for this server by one of its
    ``names``; nobody has where there is no secret."""
    if secret is None:
        return False
    header = http.headers.get("Authorization")
    if not is_for_us(http, names):
        return is_secret(header, secret)
    return bearer_matches(header, secret, "story", audience(http))


def is_router(http: web.Request, secret: str | None, names: ServerNames) -> bool:
    """Whether the sender is the deployment's router, likewise; everybody may be where there is no secret, on
    loopback."""
    if secret is None:
        return True
    shown = http.headers.get(ROUTER_HEADER)
    if not is_for_us(http, names):
        return is_secret(f"Bearer {shown}", secret)
    return token_matches(shown, secret, "router", audience(http))


def key_of_client(http: web.Request) -> str | None:
    """What a client shows as its API key, if anything."""
    header: str = http.headers.get("Authorization", "")
    return header.partition(" ")[2].strip() or header.strip() or None


def require_operator(http: web.Request, secret: str | None, names: ServerNames, *, what: str) -> None:
    """Raise AuthenticationError unless the one who asks may know ``what`` (a noun with its article)."""
    if secret is not None and not is_operator(http, secret, names):
        raise AuthenticationError(
            f"{what} needs this deployment's shared secret as a bearer token"
            + OTHER_NAME * (not is_for_us(http, names))
        )
    if secret is None and not (is_loopback(http.remote or "") and is_local_name(http.headers.get("Host"))):
        raise AuthenticationError(
            f"without a shared secret {what} is told to this machine only; start the server with --secret-file"
        )

"""Who may ask a server about its insides: holders of the shared secret; without one, this machine only."""

from __future__ import annotations

from aiohttp import web

from kvbaton.discovery.access import bearer_matches, is_local_name, is_loopback
from kvbaton.errors import AuthenticationError


def is_operator(http: web.Request, secret: str | None) -> bool:
    """Whether the sender has shown that it knows the shared secret; nobody has where there is none."""
    return secret is not None and bearer_matches(http.headers.get("Authorization"), secret, "story")


def key_of_client(http: web.Request) -> str | None:
    """What a client shows as its API key, if anything."""
    header: str = http.headers.get("Authorization", "")
    return header.partition(" ")[2].strip() or header.strip() or None


def require_operator(http: web.Request, secret: str | None, *, what: str) -> None:
    """Raise AuthenticationError unless the one who asks may know ``what`` (a noun with its article)."""
    if secret is not None and not is_operator(http, secret):
        raise AuthenticationError(f"{what} needs this deployment's shared secret as a bearer token")
    if secret is None and not (is_loopback(http.remote or "") and is_local_name(http.headers.get("Host"))):
        raise AuthenticationError(
            f"without a shared secret {what} is told to this machine only; start the server with --secret-file"
        )

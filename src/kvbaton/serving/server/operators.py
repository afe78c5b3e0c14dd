"""Who may ask a server about its insides: holders of the shared secret; without one, this machine only."""

from __future__ import annotations

from aiohttp import web

from kvbaton.discovery.access import bearer_matches, is_local_name, is_loopback
from kvbaton.errors import AuthenticationError


def require_operator(http: web.Request, secret: str | None, *, what: str) -> None:
    """Raise AuthenticationError unless the one who asks may know ``what`` (a noun with its article)."""
    header = http.headers.get("Authorization")
    if secret is not None and not bearer_matches(header, secret, "story"):
        raise AuthenticationError(f"{what} needs this deployment's shared secret as a bearer token")
    if secret is None and not (is_loopback(http.remote or "") and is_local_name(http.headers.get("Host"))):
        raise AuthenticationError(
            f"without a shared secret {what} is told to this machine only; start the server with --secret-file"
        )

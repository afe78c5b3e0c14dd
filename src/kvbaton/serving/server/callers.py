"""Who asks a server: its deployment's router, an operator, or anybody; and what each of them may.

This file must not know what is asked.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from aiohttp import web

from kvbaton.discovery.guard import is_for_us
from kvbaton.discovery.names import ServerNames
from kvbaton.errors import AuthenticationError, IncompatibleError
from kvbaton.serving.server.operators import OTHER_NAME, is_operator, is_router, require_operator


@dataclass(frozen=True, kw_only=True, slots=True)
class Callers:
    """``mode``: which half of a pair this server is, ``null`` for none. ``secret``: shared by the deployment; None:
    whoever reaches loopback is its router. ``names``: under which this server is asked."""

    mode: Literal["null", "prefill", "decode"]
    secret: str | None = field(repr=False)
    names: ServerNames

    def is_router(self, http: web.Request) -> bool:
        """Whether the sender may name rooms: it knows the secret, or there is none (and we are on loopback)."""
        return is_router(http, self.secret, self.names)

    def is_operator(self, http: web.Request) -> bool:
        return is_operator(http, self.secret, self.names)

    def needs_no_key(self, http: web.Request) -> bool:
        """The deployment's router, and its operators: who shows that it knows the secret."""
        return self.secret is not None and (self.is_router(http) or self.is_operator(http))

    def require_operator(self, http: web.Request, *, what: str) -> None:
        """Raises AuthenticationError unless the sender may know or do ``what`` (a noun)."""
        require_operator(http, self.secret, self.names, what=what)

    def require_router(self, http: web.Request) -> None:
        """Half a pair computes for its router only. Raises AuthenticationError."""
        if self.mode != "null" and not self.is_router(http):
            raise AuthenticationError(
                "only this deployment's router may name rooms and registries here; send requests through the router"
                + OTHER_NAME * (not is_for_us(http, self.names)),
                hint="start the router with the same --secret-file as the servers",
            )

    def require_role(self, asked: str) -> None:
        """Raises IncompatibleError where a router takes this server for the other half."""
        if asked != self.mode:
            raise IncompatibleError(
                f"role: this is a {self.mode} server and was asked as a {asked[:16]!r} server; "
                + ("start it as half a pair" if self.mode == "null" else f"name it with --{self.mode} at the router"),
                field="role",
                ours=self.mode,
                theirs=asked[:16],
            )

"""API keys: who may use the routes that clients use. Without keys everybody who reaches the port may.

Rules: of a key only its digest is kept, and every one of them is compared, each in constant time, so that neither the
time of an answer nor a core file tells of a key. Routes of operators and probes have rules of their own and ask for
none; neither does the deployment's own router.

This file must not know engines or workers.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from aiohttp import web

from kvbaton.discovery.access import read_private
from kvbaton.errors import AuthenticationError, ConfigError
from kvbaton.serving.server.operators import key_of_client

#: Routes that ask for a key, and what they begin with.
PROTECTED = ("/v1/", "/generate", "/tokenize", "/detokenize", "/abort_request", "/model_info", "/get_model_info")
MIN_KEY_CHARACTERS = 8
#: Longest file of keys.
MAX_KEYS_BYTES = 1 << 20

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class InvalidKeyError(AuthenticationError):
    """No key, or one that is none of ours."""

    code = "invalid_api_key"


class ApiKeys:
    """The keys of one server."""

    def __init__(self, keys: Sequence[str] = ()) -> None:
        for key in keys:
            if len(key) < MIN_KEY_CHARACTERS or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError(
                    f"an API key has at least {MIN_KEY_CHARACTERS} printable characters and no space",
                    hint="python3 -c 'import secrets; print(secrets.token_urlsafe(32))'",
                )
        self._digests = tuple(_digest(key) for key in keys)

    @classmethod
    def of(cls, keys: Sequence[str], file: Path | None) -> ApiKeys:
        """Those given and those of a file, one in each line. Raises ConfigError, also for a file that others read."""
        lines = (
            read_private(file, what="the API key", most_bytes=MAX_KEYS_BYTES).splitlines() if file is not None else []
        )
        return cls([*keys, *(line.strip() for line in lines if line.strip() and not line.startswith("#"))])

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, http: web.Request) -> None:
        """Raises InvalidKeyError."""
        if not self._digests or not http.path.startswith(PROTECTED):
            return
        shown = _digest(key_of_client(http) or "")
        if not sum([hmac.compare_digest(shown, digest) for digest in self._digests]):
            raise InvalidKeyError("this server wants an API key: send one as 'Authorization: Bearer KEY'")

    def __repr__(self) -> str:
        return f"ApiKeys({len(self._digests)})"


def require_key(
    keys: ApiKeys, is_exempt: Callable[[web.Request], bool]
) -> Callable[[web.Request, Handler], Awaitable[web.StreamResponse]]:
    """A middleware's function."""

    async def checked(http: web.Request, handler: Handler) -> web.StreamResponse:
        if keys and not is_exempt(http):
            keys.check(http)
        return await handler(http)

    return checked


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()

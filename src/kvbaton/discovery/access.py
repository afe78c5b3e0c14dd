"""Who may reach a listening address: loopback freely, anything else only with a shared secret.

HTTP is not encrypted, so the secret itself never travels: a process shows a token that follows from the secret and from
the door it is for: its kind, and the host and port of its server. Where a request leads a decode server to a listener
of somebody else, or somebody listens at the port of a worker that is gone, what he gets opens nothing; who overhears a
token can knock at that one door, and the links' keys stay unknown to him. What must not be changed on its way or sent
twice carries a code (:mod:`kvbaton.discovery.proof`). Servers take the secret itself, too, from people who have it
(``curl -H "Authorization: Bearer $(cat FILE)"``), but for registering.

This file must not know HTTP frameworks or links; it answers questions about hosts and tokens.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from kvbaton.errors import ConfigError
from kvbaton.secret import MAX_SECRET_CHARACTERS, check_secret, key_of

#: Largest secret file in bytes, white space included.
MAX_FILE_BYTES = 4 * MAX_SECRET_CHARACTERS
#: The header in which a router shows prefill and decode servers its token; what a client sends there goes nowhere.
ROUTER_HEADER = "X-KVBaton-Router"

Door = Literal["look-up", "register", "router", "story"]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``. No name but ``localhost`` counts as such."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(unbracketed(host)).is_loopback
    except ValueError:
        return False


def require_secret(host: str, secret: str | None, *, what: str) -> None:
    """Raises ConfigError unless ``host`` is loopback or there is a secret."""
    if secret is None and not is_loopback(host):
        raise ConfigError(
            f"{what} would listen at {host}, which others can reach, without a shared secret",
            hint="pass --secret-file FILE on every process, or keep the host at 127.0.0.1",
        )


def read_secret(path: Path) -> str:
    """The shared secret: the file's text without surrounding white space.

    Raises ConfigError for a file that cannot be read, that others can read or write, or that holds a weak secret.
    """
    secret = read_private(path, what="the secret").strip()
    check_secret(secret, what=f"the secret in {path}")
    return secret


def read_private(path: Path, *, what: str, most_bytes: int = MAX_FILE_BYTES) -> str:
    """A file's text. Raises ConfigError for a file that cannot be read, or that others can read or write."""
    try:
        with path.open("rb") as file:
            _check_private(path, os.fstat(file.fileno()))
            return file.read(most_bytes + 1).decode("ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {what} file {path}: {error}") from None


def _check_private(path: Path, status: os.stat_result) -> None:
    """PostgreSQL's rule for key files: of this user and nobody else's to read, or of root and at most a group's."""
    mode, mine = stat.S_IMODE(status.st_mode), status.st_uid == os.geteuid()
    if not (mine or status.st_uid == 0):
        raise ConfigError(f"the secret file {path} belongs to another user", hint=f"chown it to uid {os.geteuid()}")
    if mode & (0o077 if mine else 0o037):
        raise ConfigError(
            f"the secret file {path} can be read or written by others (mode {mode:03o})", hint=f"chmod 600 {path}"
        )


def unbracketed(host: str) -> str:
    """``[::1]`` without its brackets; anything else as it is."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def token_of(secret: str, door: Door, audience: str) -> str:
    """What a process shows at one kind of door, that of ``audience`` (``HOST:PORT``) alone."""
    return key_of(secret, f"token {door} {audience}").hex()


def token_matches(token: str | None, secret: str, door: Door, audience: str) -> bool:
    """Whether a token is the one for this door, or the secret itself. Compared in constant time."""
    shown = (token or "").strip().encode("utf-8", "surrogateescape")
    good = [hmac.compare_digest(shown, right.encode()) for right in (token_of(secret, door, audience), secret)]
    return any(good)


def bearer(secret: str | None, door: Door, audience: str) -> Mapping[str, str]:
    """The ``Authorization`` header for one kind of door; none without a secret."""
    return {} if secret is None else {"Authorization": f"Bearer {token_of(secret, door, audience)}"}


def bearer_matches(header: str | None, secret: str, door: Door, audience: str) -> bool:
    """Whether an ``Authorization`` header opens this door."""
    return token_matches(_shown(header), secret, door, audience)


def is_secret(header: str | None, secret: str) -> bool:
    """Whether an ``Authorization`` header shows the secret itself, as people do. Compared in constant time."""
    return hmac.compare_digest((_shown(header) or "").encode("utf-8", "surrogateescape"), secret.encode())


def _shown(header: str | None) -> str | None:
    """The token of an ``Authorization`` header."""
    scheme, _, token = (header or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


def is_local_name(host_header: str | None) -> bool:
    """Whether a ``Host`` header names this machine as such. A page in a browser that had its own name re-bound to
    127.0.0.1 (DNS rebinding) shows that name here."""
    host, colon, port = (host_header or "").rpartition(":")
    if not colon or not port.isdecimal():
        host = host_header or ""
    return is_loopback(host)


def is_printable_host(host: str) -> bool:
    """Whether ``host`` is a plain host name or address: nothing that could change the meaning of a URL."""
    return bool(host) and len(host) <= 253 and all(c.isascii() and (c.isalnum() or c in ".-_:[]%") for c in host)

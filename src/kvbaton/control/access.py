"""Who may reach a listening address: loopback freely, anything else only with a shared secret.

This file must not know HTTP frameworks or links; it answers questions about hosts and tokens.
"""

from __future__ import annotations

import hmac
import ipaddress
from pathlib import Path

from kvbaton.errors import ConfigError

#: Fewest characters of a shared secret, and most.
MIN_SECRET_CHARACTERS = 16
MAX_SECRET_CHARACTERS = 1024


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``. No name but ``localhost`` counts as such."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
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
    """The shared secret: the file's text without surrounding white space. Raises ConfigError."""
    try:
        secret = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the secret file {path}: {error}") from None
    if not MIN_SECRET_CHARACTERS <= len(secret) <= MAX_SECRET_CHARACTERS or not secret.isprintable():
        raise ConfigError(
            f"the secret in {path} must be {MIN_SECRET_CHARACTERS} to {MAX_SECRET_CHARACTERS} printable characters",
            hint="python3 -c 'import secrets; print(secrets.token_urlsafe(32))' > FILE",
        )
    return secret


def bearer_matches(header: str | None, secret: str) -> bool:
    """Whether an ``Authorization`` header carries the secret, compared in constant time."""
    scheme, _, token = (header or "").partition(" ")
    matches = hmac.compare_digest(token.strip().encode("utf-8", "surrogateescape"), secret.encode())
    return matches and scheme.lower() == "bearer"


def is_printable_host(host: str) -> bool:
    """Whether ``host`` is a plain host name or address: nothing that could change the meaning of a URL."""
    return bool(host) and len(host) <= 253 and all(c.isascii() and (c.isalnum() or c in ".-_:[]%") for c in host)

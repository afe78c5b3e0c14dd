"""The shared secret: when it is too weak to be one, and the keys that follow from it.

It is stretched with scrypt before it becomes a key, so that whoever has overheard a token tries a guess in a tenth of a
second and 32 MiB instead of in a microsecond. That is done once per process; every process of a deployment comes to the
same keys, because nothing but the secret goes in.
"""

from __future__ import annotations

import functools
import hashlib
import hmac

from kvbaton.errors import ConfigError

#: Fewest characters of a shared secret, and most; fewest that differ.
MIN_SECRET_CHARACTERS = 16
MAX_SECRET_CHARACTERS = 1024
MIN_DIFFERENT_CHARACTERS = 5
HOW_TO_MAKE_ONE = "python3 -c 'import secrets; print(secrets.token_urlsafe(32))' > FILE; chmod 600 FILE"

_SALT = b"kvbaton shared secret, version 1"
_COST, _BLOCK, _MEMORY = 1 << 15, 8, 64 << 20
#: Most secrets of one process whose keys are remembered.
_REMEMBERED = 16


def check_secret(secret: str, *, what: str = "the secret") -> None:
    """Raises ConfigError for one that is short, long, not printable, or little more than one character repeated."""
    if not MIN_SECRET_CHARACTERS <= len(secret) <= MAX_SECRET_CHARACTERS or not secret.isprintable():
        raise ConfigError(
            f"{what} must be {MIN_SECRET_CHARACTERS} to {MAX_SECRET_CHARACTERS} printable characters",
            hint=HOW_TO_MAKE_ONE,
        )
    if len(set(secret)) < MIN_DIFFERENT_CHARACTERS:
        raise ConfigError(f"{what} is weak: its characters are nearly all the same", hint=HOW_TO_MAKE_ONE)


def key_of(secret: str, purpose: str) -> bytes:
    """32 bytes for one purpose. Raises ConfigError for a weak secret."""
    return hmac.new(_stretched(secret), purpose.encode(), hashlib.sha256).digest()


@functools.lru_cache(maxsize=_REMEMBERED)
def _stretched(secret: str) -> bytes:
    check_secret(secret)
    return hashlib.scrypt(secret.encode(), salt=_SALT, n=_COST, r=_BLOCK, p=1, maxmem=_MEMORY, dklen=32)

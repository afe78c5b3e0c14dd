"""The codes (MAC) by which a registry and those who register there know that a message is the other's, and a new one.

Whoever registers or withdraws signs the whole message, the registry's time in it (:mod:`kvbaton.discovery.freshness`)
and a nonce: it counts once, there, as it is. A registry signs its answer together with the question's nonce: it answers
that question alone. Both ends make both codes here, from the same parts in the same order.

This file must not know HTTP frameworks.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

from kvbaton.discovery.access import bearer
from kvbaton.secret import key_of

#: The code over a message; what its answer must repeat; the registry's time, as a registration repeats it.
MAC_HEADER = "X-KVBaton-MAC"
NONCE_HEADER = "X-KVBaton-Nonce"
TIME_HEADER = "X-KVBaton-Time"
MAX_NONCE_CHARACTERS = 64
#: Where a registry tells its time, to those who may look up: ``{"time": ...}``.
TIME_PATH = "/registry_time"


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What a registry at ``audience`` (``HOST:PORT``) is asked, once; ``path`` with its query."""

    secret: str = field(repr=False)
    audience: str
    method: str
    path: str
    nonce: str = field(default_factory=lambda: secrets.token_urlsafe(16))

    def headers(self, told: str, body: bytes) -> Mapping[str, str]:
        """What is shown: for a look-up a token; for a registration, and whatever else changes something, also a code
        over the message and ``told``, the registry's time."""
        if self.method == "GET":
            return {**bearer(self.secret, "look-up", self.audience), NONCE_HEADER: self.nonce}
        return {
            **bearer(self.secret, "register", self.audience),
            NONCE_HEADER: self.nonce,
            TIME_HEADER: told,
            MAC_HEADER: message_code(self.secret, self.audience, self.nonce, told, self.method, self.path, body),
        }

    def is_answered(self, shown: str | None, payload: bytes) -> bool:
        """Whether the code that an answer shows proves that it is one to this, by one who knows the secret."""
        return is_code(shown, answer_code(self.secret, self.audience, self.nonce, self.path, payload))


def message_code(secret: str, audience: str, nonce: str, told: str, method: str, path: str, body: bytes) -> str:
    """The code over a message to a registry."""
    return _code(secret, "registration", audience, nonce, told, method, path, body=body)


def answer_code(secret: str, audience: str, nonce: str, path: str, body: bytes) -> str:
    """The code over a registry's answer."""
    return _code(secret, "answer", audience, nonce, path, body=body)


def is_code(shown: str | None, right: str) -> bool:
    """Whether a header is the code. Compared in constant time."""
    return hmac.compare_digest((shown or "").encode("utf-8", "surrogateescape"), right.encode())


def _code(secret: str, purpose: str, *texts: str, body: bytes) -> str:
    key = key_of(secret, f"mac {purpose}")
    parts = (*(text.encode("utf-8", "surrogateescape") for text in texts), body)
    lengths = b"".join(len(part).to_bytes(8, "big") for part in parts)
    return hmac.new(key, b"".join((len(parts).to_bytes(8, "big"), lengths, *parts)), "sha256").hexdigest()

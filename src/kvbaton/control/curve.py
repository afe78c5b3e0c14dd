"""Who may talk: CURVE keys that follow from one shared secret, and the gate (ZAP) that checks them.

Every rank that knows the secret derives the same two key pairs. A dialler needs the server's public key, which never
travels, and its own key must be the derived one; everything else fails the handshake. Messages are encrypted and
authenticated with keys that are fresh for each connection.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass

import zmq
from zmq.utils import z85

from kvbaton.errors import ConfigError
from kvbaton.secret import key_of

_GATE = "inproc://zeromq.zap.01"
_DOMAIN = b"kvbaton"
#: Requests answered in one go.
_BATCH = 64


@dataclass(frozen=True, slots=True, repr=False)
class CurveKeys:
    """The key pairs of a secret, in Z85."""

    server_public: bytes
    server_secret: bytes
    client_public: bytes
    client_secret: bytes

    @classmethod
    def derive(cls, secret: str) -> CurveKeys:
        """Raises ConfigError for a weak secret, or a libzmq without CURVE."""
        if not zmq.has("curve"):
            raise ConfigError("this libzmq has no CURVE: a secret cannot be honoured")
        server, client = (_secret_key(secret, person) for person in ("server", "client"))
        return cls(zmq.curve_public(server), server, zmq.curve_public(client), client)

    def guard_server(self, socket: zmq.Socket[bytes]) -> None:
        """Set on a listening socket before it is bound."""
        socket.curve_server = True
        socket.curve_secretkey = self.server_secret
        socket.zap_domain = _DOMAIN

    def guard_client(self, socket: zmq.Socket[bytes]) -> None:
        """Set on a dialling socket before it is connected."""
        socket.curve_serverkey = self.server_public
        socket.curve_publickey = self.client_public
        socket.curve_secretkey = self.client_secret


def _secret_key(secret: str, person: str) -> bytes:
    return z85.encode(key_of(secret, f"link {person}"))


class ZapHandler:
    """Answers libzmq's questions whether a client key may come in. Polled by its owner, no thread."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: CurveKeys) -> None:
        self._allowed = z85.decode(keys.client_public)
        self.socket = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind(_GATE)

    def answer(self) -> None:
        """Answer what is waiting; never blocks."""
        for _ in range(_BATCH):
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self.socket.send_multipart(self._verdict(frames), zmq.NOBLOCK)

    def _verdict(self, frames: list[bytes]) -> list[bytes]:
        """RFC 27: version, request id, domain, address, identity, mechanism, client key (32 bytes)."""
        version, request = (*frames, b"", b"")[:2]
        good = (
            len(frames) == 7
            and (version, frames[2], frames[5]) == (b"1.0", _DOMAIN, b"CURVE")
            and hmac.compare_digest(frames[6], self._allowed)
        )
        status, text = (b"200", b"OK") if good else (b"400", b"key is not of this secret")
        return [version, request, status, text, b"rank" if good else b"", b""]

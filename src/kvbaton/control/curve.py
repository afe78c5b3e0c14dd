"""Who may talk: CURVE keys that follow from one shared secret, and the gate (ZAP) that checks them.

Every rank that knows the secret derives the same two key pairs. A dialler needs the server's public key, which never
travels, and its own key must be the derived one; everything else fails the handshake. Messages are encrypted and
authenticated with keys that are fresh for each connection.

Without a secret everybody who speaks the protocol may come in; but whoever speaks one of ZeroMQ's before 3.0, which any
bytes are (what begins with 0xff, or is short), is sent away by libzmq where a gate is set, and by nobody otherwise.
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

    def guard_client(self, socket: zmq.Socket[bytes]) -> None:
        """Set on a dialling socket before it is connected."""
        socket.curve_serverkey = self.server_public
        socket.curve_publickey = self.client_public
        socket.curve_secretkey = self.client_secret


def _secret_key(secret: str, person: str) -> bytes:
    return z85.encode(key_of(secret, f"link {person}"))


class ZapHandler:
    """Answers libzmq's questions whether a client may come in. Polled by its owner, no thread."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: CurveKeys | None) -> None:
        self._allowed = z85.decode(keys.client_public) if keys is not None else None
        self.socket = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind(_GATE)

    def guard(self, socket: zmq.Socket[bytes]) -> None:
        """Set on a listening socket before it is bound."""
        socket.zap_domain = _DOMAIN

    def answer(self) -> None:
        """Answer what is waiting; never blocks."""
        for _ in range(_BATCH):
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self.socket.send_multipart(self._verdict(frames), zmq.NOBLOCK)

    def _verdict(self, frames: list[bytes]) -> list[bytes]:
        """RFC 27: version, request id, domain, address, identity, mechanism, with CURVE a client key (32 bytes)."""
        version, request, domain, _, _, mechanism, *keys = (*frames, *[b""] * 6)[: max(6, len(frames))]
        if self._allowed is None:
            good = mechanism == b"NULL" and not keys
        else:
            good = mechanism == b"CURVE" and len(keys) == 1 and hmac.compare_digest(keys[0], self._allowed)
        good = good and (version, domain) == (b"1.0", _DOMAIN)
        status, text = (b"200", b"OK") if good else (b"400", b"key is not of this secret")
        return [version, request, status, text, b"rank" if good else b"", b""]

"""Asks the operating system whether anybody still listens at an address.

A broken stream proves nothing about the process behind it; a refused connection does. A probe is one TCP connect
that never blocks and is closed as soon as the answer is known. This file must not know ZeroMQ.
"""

from __future__ import annotations

import enum
import errno
import socket

from kvbaton.control.address import Address

#: First pause before a probe is repeated, the longest pause, and the least one between two refusals, in seconds.
FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 5.0
LEAST_REFUSED_PAUSE_SECONDS = 1.0
#: A connect without an answer is given up after this time.
ANSWER_SECONDS = 1.0


class Finding(enum.Enum):
    """What a probe found."""

    REFUSED = "refused"  #: nobody listens
    OTHER = "other"  #: somebody accepts, or no answer: proves nothing


class Probe:
    """Probes one address again and again, ever less often, until :meth:`stop`. ``now``: any monotonic seconds."""

    def __init__(self, address: Address) -> None:
        self._family = socket.AF_INET6 if address.is_ipv6 else socket.AF_INET
        self._target = (address.host, address.port)
        self._socket: socket.socket | None = None
        self._pause = FIRST_PAUSE_SECONDS
        self.due: float | None = None

    @property
    def waits_on(self) -> socket.socket | None:
        """The socket of a connect in progress; writable or in error when there is an answer."""
        return self._socket

    def start(self, now: float, after_seconds: float = 0.0) -> None:
        """Begin anew, with the shortest pauses."""
        self.stop()
        self._pause = FIRST_PAUSE_SECONDS
        self.due = now + after_seconds

    def stop(self) -> None:
        """No more probes. Idempotent."""
        self.due = None
        self._close_socket()

    def step(self, now: float, answered: bool) -> Finding | None:
        """Do what is due; None if there is nothing to tell. ``answered``: :attr:`waits_on` is ready."""
        if self._socket is not None:
            if answered:
                return self._found(self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), now)
            return self._found(errno.ETIMEDOUT, now) if self.due is not None and now >= self.due else None
        if self.due is None or now < self.due:
            return None
        try:
            self._socket = socket.socket(self._family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
            code = self._socket.connect_ex(self._target)
        except OSError as error:  # no descriptor is left: asked again later
            code = error.errno or errno.EMFILE
        if code == errno.EINPROGRESS:
            self.due = now + ANSWER_SECONDS
            return None
        return self._found(code, now)

    def _found(self, code: int, now: float) -> Finding:
        self._close_socket()
        refused = code == errno.ECONNREFUSED
        pause = max(self._pause, LEAST_REFUSED_PAUSE_SECONDS) if refused else self._pause
        self._pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
        self.due = now + pause
        return Finding.REFUSED if refused else Finding.OTHER

    def _close_socket(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

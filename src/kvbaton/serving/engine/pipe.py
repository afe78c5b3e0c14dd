"""A pipe between two processes of one server: typed messages as msgpack, one sender at a time, errors among the data.

This file must not know what is said, but for how a process ends that cannot go on.
"""

from __future__ import annotations

import threading
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

import msgspec

from kvbaton.errors import InternalError, KVBatonError, from_code

_T = TypeVar("_T")
_First = TypeVar("_First")


class Died(msgspec.Struct, frozen=True, tag="died"):
    """The last message of a process that could not go on."""

    error: KVBatonError


class _Failure(msgspec.Struct, array_like=True):
    """An error on its way."""

    code: str
    message: str
    peer: str
    room: int | None
    hint: str
    phase: str


def _pack(value: object) -> object:
    if isinstance(value, KVBatonError):
        return _Failure(value.code, value.message, value.peer, value.room, value.hint, value.phase)
    raise NotImplementedError(f"{type(value).__name__} does not go through a pipe")


def _unpack(kind: type, value: Any) -> object:
    if kind is not KVBatonError:
        raise NotImplementedError(f"{kind.__name__} does not come through a pipe")
    failure = msgspec.convert(value, _Failure)
    error = from_code(failure.code, failure.message, peer=failure.peer, room=failure.room)
    error.hint, error.phase = failure.hint, failure.phase
    return error


_encoder = msgspec.msgpack.Encoder(enc_hook=_pack)


class Pipe(Generic[_T]):
    """One end.

    Args:
        connection: belongs to the pipe from now on.
        who: the process at the other end, for messages to people.
        hears: the union of what comes from there.
    """

    def __init__(self, connection: Connection, who: str, hears: Any) -> None:
        self.who = who
        self._connection = connection
        self._decoder = msgspec.msgpack.Decoder(hears, dec_hook=_unpack)
        self._lock = threading.Lock()

    def send(self, message: msgspec.Struct) -> None:
        """From any thread. Raises InternalError when the other end is gone."""
        try:
            with self._lock:
                self._connection.send_bytes(_encoder.encode(message))
        except (OSError, ValueError) as error:
            raise InternalError(f"{self.who} is gone: {error}") from error

    def waits(self, seconds: float) -> bool:
        """Whether something is there to be heard within ``seconds``, the pipe's end included."""
        return self._connection.poll(seconds)

    def hear(self) -> _T | None:
        """The next message; None when the other end is gone."""
        try:
            heard: _T = self._decoder.decode(self._connection.recv_bytes())
            return heard
        except (EOFError, OSError):
            return None

    def first(self, kind: type[_First], seconds: float) -> _First:
        """The message with which the other end begins.

        Raises what kept it from beginning, or InternalError when nothing comes in time.
        """
        if not self.waits(seconds):
            raise InternalError(f"{self.who} was not ready within {seconds:g} s")
        heard = self.hear()
        if isinstance(heard, Died):
            raise heard.error
        if not isinstance(heard, kind):
            raise InternalError(f"{self.who} ended before it was ready; see its last lines in the log")
        return heard

    def lost(self, last: object) -> InternalError:
        """Why nothing more comes, after ``last`` was heard."""
        cause = last.error.message if isinstance(last, Died) else "its process has ended"
        return InternalError(f"{self.who} is lost: {cause}")

    def close(self) -> None:
        """Idempotent."""
        self._connection.close()

    def __repr__(self) -> str:
        return f"<Pipe to {self.who}>"

"""The one protocol between two processes of a server: typed messages as msgpack over a pipe, errors among the data.

Rules:

- Sending never waits: a thread writes what is queued, up to a bound; a process that does not read is then given up.
- A child says that it lives: where it has nothing to send for :data:`BEAT_SECONDS` it sends an empty frame, from the
  writing thread, whatever the others compute. The parent takes a child that is silent for :data:`LIFE_SECONDS` for
  lost. A child judges no parent by the clock: it ends when its pipe does.
- Nothing is judged before what is there has been read: a process that was stopped itself finds its child's beats.
- The last message of a process that cannot go on is :class:`Died`.

This file must not know what is said, but for how a process ends that cannot go on.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from multiprocessing.connection import Connection
from typing import Any, Generic, Literal, TypeVar

import msgspec

from kvbaton.errors import InternalError, KVBatonError, from_code

#: How often a child that has nothing to say says so, and after how much silence its parent takes it for lost.
BEAT_SECONDS = 1.0
LIFE_SECONDS = 20.0
#: Most bytes that wait to be written; a process that lets so much wait does not read any more.
MAX_WAITING_BYTES = 256 << 20
#: How long closing waits for what is queued to be written.
FLUSH_SECONDS = 2.0
_BEAT = b""

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
        receives: the union of what comes from there.
        side: who we are.
    """

    def __init__(self, connection: Connection, who: str, receives: Any, *, side: Literal["parent", "child"]) -> None:
        self.who = who
        self._connection = connection
        self._decoder = msgspec.msgpack.Decoder(receives, dec_hook=_unpack)
        self._side = side
        self._changed = threading.Condition()
        self._queued: deque[bytes] = deque()
        self._queued_bytes = 0
        self._ending = False
        self._broken = ""
        self._heard_at: float | None = None
        self._writer: threading.Thread | None = None

    def send(self, message: msgspec.Struct) -> None:
        """Queue a message, from any thread. Raises InternalError when the other end is gone, or does not read."""
        frame = _encoder.encode(message)
        with self._changed:
            if self._queued and self._queued_bytes + len(frame) > MAX_WAITING_BYTES:
                self._broken = self._broken or f"it has left {self._queued_bytes} bytes unread"
            if self._broken or self._ending:
                raise InternalError(f"{self.who} is gone: {self._broken or 'its pipe is closed'}")
            self._queued.append(frame)
            self._queued_bytes += len(frame)
            if self._writer is None:  # not before: the pipe may have been made before a sequences
                self._writer = threading.Thread(target=self._write, name="kvbaton-pipe", daemon=True)
                self._writer.start()
            self._changed.notify_all()

    def _write(self) -> None:
        """The thread."""
        beat_after = BEAT_SECONDS if self._side == "child" else None
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queued or self._ending, beat_after)
                if self._ending and not self._queued:
                    return
                frame = self._queued[0] if self._queued else _BEAT
            try:
                self._connection.send_bytes(frame)
            except (OSError, ValueError) as error:
                with self._changed:
                    self._broken = self._broken or str(error)
                    self._queued.clear()
                    self._changed.notify_all()
                return
            with self._changed:
                if frame:
                    self._queued.popleft()
                    self._queued_bytes -= len(frame)
                    self._changed.notify_all()

    def waits(self, seconds: float) -> bool:
        """Whether something is there to be received within ``seconds``, the pipe's end included."""
        return self._connection.poll(seconds)

    def recv(self) -> _T | None:
        """The next message; None when the other end is gone or, of a child, silent for too long."""
        try:
            while True:
                if self._side == "parent" and self._silent():
                    return None
                frame = self._connection.recv_bytes()
                self._heard_at = time.monotonic()
                if frame != _BEAT:
                    message: _T = self._decoder.decode(frame)
                    return message
        except (EOFError, OSError):
            with self._changed:
                self._broken = self._broken or "its process has ended"
            return None

    def _silent(self) -> bool:
        """Wait until a child says something. True if it has not for too long; looked at twice, since this process may
        have been stopped as well."""
        if self._heard_at is None:
            self._heard_at = time.monotonic()
        while not self.waits(max(0.0, self._heard_at + LIFE_SECONDS - time.monotonic())):
            if time.monotonic() >= self._heard_at + LIFE_SECONDS and not self.waits(2 * BEAT_SECONDS):
                with self._changed:
                    self._broken = self._broken or f"it has said nothing for {LIFE_SECONDS:g} s: it hangs or is stopped"
                return True
        return False

    def first(self, kind: type[_First], seconds: float) -> _First:
        """The message with which the other end begins.

        Raises what kept it from beginning, or InternalError when nothing comes in time.
        """
        if not self.waits(seconds):
            raise InternalError(f"{self.who} was not ready within {seconds:g} s")
        message = self.recv()
        if isinstance(message, Died):
            raise message.error
        if not isinstance(message, kind):
            raise InternalError(f"{self.who} ended before it was ready; see its last lines in the log")
        return message

    def lost(self, last: object) -> InternalError:
        """Why nothing more comes, after ``last`` was received."""
        cause = last.error.message if isinstance(last, Died) else self._broken or "its process has ended"
        return InternalError(f"{self.who} is lost: {cause}")

    def release(self) -> None:
        """Write what is queued, within a bound, and nothing more. Idempotent."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        if self._writer is not None:
            self._writer.join(FLUSH_SECONDS)

    def close(self) -> None:
        """Idempotent."""
        self.release()
        self._connection.close()

    def __repr__(self) -> str:
        return f"<Pipe to {self.who}>"


def tell_death(connection: Connection, error: KVBatonError) -> None:
    """The last word of a process; the pipe that it had must have been released."""
    try:
        connection.send_bytes(_encoder.encode(Died(error)))
    except (OSError, ValueError):
        return  # nobody is there to know

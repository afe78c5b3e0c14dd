"""The one protocol between two processes of a server: typed messages as msgpack over a pipe, errors among the data.

Rules:

- Sending never waits: a thread writes what is queued, up to a bound.
- A child says that it lives: where it has nothing to send for :data:`BEAT_SECONDS` it sends an empty frame, from the
  writing thread, whatever the others compute.
- The parent gives a child up that is silent for :data:`LIFE_SECONDS`, that leaves more than :data:`MAX_WAITING_BYTES`
  or one frame for :data:`UNREAD_SECONDS` unread, or that sends what cannot be decoded. A child gives no parent up by
  the clock: it ends when its pipe does.
- Giving up shuts the pipe down, so that ``recv`` ends on both sides, and the parent kills the child: whoever waits for
  it elsewhere, as in a collective, then stops waiting.
- Nothing is given up before what is there has been read: a process that was stopped itself finds its child's beats.
- The last message of a process that cannot go on is :class:`Died`.

This file must not know what is said, but for how a process ends that cannot go on.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

import msgspec

from kvbaton.errors import InternalError, KVBatonError, from_code

#: How often a child that has nothing to say says so, and after how much silence its parent takes it for lost.
BEAT_SECONDS = 1.0
LIFE_SECONDS = 20.0
#: Most bytes that wait to be written; a process that lets so much wait does not read any more.
MAX_WAITING_BYTES = 256 << 20
#: How long one frame may take to be written. A rank reads nothing while it computes, and one forward pass may be long.
UNREAD_SECONDS = 120.0
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
        connection: a socket's; belongs to the pipe from now on.
        who: the process at the other end, for messages to people.
        receives: the union of what comes from there.
        kill: ends the process at the other end. The parent has it; None makes this the child's end.
    """

    def __init__(
        self, connection: Connection, who: str, receives: Any, *, kill: Callable[[], None] | None = None
    ) -> None:
        self.who = who
        self._connection = connection
        self._decoder = msgspec.msgpack.Decoder(receives, dec_hook=_unpack)
        self._kill = kill
        self._changed = threading.Condition()
        self._queued: deque[bytes] = deque()
        self._queued_bytes = 0
        self._writing_since: float | None = None
        self._ending = False
        self._broken = ""
        self._heard_at: float | None = None
        self._writer: threading.Thread | None = None

    def send(self, message: msgspec.Struct) -> None:
        """Queue a message, from any thread. Raises InternalError when the other end is gone, or does not read."""
        frame = _encoder.encode(message)
        with self._changed:
            if self._queued and self._queued_bytes + len(frame) > MAX_WAITING_BYTES:
                self._give_up(f"it has left {self._queued_bytes} bytes unread")
            if self._broken or self._ending:
                raise InternalError(f"{self.who} is gone: {self._broken or 'its pipe is closed'}")
            self._queued.append(frame)
            self._queued_bytes += len(frame)
            if self._writer is None:  # not before: the pipe may have been made before a fork
                self._writer = threading.Thread(target=self._write, name="kvbaton-pipe", daemon=True)
                self._writer.start()
            self._changed.notify_all()

    def _write(self) -> None:
        """The thread."""
        beat_after = BEAT_SECONDS if self._kill is None else None
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queued or self._ending, beat_after)
                if self._ending and not self._queued:
                    return
                frame = self._queued[0] if self._queued else _BEAT
                self._writing_since = time.monotonic()
            try:
                self._connection.send_bytes(frame)
            except (OSError, ValueError) as error:
                with self._changed:
                    self._broken = self._broken or str(error)
                    self._queued.clear()
                    self._writing_since = None
                    self._changed.notify_all()
                return
            with self._changed:
                self._writing_since = None
                if frame:
                    self._queued.popleft()
                    self._queued_bytes -= len(frame)
                    self._changed.notify_all()

    def _give_up(self, reason: str) -> None:
        """The other end is of no use any more. Never waits."""
        with self._changed:
            if self._broken:
                return
            self._broken = reason
        with suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as there:
            there.shutdown(socket.SHUT_RDWR)
        if self._kill is not None:
            self._kill()

    def waits(self, seconds: float) -> bool:
        """Whether something is there to be received within ``seconds``, the pipe's end included."""
        return self._connection.poll(seconds)

    def recv(self) -> _T | None:
        """The next message; None when the other end is gone or was given up."""
        try:
            while True:
                if self._kill is not None:
                    self._look_after()
                frame = self._connection.recv_bytes()
                self._heard_at = time.monotonic()
                if frame != _BEAT:
                    message: _T = self._decoder.decode(frame)
                    return message
        except (EOFError, OSError):
            with self._changed:
                self._broken = self._broken or "its process has ended"
        except msgspec.MsgspecError as error:
            self._give_up(f"it has sent what cannot be decoded: {error}")
        return None

    def _look_after(self) -> None:
        """Wait until the child says something, or give it up. Silence is looked at twice, since this process may have
        been stopped as well."""
        if self._heard_at is None:
            self._heard_at = time.monotonic()
        since = self._writing_since
        if since is not None and time.monotonic() > since + UNREAD_SECONDS:
            self._give_up(f"it has read nothing for {UNREAD_SECONDS:g} s: it hangs")
        while not self.waits(max(0.0, self._heard_at + LIFE_SECONDS - time.monotonic())):
            if time.monotonic() >= self._heard_at + LIFE_SECONDS and not self.waits(2 * BEAT_SECONDS):
                self._give_up(f"it has said nothing for {LIFE_SECONDS:g} s: it hangs or is stopped")

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

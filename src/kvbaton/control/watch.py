"""Waits for many ZeroMQ sockets and files at a cost that does not grow with those that are idle.

A ZeroMQ socket has a file number that becomes readable when the socket *may* have become ready, and only then: whoever
has been told has to look at the socket's own state (``EVENTS``), and again after every send and receive, since each of
them may have taken the news in passing. So a socket stays on the list of those to look at from the moment its file was
readable, or :meth:`Watch.touched` was called, until it is found not to be ready. ``zmq.Poller`` asks all sockets each
time instead.
"""

from __future__ import annotations

import math
import select
from typing import Generic, TypeVar

import zmq

Key = TypeVar("Key")
_Socket = zmq.Socket[bytes]


class Watch(Generic[Key]):
    """``Key``: what the owner calls a socket or a file."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._keys: dict[int, Key] = {}
        self._sockets: dict[Key, tuple[int, _Socket]] = {}
        self._files: dict[Key, int] = {}
        self._suspects: dict[Key, None] = {}

    def add_socket(self, key: Key, socket: _Socket) -> None:
        number = int(socket.getsockopt(zmq.FD))
        self._epoll.register(number, select.EPOLLIN)
        self._keys[number], self._sockets[key] = key, (number, socket)
        self._suspects[key] = None

    def add_file(self, key: Key, number: int, *, writable: bool = False) -> None:
        self._epoll.register(number, select.EPOLLOUT if writable else select.EPOLLIN)
        self._keys[number], self._files[key] = key, number

    def remove(self, key: Key) -> None:
        """Before the socket or file is closed. Idempotent."""
        found = self._sockets.pop(key, None)
        number = found[0] if found is not None else self._files.pop(key, None)
        self._suspects.pop(key, None)
        if number is not None:
            self._epoll.unregister(number)
            del self._keys[number]

    def touched(self, key: Key) -> None:
        """A socket is sent on or read from: it is looked at next time, after those that were not."""
        if key in self._sockets:
            self._suspects.pop(key, None)
            self._suspects[key] = None

    def wait(self, seconds: float) -> list[Key]:
        """What is readable (writable, of files that wait for that), after at most ``seconds``; infinite: no limit."""
        ready = [key for key in list(self._suspects) if self._is_ready(key)]
        timeout = 0.0 if ready else -1.0 if seconds == math.inf else max(0.0, seconds)
        for number, _ in self._epoll.poll(timeout):
            key = self._keys[number]
            if key in self._files:
                ready.append(key)
            elif key not in self._suspects:
                self._suspects[key] = None
                if self._is_ready(key):
                    ready.append(key)
        return ready

    def _is_ready(self, key: Key) -> bool:
        """Look at a suspect; it is none any more if there is nothing."""
        ready = bool(int(self._sockets[key][1].getsockopt(zmq.EVENTS)) & zmq.POLLIN)
        if not ready:
            del self._suspects[key]
        return ready

    def close(self) -> None:
        self._epoll.close()

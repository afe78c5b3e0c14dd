"""The other processes of a server: forked once the weights are in memory, before any thread exists.

Rules: the weights are loaded once and shared until each rank has cut its own part out of them. A child ignores terminal
signals and ends when its parent says so, or is gone: its pipe then ends. What a child must not keep (the parent's
ports, the pipes of others) is closed in it at once. It never returns from here.

This file must not know HTTP, requests or what a rank is made of.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Protocol, TypeVar

from kvbaton.errors import InternalError, KVBatonError
from kvbaton.serving.engine.pipe import tell_death

#: How long a child may take to end by itself once its pipe has.
END_SECONDS = 20.0
_END_PAUSE_SECONDS = 0.01
_log = logging.getLogger(__name__)
_Name = TypeVar("_Name")


class Closable(Protocol):
    """A socket or a pipe."""

    def close(self) -> None: ...


class Child:
    """A process of this one, and our end of the pipe to it."""

    def __init__(self, number: int, pipe: Connection) -> None:
        self.pipe = pipe
        self._number = number
        self._handle = os.pidfd_open(number)  # names this process even after its number was given to another

    def kill(self) -> None:
        """End it now, whatever it does. Idempotent, from any thread; :meth:`wait` still has to be called."""
        with suppress(ProcessLookupError, OSError):
            signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    def wait(self, deadline: float) -> None:
        """Until it has ended; at ``deadline`` (monotonic seconds) it is killed."""
        with suppress(ChildProcessError):
            while os.waitpid(self._number, os.WNOHANG) == (0, 0):
                if time.monotonic() > deadline:
                    _log.warning("process %d has not ended within %g s and is killed", self._number, END_SECONDS)
                    self.kill()
                    os.waitpid(self._number, 0)
                    break
                time.sleep(_END_PAUSE_SECONDS)
        os.close(self._handle)


class Children:
    """All processes that one call has forked."""

    def __init__(self, children: Iterable[Child]) -> None:
        self._children = list(children)

    def __iter__(self) -> Iterator[Child]:
        return iter(self._children)

    def wait(self) -> None:
        """Until all have ended: their pipes have; one that hangs is killed. Idempotent."""
        deadline = time.monotonic() + END_SECONDS
        while self._children:
            self._children.pop().wait(deadline)


def fork_each(
    names: Sequence[_Name], live: Callable[[_Name, Connection], None], *, leave: Iterable[Closable | None]
) -> Children:
    """A child for each of ``names``.

    ``live`` is a child's whole life; a KVBatonError out of it is told to the parent as its death. ``leave``: what
    is ours alone.
    """
    if threading.active_count() > 1:
        _log.warning("forking beside threads: %s", ", ".join(thread.name for thread in threading.enumerate()))
    children: list[Child] = []
    left: list[Closable] = [one for one in leave if one is not None]
    for name in names:
        here, there = socket.socketpair()
        process = os.fork()
        if process == 0:
            here.close()
            for other in [*(child.pipe for child in children), *left]:
                other.close()
            _live(name, live, Connection(there.detach()))
        there.close()
        children.append(Child(process, Connection(here.detach())))
    return Children(children)


def _live(name: _Name, live: Callable[[_Name, Connection], None], pipe: Connection) -> None:
    """In the child; never returns."""
    code = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        live(name, pipe)
        code = 0
    except KVBatonError as error:
        tell_death(pipe, error)
    except BaseException as error:  # noqa: BLE001 - the top of a process
        _log.critical("%s died", name, exc_info=error)
        tell_death(pipe, InternalError(f"{name} died; the log of this server says why"))
    finally:
        logging.shutdown()
        os._exit(code)

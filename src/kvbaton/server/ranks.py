"""The other processes of a group: forked from the leader once the weights are in memory, before any thread exists.

Rules: the weights are loaded once and shared until each rank has cut its own part out of them. A follower ignores
terminal signals and ends when its leader says so, or is gone: its pipe then ends. What a follower must not keep (the
leader's ports, the pipes of others) is closed in it at once. It never returns from here.

This file must not know HTTP, requests or what a rank is made of.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection

from kvbaton.engine import orders
from kvbaton.engine.group import Member
from kvbaton.engine.shard import Shard
from kvbaton.errors import InternalError, KVBatonError

_log = logging.getLogger(__name__)

#: A follower's whole life. Raises KVBatonError for what keeps it from beginning.
Life = Callable[[Shard, Connection], None]


class Forked:
    """The followers' processes."""

    def __init__(self, members: Sequence[Member], processes: Sequence[int]) -> None:
        self.members = tuple(members)
        self._processes = list(processes)

    def wait(self) -> None:
        """Until all have ended: their pipes have. Idempotent."""
        while self._processes:
            try:
                os.waitpid(self._processes.pop(), 0)
            except ChildProcessError:
                continue


def fork_followers(leader: Shard, live: Life, *, leave: Iterable[socket.socket | None]) -> Forked:
    """Start every rank of the leader's group but the leader. ``leave``: sockets that are the leader's alone."""
    if threading.active_count() > 1:
        _log.warning("forking beside threads: %s", ", ".join(thread.name for thread in threading.enumerate()))
    members: list[Member] = []
    processes: list[int] = []
    ours: list[Connection] = []
    for shard in leader.all():
        if shard.rank == leader.rank:
            continue
        here, there = socket.socketpair()
        process = os.fork()
        if process == 0:
            here.close()
            for pipe in ours:
                pipe.close()
            for port in leave:
                if port is not None:
                    port.close()
            _live(shard, live, Connection(there.detach()))
        there.close()
        ours.append(Connection(here.detach()))
        members.append(Member(shard.rank, ours[-1]))
        processes.append(process)
    return Forked(members, processes)


def _live(shard: Shard, live: Life, pipe: Connection) -> None:
    """In the child; never returns."""
    code = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        live(shard, pipe)
        code = 0
    except KVBatonError as error:
        _tell(pipe, error)
    except BaseException as error:  # noqa: BLE001 - the top of a process
        _log.critical("rank %d died", shard.rank, exc_info=error)
        _tell(pipe, InternalError(f"rank {shard.rank} died of {error!r}"))
    finally:
        logging.shutdown()
        os._exit(code)


def _tell(pipe: Connection, error: KVBatonError) -> None:
    try:
        pipe.send_bytes(orders.encode(orders.Died(orders.Failure.of(error))))
    except OSError:
        _log.debug("nobody listens to: %s", error)

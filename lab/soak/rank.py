"""One process of a soak: a source or a target rank that plays batches of rooms and says what it holds.

A source fills its pages with the room's number before it submits them; a target reads its pages when the room has
arrived: any other number there is corruption. Commands come on a pipe; ``halt`` may come within a batch, because the
peer was killed, and gives up what has not ended.
"""

from __future__ import annotations

import gc
import os
import random
import sys
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvbaton.control.address import Address
from kvbaton.errors import ExpiredError, KVBatonError, TransferFailedError
from kvbaton.manager import ALWAYS_READY, KVManager, KVPoll, KVReceiver, KVSender, Span
from kvbaton.protocol.settings import Settings
from kvbaton.transports.interfaces import restrict
from lab.soak.config import LAYERS, PAGES, TOKENS, Side, SoakConfig

HALT = "halt"
#: A batch in which nothing ends for so long is stuck.
STUCK_SECONDS = 60.0
SETTINGS = Settings(heartbeat_interval=1.0, announce_seconds=2.0, bootstrap_timeout=30.0, waiting_timeout=30.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class SoakRankSpec:
    """Which rank a process is. ``address``: where it listens; empty: any port of loopback."""

    side: Side
    address: str
    config: SoakConfig


@dataclass(slots=True)
class _Live:
    """A room that has not ended: its slot in the pool, and how many turns are left before we give it up."""

    side: KVSender | KVReceiver
    slot: int
    aborts_in: int | None
    handed_over: bool = False


class SoakRank:
    """See the module."""

    def __init__(self, spec: SoakRankSpec, pipe: Connection) -> None:
        self._spec = spec
        self._config = spec.config
        self._pipe = pipe
        length = self._config.layout(0).regions[0].length
        self._memory = np.zeros(length, dtype=np.uint8)
        #: rooms' pages as numbers: [layer, slot, words of its pages]
        self._words: NDArray[np.int64] = self._memory.view(np.int64).reshape(LAYERS, self._config.slots, -1)
        listening = Address.parse(spec.address) if spec.address else Address("127.0.0.1", 0)
        self._manager = KVManager.open(
            self._config.layout(self._memory.ctypes.data),
            role="prefill" if spec.side == "source" else "decode",
            backend=self._config.transport,
            host=listening.host,
            port=listening.port,
            settings=SETTINGS,
        )
        self._free = deque(range(self._config.slots))
        self._chance = random.Random(self._manager.instance)
        self._peers: list[str] = []

    def describe(self) -> dict[str, str]:
        return {"address": self._manager.address}

    def fill_from(self, address: str) -> None:
        """Target: where the source is."""
        self._peers = [address]

    def play(self, first: int, count: int) -> dict[str, int]:
        """Play rooms ``first`` up to ``first + count``, in order, some at a time. Returns how many ended how."""
        waiting = deque(range(first, first + count))
        live: dict[int, _Live] = {}
        ended: Counter[str] = Counter()
        deadline = time.monotonic() + STUCK_SECONDS
        while waiting or live:
            self._manager.wakeup.clear()
            if self._pipe.poll() and self._pipe.recv() == HALT:
                ended["not_started"] += len(waiting)
                waiting.clear()
                for room in live.values():
                    room.side.abort("the peer was restarted")
            while waiting and self._free and len(live) < self._config.concurrency:
                self._begin(waiting.popleft(), live)
            before = ended.total()
            for number, room in list(live.items()):
                self._advance(number, room)
                if room.side.released:
                    ended[self._outcome(number, room)] += 1
                    self._free.append(room.slot)
                    del live[number]
                    deadline = time.monotonic() + STUCK_SECONDS
            if ended.total() == before and live and not self._manager.wakeup.wait(0.2) and time.monotonic() > deadline:
                number = next(iter(live))
                raise ExpiredError(f"{len(live)} rooms are stuck: {self._manager.trace(number)}")
        return dict(ended)

    def _begin(self, number: int, live: dict[int, _Live]) -> None:
        aborts = self._config.who_aborts(number) == self._spec.side
        aborts_in = self._chance.randrange(4) if aborts else None
        side: KVSender | KVReceiver
        if self._spec.side == "source":
            side = self._manager.sender(number)
        else:
            side = self._manager.receiver(number, self._peers)
        live[number] = _Live(side, self._free.popleft(), aborts_in)

    def _advance(self, number: int, room: _Live) -> None:
        """Hand over what can be, give up what is to be given up."""
        waits_to_abort = room.aborts_in is not None and (room.handed_over or self._spec.side == "source")
        if waits_to_abort and room.aborts_in is not None:  # a target that never opened is its router's to tell
            if room.aborts_in == 0:
                room.side.abort("the soak gives it up")
            room.aborts_in -= 1
        if room.handed_over:
            return
        pages = range(room.slot * PAGES, (room.slot + 1) * PAGES)
        span = Span("kv", 0, TOKENS, tuple(pages))
        if isinstance(room.side, KVReceiver):
            self._words[:, room.slot] = -1
            room.side.publish([span], token_count=TOKENS)
            room.handed_over = True
        elif room.side.poll() is KVPoll.WaitingForInput:
            self._words[:, room.slot] = number
            room.side.submit([span], last=True, ready=ALWAYS_READY)
            room.handed_over = True

    def _outcome(self, number: int, room: _Live) -> str:
        error = room.side.error
        if error is not None:
            return error.code
        if self._spec.side == "target" and not (self._words[:, room.slot] == number).all():
            return "corrupt"
        return "success"

    def sample(self) -> dict[str, int]:
        """What this process holds now; cyclic garbage that waits for the interpreter's next full round is not held."""
        gc.collect()
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return {
            "rss_kib": int(status["VmRSS"].split()[0]),
            "python_blocks": sys.getallocatedblocks(),
            "threads": int(status["Threads"]),
            "python_threads": threading.active_count(),
            "fds": len(os.listdir("/proc/self/fd")),
            **self._manager.sizes(),
        }

    def stop(self) -> int:
        """Close; the number of rooms that are still leased."""
        leased = self._manager.leased_rooms
        self._manager.close()
        return leased


def serve(spec: SoakRankSpec, pipe: Connection) -> None:
    """Main of a rank's process: obey until told to stop. Errors go back on the pipe."""
    restrict(["127.0.0.1"])
    rank = SoakRank(spec, pipe)
    pipe.send(("ok", rank.describe()))
    while True:
        received = pipe.recv()
        if received == HALT:  # the batch had ended by itself
            continue
        command, arguments = received
        answer: tuple[str, Any]
        try:
            answer = ("ok", getattr(rank, command)(*arguments))
        except (KVBatonError, TransferFailedError) as error:
            answer = ("error", f"{command}: {error}")
        pipe.send(answer)
        if command == "stop":
            return

"""One prefill or decode server as the router knows it, and the requests that depend on it.

======== ============= ===================
state    new requests  those in flight
======== ============= ===================
new      no            go on
ready    yes           go on
suspect  no            go on
unfit    no            go on
draining no            go on, or are handed over
silent   no            lost
gone     no            lost
======== ============= ===================

Rules:

- What is learned of a worker is applied to what is in flight at once: whoever waits for one of its answers does so
  inside :meth:`Worker.leg`, which ends with PeerLostError in the moment in which the worker is known to be lost.
- A worker that says anything at all lives: whatever comes from it is told with :meth:`Worker.heard`.

This file must not know HTTP, rooms or how workers are chosen.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from dataclasses import dataclass, field
from enum import Enum
from types import TracebackType
from typing import Literal, Self
from urllib.parse import urlsplit

from kvbaton.discovery.names import audience_of_url
from kvbaton.errors import PeerLostError
from kvbaton.serving.router.breaker import Breaker
from kvbaton.serving.server.routing import BOOTSTRAP_PORT

Role = Literal["prefill", "decode"]
ROLES: tuple[Role, ...] = ("prefill", "decode")
_log = logging.getLogger(__name__)


class State(Enum):
    """See the table above."""

    NEW = "new"  # not probed yet, or it has not finished starting
    READY = "ready"
    SUSPECT = "suspect"  # a request lost its connection; the next probe will tell
    UNFIT = "unfit"  # it is not what it was given as, or does not let us in
    DRAINING = "draining"  # it is about to stop
    SILENT = "silent"  # it does not answer, though nothing says that it is gone
    GONE = "gone"  # nobody is there

    @property
    def is_lost(self) -> bool:
        """Nothing that was asked of the worker will be answered."""
        return self in (State.SILENT, State.GONE)


@dataclass(slots=True, eq=False)
class Worker:
    """One server. ``trouble`` says why it gets no requests; empty when it does."""

    role: Role
    url: str
    bootstrap_port: int = BOOTSTRAP_PORT
    state: State = State.NEW
    trouble: str = "not probed yet"
    signs_of_life: int = 0
    instance: str = ""  # which process it is, as it says
    model: str = ""  # under which name it serves its model, as it says
    max_model_len: int = 0  # tokens of prompt and answer together that it can see, as it says
    turn: int = 0  # when it was taken last; the smaller the longer ago
    breaker: Breaker = field(default_factory=Breaker, repr=False)
    _legs: set[Leg] = field(default_factory=set, repr=False)

    @property
    def usable(self) -> bool:
        return self.state is State.READY

    @property
    def id(self) -> str:
        """The same for the same role and address, also after a restart of the router."""
        return hashlib.blake2b(f"{self.role} {self.url}".encode(), digest_size=8).hexdigest()

    @property
    def legs(self) -> int:
        """How many requests depend on it now."""
        return len(self._legs)

    @property
    def host(self) -> str:
        """The host of the URL: where its registry listens, too."""
        return urlsplit(self.url).hostname or ""

    def leg(self) -> Leg:
        """The part of a request that needs this worker. See :class:`Leg`."""
        return Leg(self, self._legs)

    def heard(self) -> None:
        """It lives: something came from it."""
        self.signs_of_life += 1

    def become(self, state: State, trouble: str = "") -> None:
        """What was learned of it. Ends the legs of a worker that is lost."""
        if state is State.READY:
            trouble = ""
            if not self.usable:
                _log.info("%s takes requests", self)
        elif self.usable:
            _log.warning("%s takes no requests now: %s", self, trouble)
        self.state, self.trouble = state, trouble
        if state.is_lost:
            for leg in tuple(self._legs):
                leg.lose()

    def lost(self) -> PeerLostError:
        """The error of a request that depended on it."""
        return PeerLostError(f"the server is lost ({self.trouble}); send the request again", peer=str(self))

    @property
    def audience(self) -> str:
        """What tokens for it are made for: ``HOST:PORT``."""
        return audience_of_url(self.url)

    def __str__(self) -> str:
        return f"{self.role} {self.url}"


class Leg:
    """An asynchronous context manager, like ``asyncio.timeout``: its block is cancelled when the worker is lost, and
    ends with PeerLostError; entering it with a worker that is lost already does at once.

    While it is open the worker's :attr:`Worker.legs` count it. Of one use, in one task.
    """

    def __init__(self, worker: Worker, legs: set[Leg]) -> None:
        self._worker = worker
        self._legs = legs
        self._task: asyncio.Task[object] | None = None
        self._cancels_before = 0
        self._lost: PeerLostError | None = None

    async def __aenter__(self) -> Self:
        if self._worker.state.is_lost:
            raise self._worker.lost()
        self._task = asyncio.current_task()
        if self._task is None:
            raise RuntimeError("a leg belongs to a task")
        self._cancels_before = self._task.cancelling()
        self._legs.add(self)
        return self

    def lose(self) -> None:
        """The worker is lost. Idempotent."""
        if self._lost is None and self._task is not None:
            self._lost = self._worker.lost()
            self._task.cancel()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._legs.discard(self)
        if self._lost is not None and self._task is not None:
            is_ours_alone = self._task.uncancel() <= self._cancels_before
            if is_ours_alone and kind is not None and issubclass(kind, asyncio.CancelledError):
                raise self._lost from error

    def __repr__(self) -> str:
        return f"<Leg of {self._worker}{' lost' if self._lost else ''}>"

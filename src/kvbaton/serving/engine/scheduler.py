"""The thread that owns a model and its pools, and the doorway to it. What it does is its Role's business.

Rules: everything but ``submit``, ``abort``, ``end_all``, ``drain``, ``close``, ``stats`` and ``failure`` happens on the
one thread. It sleeps on one event, which new work and the KVManager share: the event is cleared before anything is
looked at, so no news is missed, and a role that reports no progress is not asked again before there is news. A role
never waits by itself.

This file must not know of models, pages or peers; it cannot tell prefill from decode.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from types import TracebackType

from kvbaton.errors import AbortedError, ConfigError, InternalError, KVBatonError, OverloadedError
from kvbaton.serving.engine.job import Job
from kvbaton.serving.engine.limits import Limits
from kvbaton.serving.engine.request import Output, Request
from kvbaton.serving.engine.stats import Stats

#: What a request is told that its engine cannot finish, on both sides.
STOPPING = "the engine that had this request is stopping; send it again"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig:
    """Bounds of a scheduler: prompt tokens per forward pass, answers per step, requests alive at once.

    ``prefix_cache``: decode keeps the pages of what it has seen and shares them.
    """

    chunked_prefill_size: int = 512
    max_batch: int = 32
    max_requests: int = 1024
    prefix_cache: bool = False

    def __post_init__(self) -> None:
        for name in ("chunked_prefill_size", "max_batch", "max_requests"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")


class Role(ABC):
    """What a scheduler does with its jobs. Called by its thread only, but for ``stats``."""

    @abstractmethod
    def add(self, job: Job) -> None:
        """Queue a valid job. Failures are the job's, never raised."""

    @abstractmethod
    def end(self, job: Job, error: KVBatonError) -> None:
        """End ``job`` now, with that error on both sides; its pages go back when no peer can touch them."""

    def hand_on(self, jobs: Sequence[Job], room: int) -> bool:
        """Let another engine have the answers of ``jobs`` that have not ended, each in a room by itself, ``room`` and
        those that follow. False where that cannot be: nothing has changed then."""
        del jobs, room
        return False

    @abstractmethod
    def step(self) -> bool:
        """Do one round of work, as long as one forward pass or two. False if there was nothing to do."""

    @property
    @abstractmethod
    def busy(self) -> bool:
        """Whether anything is still held: a queued job, a page, a lease."""

    @abstractmethod
    def stats(self) -> Stats:
        """Callable from every thread."""


class Scheduler:
    """A running engine. Use as a context manager, or call ``start`` and ``close``."""

    def __init__(
        self,
        role: Role,
        limits: Limits,
        config: SchedulerConfig,
        *,
        wakeup: threading.Event,
        name: str,
    ) -> None:
        self._role = role
        self._limits = limits
        self._max_requests = config.max_requests
        self._wakeup = wakeup
        self._thread = threading.Thread(target=self._run, name=f"kvbaton-{name}", daemon=True)
        self._lock = threading.Condition()
        self._inbox: deque[Callable[[], None]] = deque()
        self._jobs: dict[str, Job] = {}
        self._refusal: KVBatonError | None = None
        self._closing = False
        self._forced = False
        self._quiet = True
        self._stopped = False

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: Request, on_output: Callable[[Output], None]) -> None:
        """Queue ``request``; ``on_output`` is called from the scheduler's thread and must not block.

        Raises ConfigError or CapacityError for a request that is wrong or can never fit, OverloadedError when too many
        are alive or the engine is draining, InternalError when its thread has died.
        """
        self._limits.validate(request)
        job = Job(request, on_output, self._forget)
        with self._lock:
            if self._refusal is not None:
                raise self._refusal.again()
            if request.request_id in self._jobs:
                raise ConfigError(f"request_id: {request.request_id!r} is in use by a request that has not ended")
            if len(self._jobs) >= self._max_requests:
                raise OverloadedError(f"{self._max_requests} requests are alive already; try again later")
            self._jobs[request.request_id] = job
            self._quiet = False
            self._inbox.append(lambda: self._role.add(job))
        self._wakeup.set()

    def abort(self, request_id: str, reason: str = "aborted by the client") -> None:
        """End a request soon. An unknown or ended one is ignored."""
        with self._lock:
            job = self._jobs.get(request_id)
            if job is None:
                return
            self._inbox.append(lambda: self._end(job, AbortedError(reason, room=job.request.room)))
        self._wakeup.set()

    def hand_on(self, request_ids: Sequence[str], room: int) -> None:
        """Let the engine that opens ``room`` and those behind it have the answers of these requests; see
        :meth:`Role.hand_on`. Soon their outputs are ``departing``, or they go on as if nothing had been asked."""
        with self._lock:
            self._inbox.append(lambda: self._hand_on(request_ids, room))
        self._wakeup.set()

    def end_all(self, error: KVBatonError) -> None:
        """End every request soon, with that error."""
        with self._lock:
            self._inbox.append(lambda: self._end_all(error))
        self._wakeup.set()

    def drain(self, timeout_seconds: float | None = None) -> bool:
        """Refuse new requests and wait until all have ended and no page is held. False if time ran out."""
        with self._lock:
            self._refuse(OverloadedError("the engine is draining; send requests to another one"))
        return self.wait_quiet(timeout_seconds)

    def wait_quiet(self, timeout_seconds: float | None = None) -> bool:
        """Wait until nothing is queued, running or held. False if time ran out first."""
        self._wakeup.set()
        with self._lock:
            self._lock.wait_for(lambda: self._quiet or self._stopped, timeout_seconds)
            return self._quiet

    def close(self, timeout_seconds: float = 30.0) -> bool:
        """End everything, wait for leases to end, stop the thread. Idempotent.

        False if pages were still leased when time ran out: their memory must stay until the manager is closed.
        """
        with self._lock:
            self._refuse(OverloadedError("the engine is closed"))
            self._closing = True
        self._wakeup.set()
        if self._thread.ident is None:
            return True
        self._thread.join(timeout_seconds)
        clean = not self._thread.is_alive() and not self._role.busy
        self._forced = True
        self._wakeup.set()
        self._thread.join(timeout_seconds)
        return clean

    def stats(self) -> Stats:
        return self._role.stats()

    @property
    def failure(self) -> KVBatonError | None:
        """What the thread has died of."""
        return self._refusal if isinstance(self._refusal, InternalError) else None

    def __enter__(self) -> Scheduler:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Scheduler({self._thread.name}, {len(self._jobs)} requests, {self.stats()})"

    # What follows runs on the scheduler's thread.

    def _run(self) -> None:
        try:
            while not self._finished():
                self._wakeup.clear()
                worked = self._take_inbox()
                if self._closing:
                    self._end_all(OverloadedError(STOPPING))
                if not (self._role.step() or worked):
                    self._sleep()
        except Exception as error:  # noqa: BLE001 - the top of the thread: nobody above could tell the callers
            self._die(error)
        finally:
            with self._lock:
                self._quiet = self._at_rest
                self._stopped = True
                self._lock.notify_all()

    def _take_inbox(self) -> bool:
        worked = bool(self._inbox)
        while self._inbox:
            self._inbox.popleft()()
        return worked

    def _sleep(self) -> None:
        with self._lock:
            self._quiet = self._at_rest
            self._lock.notify_all()
        self._wakeup.wait()

    def _finished(self) -> bool:
        return self._forced or (self._closing and self._at_rest)

    @property
    def _at_rest(self) -> bool:
        return not (self._inbox or self._jobs or self._role.busy)

    def _hand_on(self, request_ids: Sequence[str], room: int) -> None:
        jobs = [self._jobs[name] for name in request_ids if name in self._jobs]
        if not (jobs and self._role.hand_on(jobs, room)):
            logger.info("%d requests stay here: not all of their answers have begun", len(request_ids))

    def _end(self, job: Job, error: KVBatonError) -> None:
        if not job.done:
            self._role.end(job, error)

    def _end_all(self, error: KVBatonError) -> None:
        for job in list(self._jobs.values()):
            room = job.request.room
            self._end(job, copy(error) if room is None else error.in_room(room))

    def _forget(self, request: Request) -> None:
        with self._lock:
            self._jobs.pop(request.request_id, None)

    def _refuse(self, error: KVBatonError) -> None:
        if not isinstance(self._refusal, InternalError):
            self._refusal = error

    def _die(self, error: Exception) -> None:
        logger.critical("the scheduler thread %s died", self._thread.name, exc_info=error)
        broken = InternalError("the engine's scheduler died; restart the server and report its log")
        broken.__cause__ = error
        with self._lock:
            self._refuse(broken)
            jobs = list(self._jobs.values())
        for job in jobs:
            job.fail(broken.again())

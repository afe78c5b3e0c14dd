"""The prefill and decode servers behind a router: which of them answer, and whose turn it is.

Rules:

- A worker is usable once a probe has succeeded, and again after every later one: nothing is held against it for good.
- A refused connection or an answer other than 200 takes it out at once; silence does so after ``failure_threshold``
  probes in a row in which nothing came from it, because a busy server may be slow.
- A request that loses its connection proves nothing of other requests: the worker is suspect, and probed at once.
- Probes ask a worker's ``/ready``, so that one that is starting or draining gets no request, though it lives. An answer
  of any kind is a sign of life.

This file must not know of rooms or requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import aiohttp
import msgspec

from kvbaton.errors import ConfigError, PeerLostError
from kvbaton.serving.router.worker import ROLES, Role, State, Worker
from kvbaton.serving.server.routing import BOOTSTRAP_PORT

MAX_REASON_BYTES = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class HealthChecks:
    """How workers are probed.

    Args:
        endpoint: the route that is asked.
        interval_secs: from the end of one round of probes to the next.
        timeout_secs: how long a worker may take to answer one.
        failure_threshold: unanswered probes in a row, with nothing else from the worker either, that make it silent.
    """

    endpoint: str = "/ready"
    interval_secs: float = 1.0
    timeout_secs: float = 2.0
    failure_threshold: int = 2


def parse_worker(role: Role, values: Sequence[str]) -> Worker:
    """From ``URL [BOOTSTRAP_PORT]``. Raises ConfigError."""
    url = values[0].rstrip("/")
    try:
        parts = urlsplit(url)
        usable = parts.scheme == "http" and bool(parts.hostname) and (parts.port or 80) > 0
    except ValueError:
        usable = False
    if not usable or parts.path or parts.query or parts.username:
        raise ConfigError(f"--{role} {values[0]!r} is not a URL like http://127.0.0.1:30000")
    if len(values) > (2 if role == "prefill" else 1):
        raise ConfigError(f"--{role} takes {'URL [BOOTSTRAP_PORT]' if role == 'prefill' else 'one URL'}")
    port = values[1] if len(values) == 2 else str(BOOTSTRAP_PORT)
    if not (port.isdecimal() and 0 < int(port) <= 65535):
        raise ConfigError(f"--{role} {url}: bootstrap port {port!r} is not a port")
    return Worker(role, url, int(port))


def check_roles(workers: Sequence[Worker]) -> None:
    """Raises ConfigError unless there is a worker of each role, and no URL twice within one."""
    for role in ROLES:
        urls = [worker.url for worker in workers if worker.role == role]
        if not urls:
            raise ConfigError(f"a router needs at least one --{role} URL")
        if len(set(urls)) != len(urls):
            raise ConfigError(f"--{role} names {max(urls, key=urls.count)} twice")


class Workers:
    """All workers of one router, with a turn per role."""

    def __init__(
        self,
        workers: Sequence[Worker],
        session: aiohttp.ClientSession,
        checks: HealthChecks | None = None,
    ) -> None:
        self._workers = tuple(workers)
        self._session = session
        self._checks = checks if checks is not None else HealthChecks()
        self._unanswered: dict[Worker, int] = {}
        self._round: asyncio.Task[None] | None = None
        self._extra: set[asyncio.Task[None]] = set()
        self._turns: dict[str, int] = {"prefill": 0, "decode": 0}

    @property
    def all(self) -> tuple[Worker, ...]:
        return self._workers

    def usable(self, role: Role) -> list[Worker]:
        return [worker for worker in self._workers if worker.role == role and worker.usable]

    def next(self, role: Role, *, without: Worker | None = None) -> Worker:
        """The worker whose turn it is. Raises PeerLostError that names every one and its trouble."""
        candidates = [worker for worker in self.usable(role) if worker is not without]
        if not candidates:
            troubles = "; ".join(
                f"{worker.url}: {worker.trouble or 'it failed'}" for worker in self._workers if worker.role == role
            )
            raise PeerLostError(f"no {role} server takes requests ({troubles}); start one or wait until it is ready")
        turn = self._turns[role]
        self._turns[role] = turn + 1
        return candidates[turn % len(candidates)]

    async def find(self, role: Role) -> Worker:
        """Like :meth:`next`, but where no worker is usable it probes once more before it gives up: the first request
        after a restart must not wait for the next round of probes."""
        for _ in range(2):  # a round that was under way may have asked before the server was there
            if not self.usable(role):
                await self._probe_once()
        return self.next(role)

    def suspect(self, worker: Worker, trouble: str) -> None:
        """A request lost its connection to it, or was never let in: no more requests until a probe succeeds."""
        if worker.usable:
            worker.become(State.SUSPECT, trouble or "it failed")
        if not self._extra:
            probe = asyncio.create_task(self._probe_once())
            self._extra.add(probe)
            probe.add_done_callback(self._extra.discard)

    async def probe_all(self) -> None:
        """Probe every worker once."""
        await asyncio.gather(*(self._probe(worker) for worker in self._workers))

    async def _probe_once(self) -> None:
        """Join the round of probes that is under way, or start one."""
        if self._round is None or self._round.done():
            self._round = asyncio.create_task(self.probe_all())
        await asyncio.shield(self._round)

    async def probe_forever(self) -> None:
        """Probe until cancelled."""
        while True:
            await self._probe_once()
            await asyncio.sleep(self._checks.interval_secs)

    async def _probe(self, worker: Worker) -> None:
        signs = worker.signs_of_life
        path = self._checks.endpoint
        timeout = aiohttp.ClientTimeout(total=self._checks.timeout_secs)
        try:
            async with self._session.get(worker.url + path, timeout=timeout, allow_redirects=False) as response:
                worker.heard()
                told = _told(await response.content.read(MAX_REASON_BYTES)) if response.status != 200 else None
        except TimeoutError:
            self._no_answer(worker, signs, f"{path} does not answer")
            return
        except (aiohttp.ClientError, OSError) as error:
            trouble = f"cannot be reached ({cause_of(error)})"
            if is_refusal(error):
                worker.become(State.GONE, trouble)
            else:
                self._no_answer(worker, signs, trouble)
            return
        self._unanswered.pop(worker, None)
        if told is None:
            worker.become(State.READY)
        else:
            reason = f" ({told.reason})" if told.reason else ""
            state = State.DRAINING if told.draining else State.NEW
            worker.become(state, f"{path} answers HTTP {response.status}{reason}")

    def _no_answer(self, worker: Worker, signs: int, trouble: str) -> None:
        if worker.signs_of_life != signs:  # it answers requests, so it is only slow
            self._unanswered.pop(worker, None)
            return
        unanswered = self._unanswered[worker] = self._unanswered.get(worker, 0) + 1
        if unanswered >= self._checks.failure_threshold:
            worker.become(State.SILENT, trouble)
        elif not worker.usable:
            worker.become(worker.state, trouble)


def is_refusal(error: BaseException) -> bool:
    """Nobody listens at the worker's port: its process is gone."""
    if isinstance(error, aiohttp.ClientConnectorError):
        error = error.os_error
    return isinstance(error, ConnectionRefusedError)


def cause_of(error: Exception) -> str:
    """A connection error without aiohttp's address and TLS details: the worker's name stands beside it anyway."""
    if isinstance(error, aiohttp.ClientConnectorError):
        error = error.os_error
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class _Told(msgspec.Struct):
    """What a server that is not ready says about it."""

    reason: str = ""
    draining: bool = False


def _told(payload: bytes) -> _Told:
    try:
        return msgspec.json.decode(payload, type=_Told)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return _Told()

"""The prefill and decode servers behind a router: which of them answer, and whose turn it is.

Rules:

- A worker is usable once a probe has succeeded, and again after every later one: nothing is held against it for good.
- A refused connection or an answer other than 200 takes it out at once; silence does so at the second probe in a row,
  because a busy server may be slow. A request that finds it gone takes it out without waiting for a probe.
- Probes ask a worker's ``/ready``, so that one that is starting or draining gets no request, though it lives.

This file must not know of rooms or requests.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

import aiohttp
import msgspec

from kvbaton.errors import ConfigError, PeerLostError
from kvbaton.serving.server.routing import BOOTSTRAP_PORT

#: Probes in a row that may go unanswered before a worker is out.
SILENT_PROBES = 2
MAX_REASON_BYTES = 4096
Role = Literal["prefill", "decode"]
ROLES: tuple[Role, ...] = ("prefill", "decode")
_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Worker:
    """One server. ``trouble`` says why it gets no requests; empty when it does."""

    role: Role
    url: str
    bootstrap_port: int = BOOTSTRAP_PORT
    trouble: str = "not probed yet"
    silent: int = 0

    @property
    def usable(self) -> bool:
        return not self.trouble

    @property
    def host(self) -> str:
        """The host of the URL: where its registry listens, too."""
        return urlsplit(self.url).hostname or ""

    def __str__(self) -> str:
        return f"{self.role} {self.url}"


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
        *,
        health_check_endpoint: str = "/ready",
        probe_timeout_seconds: float = 2.0,
    ) -> None:
        self._workers = tuple(workers)
        self._session = session
        self._probe_path = health_check_endpoint
        self._timeout = aiohttp.ClientTimeout(total=probe_timeout_seconds)
        self._round: asyncio.Task[None] | None = None
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
        if not self.usable(role):
            await self._probe_once()
        return self.next(role)

    def take_out(self, worker: Worker, trouble: str) -> None:
        """Send no more requests until a probe succeeds."""
        if worker.usable:
            _log.warning("%s takes no requests now: %s", worker, trouble)
        worker.trouble = trouble or "it failed"

    async def probe_all(self) -> None:
        """Probe every worker once."""
        await asyncio.gather(*(self._probe(worker) for worker in self._workers))

    async def _probe_once(self) -> None:
        """Join the round of probes that is under way for other requests, or start one."""
        if self._round is None or self._round.done():
            self._round = asyncio.create_task(self.probe_all())
        await asyncio.shield(self._round)

    async def probe_forever(self, interval_seconds: float) -> None:
        """Probe until cancelled."""
        while True:
            await self.probe_all()
            await asyncio.sleep(interval_seconds)

    async def _probe(self, worker: Worker) -> None:
        try:
            async with self._session.get(
                worker.url + self._probe_path, timeout=self._timeout, allow_redirects=False
            ) as response:
                if response.status != 200:
                    reason = _reason(await response.content.read(MAX_REASON_BYTES))
                    self.take_out(worker, f"{self._probe_path} answers HTTP {response.status}{reason}")
                    return
        except TimeoutError:
            worker.silent += 1
            if worker.silent >= SILENT_PROBES or not worker.usable:
                self.take_out(worker, f"{self._probe_path} does not answer")
            return
        except (aiohttp.ClientError, OSError) as error:
            self.take_out(worker, f"cannot be reached ({cause_of(error)})")
            return
        if not worker.usable:
            _log.info("%s takes requests", worker)
        worker.trouble = ""
        worker.silent = 0


def cause_of(error: Exception) -> str:
    """A connection error without aiohttp's address and TLS details: the worker's name stands beside it anyway."""
    if isinstance(error, aiohttp.ClientConnectorError):
        error = error.os_error
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _reason(payload: bytes) -> str:
    """What a server that is not ready says about it, for our log."""
    try:
        answer = msgspec.json.decode(payload, type=dict[str, object])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ""
    return f" ({answer['reason']})" if answer.get("reason") else ""

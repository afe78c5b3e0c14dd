"""The prefill and decode servers behind a router: which of them answer, and whose turn it is.

Rules:

- A worker is usable once a probe has succeeded, and again after every later one: nothing is held against it for good.
- A refused connection or an answer other than 200 takes it out at once; silence does so after ``failure_threshold``
  probes in a row in which nothing came from it, because a busy server may be slow.
- A request that loses its connection proves nothing of other requests: the worker is suspect, and probed at once. It is
  a failure for its circuit breaker as well: a worker that answers probes and drops what it is asked gets ever less.
- Probes ask a worker's ``/ready``, so that one that is starting or draining gets no request, though it lives. An answer
  of any kind is a sign of life. It also says what the worker is, and whether it lets this router in: the probe carries
  the router's token, and a worker that is of the other role, or would refuse us, is not used.
- A worker that is taken out is probed for as long as something that it was asked goes on, and gets nothing new.
- What a process was asked is lost with it, also where another one is at its address by the time of the next probe.

This file must not know of rooms or requests.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import aiohttp

from kvbaton.discovery.client import cause_of
from kvbaton.errors import ConfigError, PeerLostError
from kvbaton.serving.router.breaker import Breaker, BreakerSettings
from kvbaton.serving.router.credentials import Credentials, no_credentials
from kvbaton.serving.router.own_limits import is_our_own
from kvbaton.serving.router.pairs import Pairs
from kvbaton.serving.router.policies.base import Policy
from kvbaton.serving.router.policies.round_robin import RoundRobin
from kvbaton.serving.router.probe import MAX_PROBE_BYTES, decoded
from kvbaton.serving.router.worker import ROLES, Role, State, Worker
from kvbaton.serving.server.failure import DRAINING
from kvbaton.serving.server.routing import BOOTSTRAP_PORT

#: Every pair of them is checked.
MAX_WORKERS = 512
_log = logging.getLogger(__name__)


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
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
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


def check_roles(workers: Sequence[Worker], *, may_be_none: bool = False) -> None:
    """Raises ConfigError unless there is a worker of each role, and no URL twice within one. ``may_be_none``: others
    come at run time."""
    for role in ROLES:
        urls = [worker.url for worker in workers if worker.role == role]
        if not urls and not may_be_none:
            raise ConfigError(f"a router needs at least one --{role} URL, or a --workers-file")
        if len(set(urls)) != len(urls):
            raise ConfigError(f"--{role} names {max(urls, key=urls.count)} twice")


class Workers:
    """All workers of one router, and whose turn it is: ``policies`` says that for each role, by default in turn."""

    def __init__(
        self,
        workers: Sequence[Worker],
        session: aiohttp.ClientSession,
        checks: HealthChecks | None = None,
        *,
        policies: Mapping[Role, Policy] | None = None,
        breakers: BreakerSettings | None = None,
        as_router: Credentials = no_credentials,
        as_operator: Credentials = no_credentials,
    ) -> None:
        self._workers = list(workers)
        self._leaving: list[Worker] = []
        self._session = session
        self._checks = checks if checks is not None else HealthChecks()
        self._credentials = as_router
        self._pairs = Pairs(session, as_router, as_operator)
        self._breakers = breakers
        for worker in workers:
            worker.breaker = Breaker(breakers)
        self._unanswered: dict[Worker, int] = {}
        self._paired = asyncio.Event()  # there has been a pair
        self._round: asyncio.Task[None] | None = None
        self._extra: set[asyncio.Task[None]] = set()
        self._policies = policies if policies is not None else {role: RoundRobin() for role in ROLES}
        self._turn = 0

    @property
    def all(self) -> tuple[Worker, ...]:
        return tuple(self._workers)

    def add(self, worker: Worker) -> None:
        """One more, which is probed at once. Raises ConfigError for one that is there, and above a bound."""
        if any((one.role, one.url) == (worker.role, worker.url) for one in self._workers):
            raise ConfigError(f"url: {worker} is there already")
        if len(self._workers) >= MAX_WORKERS:
            raise ConfigError(f"url: a router has at most {MAX_WORKERS} workers")
        worker.breaker = Breaker(self._breakers)
        self._workers.append(worker)
        self._probe_soon()

    def remove(self, worker: Worker) -> None:
        """No request goes there any more; those that did go on."""
        self._workers.remove(worker)
        self._leaving.append(worker)
        self._pairs.forget(worker)
        self._policies[worker.role].forget(worker)

    def usable(self, role: Role) -> list[Worker]:
        return [worker for worker in self._workers if worker.role == role and worker.usable]

    def pairs(self) -> list[tuple[Worker, Worker]]:
        """Every prefill and decode server that a request may be sent to now, together. One whose circuit is open is
        left out where there is another one."""
        decodes = self.usable("decode")
        fitting = [
            (prefill, decode)
            for prefill in self.usable("prefill")
            for decode in decodes
            if not self._pairs.trouble(prefill, decode)
        ]
        return [pair for pair in fitting if all(worker.breaker.allows for worker in pair)] or fitting

    def failed(self, worker: Worker, kind: str, trouble: str) -> None:
        """A request failed by this worker's doing, which ``kind`` names, although it answers."""
        if worker.breaker.failed(kind):
            _log.warning("%s fails every request with %s and gets fewer: %s", worker, kind, trouble)

    def succeeded(self, pair: tuple[Worker, Worker]) -> None:
        """A request was answered by these two."""
        for worker in pair:
            if worker.breaker.succeeded():
                _log.info("%s answers again", worker)

    def not_ready(self) -> str:
        """Why no request can be sent anywhere; empty where there is a pair."""
        if self.pairs():
            return ""
        missing = [role for role in ROLES if not self.usable(role)]
        if missing:
            return f"no {' and no '.join(missing)} server takes requests"
        prefill, decode = self.usable("prefill")[0], self.usable("decode")[0]
        return f"{prefill} and {decode} cannot hand over: {self._pairs.trouble(prefill, decode)}"

    def choose(self, prompt: bytes, pairs: Sequence[tuple[Worker, Worker]]) -> tuple[Worker, Worker]:
        """The pair whose turn it is, of at least one. ``prompt``: see :meth:`Policy.choose`."""
        prefill = self._take("prefill", {one for one, _ in pairs}, prompt)
        decode = self._take("decode", {two for one, two in pairs if one is prefill}, prompt)
        return prefill, decode

    def _take(self, role: Role, candidates: Iterable[Worker], prompt: bytes) -> Worker:
        places = {worker: place for place, worker in enumerate(self._workers)}
        in_turn = sorted(candidates, key=lambda worker: (worker.turn, places[worker]))
        worker = self._policies[role].choose(in_turn, prompt)
        self._turn += 1
        worker.turn = self._turn
        worker.breaker.taken()
        return worker

    async def known_pairs(self) -> list[tuple[Worker, Worker]]:
        """Like :meth:`pairs`, but where there is none workers are probed once more first: a request after a restart
        must not wait for the next round, and one after a failure not give up for a suspicion. Where all of one role are
        silent that is not done: whoever asks them waits for nothing, and the next round asks them in any case."""
        for _ in range(2):  # a round that was under way may have asked before the server was there
            if not self.pairs() and not any(self._all_silent(role) for role in ROLES):
                await self._probe_once()
        return self.pairs()

    def _all_silent(self, role: Role) -> bool:
        return all(worker.state is State.SILENT for worker in self._workers if worker.role == role)

    async def find_pair(self, prompt: bytes = b"") -> tuple[Worker, Worker]:
        """The pair whose turn it is, of those that are known. Raises PeerLostError that names every worker and its
        trouble."""
        pairs = await self.known_pairs()
        if not pairs:
            raise PeerLostError(f"{self.not_ready()}{self._troubles(*ROLES)}; start one or wait until it is ready")
        return self.choose(prompt, pairs)

    async def find(self, role: Role) -> Worker:
        """Like :meth:`find_pair`, for a question that needs one worker only."""
        for _ in range(2):
            if not self.usable(role) and not self._all_silent(role):
                await self._probe_once()
        candidates = self.usable(role)
        if not candidates:
            trouble = f"no {role} server takes requests{self._troubles(role)}"
            raise PeerLostError(f"{trouble}; start one or wait until it is ready")
        return min(candidates, key=lambda worker: worker.legs)

    def _troubles(self, *roles: Role) -> str:
        told = [
            f"{worker.url}: {worker.trouble}" for worker in self._workers if worker.trouble and worker.role in roles
        ]
        return f" ({'; '.join(told)})" if told else ""

    def suspect(self, worker: Worker, kind: str, trouble: str) -> None:
        """A request lost its connection to it, or was never let in: no more requests until a probe succeeds. All that
        lose theirs until then have lost them to one failure of this ``kind``."""
        if worker.usable:
            worker.become(State.SUSPECT, trouble or "it failed")
            if kind != DRAINING:
                self.failed(worker, kind, trouble)
        self._probe_soon()

    def _probe_soon(self) -> None:
        if not self._extra:
            probe = asyncio.create_task(self._probe_once())
            self._extra.add(probe)
            probe.add_done_callback(self._extra.discard)

    async def probe_all(self) -> None:
        """Probe every worker once, and check the pairs that have become possible."""
        self._leaving = [worker for worker in self._leaving if worker.legs]
        probed = {*self._workers, *self._leaving}
        self._unanswered = {worker: count for worker, count in self._unanswered.items() if worker in probed}
        await asyncio.gather(*map(self._probe, probed))
        await self._pairs.check(self.usable("prefill"), self.usable("decode"))
        if self.pairs():
            self._paired.set()

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

    async def started(self, seconds: float) -> None:
        """Wait for the first pair. Raises PeerLostError after ``seconds``, with every worker's trouble."""
        try:
            async with asyncio.timeout(seconds):
                await self._paired.wait()
        except TimeoutError:
            raise PeerLostError(f"{self.not_ready()} within {seconds:g} s{self._troubles(*ROLES)}") from None

    async def _probe(self, worker: Worker) -> None:
        signs = worker.signs_of_life
        path = self._checks.endpoint
        timeout = aiohttp.ClientTimeout(total=self._checks.timeout_secs)
        try:
            async with self._session.get(
                worker.url + path, timeout=timeout, headers=self._credentials(worker), allow_redirects=False
            ) as response:
                worker.heard()
                answer = decoded(await response.content.read(MAX_PROBE_BYTES))
        except TimeoutError:
            self._no_answer(worker, signs, f"{path} does not answer")
            return
        except (aiohttp.ClientError, OSError) as error:
            if is_our_own(error):
                return  # the worker has not been asked
            trouble = f"cannot be reached ({cause_of(error)})"
            if is_refusal(error):
                worker.become(State.GONE, trouble)
            else:
                self._no_answer(worker, signs, trouble)
            return
        self._unanswered.pop(worker, None)
        if worker.instance and answer.instance and answer.instance != worker.instance:
            worker.become(State.GONE, "another process is at its address")
            worker.breaker = Breaker(self._breakers)
        worker.instance = answer.instance or worker.instance
        worker.model, worker.max_model_len = answer.model, answer.max_model_len
        served = self._served() if worker.role == "decode" else ""  # prefill is not told the name
        worker.become(*answer.verdict(worker.role, path, response.status, served))

    def _served(self) -> str:
        """The name under which most decode servers serve the model, the first of them where they are as many."""
        names = [one.model for one in self._workers if one.role == "decode" and one.model and not one.state.is_lost]
        return max(names, key=names.count, default="")

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

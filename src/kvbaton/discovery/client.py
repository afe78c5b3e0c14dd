"""A rank's side of the bootstrap registry: register and keep registered, look the prefill group up.

Rules:

- Every call has a timeout and a bounded number of attempts with growing pauses; a refusal that a retry cannot change
  (400, 401, 409) ends at once.
- A failure is a RegistryError that names host and port and says what to do.
- Redirects are not followed and answers are read up to a bound: the address may have come from a request. For the same
  reason tokens are made for the host and port that is asked, and with a secret an answer counts only if it proves that
  whoever gave it knows the secret.
- With a secret whoever registers asks for the registry's time first, and signs it: no registration counts twice.
- What one client has registered it alone withdraws: it has the key.
- A lookup is bounded as a whole, and who asks while one is under way shares its outcome, whatever it is.
- Lookups are cached for less time than a process needs to start, so a cached address never outlives a restart, and
  callers :meth:`RegistryClient.invalidate` when a peer turned out to be lost.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Annotated, TypeVar

import aiohttp
import msgspec
from yarl import URL

from kvbaton.discovery.access import is_printable_host
from kvbaton.discovery.freshness import MAX_TIME_CHARACTERS
from kvbaton.discovery.names import audience_of
from kvbaton.discovery.placement import PLACED_SECONDS, checked_rank, known_rank
from kvbaton.discovery.proof import MAC_HEADER, TIME_PATH, Asked
from kvbaton.discovery.registry import (
    REFRESH_SECONDS,
    Registered,
    Registration,
    RoomRank,
    Route,
    Topology,
    lock_of,
)
from kvbaton.errors import AuthenticationError, ConfigError, KVBatonError, LocalProtocolError, RegistryError

CACHE_SECONDS = 1.0
#: Most registries whose lookups are remembered.
MAX_CACHED = 64
#: Largest answer in bytes: 4096 ranks at about 500 bytes each.
MAX_ANSWER_BYTES = 4 << 20
#: Longest time of one lookup, its attempts and pauses together: a router has other prefill servers to try.
LOOKUP_SECONDS = 6.0
FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 2.0
#: Pauses between questions for a room that the prefill server has not seen yet.
FIRST_ASK_SECONDS = 0.01
LONGEST_ASK_SECONDS = 0.5

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class _Refused(Exception):
    """An attempt failed in a way that a later one may not."""


class RegistryClient:
    """Talks to any number of registries. Use it inside one event loop and close it there.

    Args:
        secret: the deployment's shared secret; tokens that follow from it are sent, never the secret.
        timeout_seconds: limit of one attempt.
        attempts: how often a call tries before it raises.
        lookup_seconds: limit of a lookup, whatever number of attempts it has.
        clock, sleep: time, injected by tests.
    """

    def __init__(
        self,
        *,
        secret: str | None = None,
        timeout_seconds: float = 5.0,
        attempts: int = 4,
        lookup_seconds: float = LOOKUP_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._secret = secret
        self._timeout_seconds = timeout_seconds
        self._attempts = attempts
        self._lookup_seconds = lookup_seconds
        self._clock = clock
        self._sleep = sleep
        self._session: aiohttp.ClientSession | None = None
        self._key = secrets.token_hex(16)  # of what it registers
        self._cache: OrderedDict[tuple[str, int], tuple[float, Topology]] = OrderedDict()
        self._lookups: dict[tuple[str, int], asyncio.Task[Topology]] = {}

    async def __aenter__(self) -> RegistryClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End what is under way and close the connections. Idempotent."""
        for lookup in self._lookups.values():
            lookup.cancel()
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def register(self, host: str, port: int, route: Route) -> Registered:
        """Register one rank. Raises RegistryError (also at a place that is held), AuthenticationError, ConfigError,
        LocalProtocolError (a place of the registry's own process)."""
        body = msgspec.json.encode(Registration(route=route, lock=lock_of(self._key)))
        answer = await self._call("PUT", host, port, body=body)
        return _decode(answer, Registered, host, port)

    async def unregister(self, host: str, port: int, instance: str) -> None:
        """Take out a rank that this client registered. Raises like :meth:`register`."""
        await self._call("DELETE", host, port, query={"instance": instance, "key": self._key})

    async def register_forever(
        self,
        host: str,
        port: int,
        route: Route,
        *,
        refresh_seconds: float = REFRESH_SECONDS,
        registered: Callable[[Registered], None] | None = None,
    ) -> None:
        """Register, and again every ``refresh_seconds``, until cancelled; a registry that restarts learns us anew.

        ``registered`` is called after each success. Raises only what waiting cannot cure: a wrong secret, a wrong
        registration, or a place of the registry's own process.
        """
        reachable = True
        while True:
            try:
                answer = await self.register(host, port, route)
            except RegistryError as error:
                if reachable:
                    _log.warning("%s; trying on", error)
                reachable = False
            else:
                if not reachable:
                    _log.info("registered again at %s:%d", host, port)
                reachable = True
                if registered is not None:
                    registered(answer)
            await self._sleep(refresh_seconds)

    async def topology(self, host: str, port: int) -> Topology:
        """The complete prefill group behind a registry, from the cache if fresh. Raises like :meth:`register`."""
        key = (host, port)
        cached = self._cache.get(key)
        if cached is not None and self._clock() < cached[0]:
            return cached[1]
        lookup = self._lookups.get(key)
        if lookup is None:
            lookup = self._lookups[key] = asyncio.create_task(self._look_up(host, port))
            lookup.add_done_callback(lambda done: self._looked_up(key, done))
        try:
            return await asyncio.shield(lookup)
        except KVBatonError as error:
            raise error.again() from None  # it is that of everybody who asked

    async def _look_up(self, host: str, port: int) -> Topology:
        try:
            async with asyncio.timeout(self._lookup_seconds):
                answer = await self._call("GET", host, port)
        except TimeoutError:
            raise RegistryError(
                f"the bootstrap registry at {host}:{port} did not answer within {self._lookup_seconds:g} s; "
                f"check that the prefill server is up and serves its registry there",
                peer=f"{host}:{port}",
            ) from None
        return _decode(answer, Topology, host, port)

    def _looked_up(self, key: tuple[str, int], lookup: asyncio.Task[Topology]) -> None:
        del self._lookups[key]
        if lookup.cancelled() or lookup.exception() is not None:
            return
        self._cache[key] = (self._clock() + CACHE_SECONDS, lookup.result())
        while len(self._cache) > MAX_CACHED:
            self._cache.popitem(last=False)

    async def sources(
        self,
        host: str,
        port: int,
        room: int,
        *,
        named: int | None = None,
        patience_seconds: float = PLACED_SECONDS,
    ) -> tuple[str, ...]:
        """Control addresses of the ranks that prefill a room, tp fastest: those of one data-parallel rank.

        ``named``: the data-parallel rank that the request asks for. Where only the prefill server knows which one it
        is, it is asked until the request has come there, for ``patience_seconds`` at most. Raises like
        :meth:`register`, and ConfigError for a rank that does not exist.
        """
        topology = await self.topology(host, port)
        size = topology.sizes.dp
        rank = known_rank(room, size=size, balance=topology.load_balance, named=named)
        if rank is None:
            rank = checked_rank(await self._placed(host, port, room, patience_seconds), size, "dp_rank")
        return topology.addresses(rank)

    async def _placed(self, host: str, port: int, room: int, patience_seconds: float) -> int:
        """The data-parallel rank that has taken a room, once one has."""
        until = self._clock() + patience_seconds
        pause = FIRST_ASK_SECONDS
        while True:
            answer = await self._call("GET", host, port, path="/dp_rank", query={"room": str(room)})
            rank = _decode(answer, RoomRank, host, port).dp_rank
            if rank is not None:
                return rank
            if self._clock() + pause > until:
                raise RegistryError(
                    f"the prefill server at {host}:{port} has not seen this room within {patience_seconds:g} s; "
                    f"a request goes to the prefill and to the decode server at once",
                    peer=f"{host}:{port}",
                    room=room,
                )
            await self._sleep(pause)
            pause = min(pause * 2, LONGEST_ASK_SECONDS)

    def invalidate(self, host: str, port: int) -> None:
        """Forget a cached lookup, because a peer it named was lost."""
        self._cache.pop((host, port), None)

    async def _call(
        self,
        method: str,
        host: str,
        port: int,
        *,
        path: str = "/route",
        body: bytes = b"",
        query: dict[str, str] | None = None,
    ) -> bytes:
        url = URL(f"http://{_audience(host, port)}{path}").with_query(query)
        pause = FIRST_PAUSE_SECONDS
        for attempt in range(1, self._attempts + 1):
            try:
                told = await self._time(url) if method != "GET" else ""
                return await self._attempt(method, url, body, told)
            except _Refused as refused:
                if attempt == self._attempts:
                    raise RegistryError(
                        f"the bootstrap registry at {host}:{port} {refused} ({attempt} attempts); "
                        f"check that the prefill server is up and serves its registry there",
                        peer=f"{host}:{port}",
                    ) from None
            except KVBatonError as error:
                error.peer = error.peer or f"{host}:{port}"
                raise
            await self._sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE_SECONDS)
        raise ConfigError(f"a registry client needs at least one attempt, not {self._attempts}")

    async def _time(self, url: URL) -> str:
        """The registry's time, as a registration must repeat it; nothing where there is no secret to sign it with."""
        if self._secret is None:
            return ""
        answer = await self._attempt("GET", url.with_path(TIME_PATH), b"", "")
        return _decode(answer, _Time, url.host or "", url.port or 0).time

    async def _attempt(self, method: str, url: URL, body: bytes, told: str) -> bytes:
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=self._timeout_seconds)
            self._session = aiohttp.ClientSession(timeout=timeout, trust_env=False, auto_decompress=False)
        headers, asked = {"Content-Type": "application/json"} if method == "PUT" else {}, None
        if self._secret is not None:
            audience = audience_of(url.host or "", url.port or 0)
            asked = Asked(secret=self._secret, audience=audience, method=method, path=url.raw_path_qs)
            headers |= asked.headers(told, body)
        try:
            async with self._session.request(
                method,
                url,
                data=body or None,
                headers=headers,
                allow_redirects=False,
            ) as response:
                payload = bytearray()
                async for piece in response.content.iter_any():
                    payload += piece
                    if len(payload) > MAX_ANSWER_BYTES:
                        raise _Refused(f"answered more than {MAX_ANSWER_BYTES} bytes")
                _raise_for(response.status, bytes(payload))
                if asked is not None and not asked.is_answered(response.headers.get(MAC_HEADER), bytes(payload)):
                    raise RegistryError(
                        f"what answers at {asked.audience} does not prove that it knows this deployment's secret"
                    )
                return bytes(payload)
        except TimeoutError:
            raise _Refused(f"did not answer within {self._timeout_seconds:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise _Refused(f"cannot be reached ({cause_of(error)})") from None


class _Time(msgspec.Struct):
    time: Annotated[str, msgspec.Meta(max_length=MAX_TIME_CHARACTERS, pattern=r"^[0-9A-Za-z.]+$")]


class _Complaint(msgspec.Struct):
    message: str


class _Failure(msgspec.Struct):
    error: _Complaint


def cause_of(error: Exception) -> str:
    """Why a connection failed, in the system's words, without addresses and names of classes."""
    if isinstance(error, aiohttp.ClientConnectorError):
        error = error.os_error
    return getattr(error, "strerror", None) or str(error) or "it closed the connection"


def _audience(host: str, port: int) -> str:
    """``HOST:PORT`` as it is asked, and as tokens are made for it. Raises ConfigError."""
    if not is_printable_host(host) or not 0 < port <= 65535:
        raise ConfigError(f"{host!r}:{port} is no address of a registry")
    return audience_of(host, port)


def _raise_for(status: int, payload: bytes) -> None:
    if status == 200:
        return
    try:
        message = msgspec.json.decode(payload, type=_Failure).error.message
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise _Refused(f"answered HTTP {status}, but not as a kvbaton registry does") from None
    if status == 400:
        raise ConfigError(message)
    if status == 401:
        raise AuthenticationError(message, hint="give every process the same --secret-file")
    if status == 409:
        raise LocalProtocolError(message)
    raise _Refused(f"answered HTTP {status}: {message}")


def _decode(payload: bytes, kind: type[_T], host: str, port: int) -> _T:
    try:
        return msgspec.json.decode(payload, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RegistryError(
            f"{host}:{port} does not answer as a kvbaton registry does: {error}", peer=f"{host}:{port}"
        ) from None

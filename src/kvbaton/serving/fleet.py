"""Servers of kvbaton as operating-system processes: start, wait until ready, kill, stop; nothing is left behind.

For the demo, for tests, and for people who write tests against a running pair. Ports are chosen free; each process
logs to a file in the fleet's directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp
import msgspec

from kvbaton.errors import ExpiredError, KVBatonError, PeerLostError

READY_SECONDS = 120.0
STOP_SECONDS = 20.0
LOG_LINES = 15
#: Where ports are looked for: the system's own begin at 32768.
PORTS = (12_000, 32_000)


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody uses now, all different, and below those that the system hands out by itself: a
    connection of somebody else must not take one before its server has started."""
    found: set[int] = set()
    while len(found) < count:
        port = random.SystemRandom().randrange(*PORTS)
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            found.add(port)
    return list(found)


@dataclass(eq=False)
class Server:
    """One process of the fleet: how it is started, where it answers, where it logs."""

    name: str
    arguments: tuple[str, ...]
    port: int
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    process: asyncio.subprocess.Process | None = None

    def __post_init__(self) -> None:
        self.usual_log = self.log

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.returncode is None

    def last_words(self) -> str:
        """The end of its log, for an error message."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.is_file() else []
        return "\n".join(lines[-LOG_LINES:])

    async def start(self) -> None:
        """Start it (again, on the same port)."""
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "kvbaton.cli.main",
                *self.arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )

    def send_signal(self, number: int) -> None:
        if self.process is not None and self.running:
            self.process.send_signal(number)

    async def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.send_signal(signal.SIGKILL)
        if self.process is not None:
            await self.process.wait()

    async def stop(self) -> int:
        """SIGTERM, and its exit code. Killed if it does not go in time."""
        if self.process is None:
            return 0
        self.send_signal(signal.SIGTERM)
        self.send_signal(signal.SIGCONT)
        try:
            return await asyncio.wait_for(self.process.wait(), STOP_SECONDS)
        except TimeoutError:
            await self.kill()
            return -signal.SIGKILL


class Fleet:
    """Some prefill and decode servers, a router, and, if asked for, the single process that they are compared with.

    An async context manager. ``extra`` is added to every ``serve`` command line, ``decode_extra`` to those of decode,
    ``router_extra`` to the router's; ``prefill_extra`` holds what is added for each prefill, one after the other.
    ``registry_proxies``: ports where decode finds the prefills' registries, if a proxy stands in front of each.
    """

    def __init__(
        self,
        directory: Path,
        *,
        model: str,
        prefills: int = 1,
        decodes: int = 1,
        reference: bool = False,
        backend: str = "nixl",
        extra: Sequence[str] = (),
        prefill_extra: Sequence[tuple[str, ...]] = (),
        decode_extra: Sequence[str] = (),
        router_extra: Sequence[str] = (),
        registry_proxies: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        ports = iter(free_ports(2 * prefills + decodes + 2))
        common = ("--model", model, "--torch-threads", "1", "--disaggregation-transfer-backend", backend, *extra)
        env = dict(environment or {})
        self.prefills: list[Server] = []
        self.decodes: list[Server] = []
        self.registry_ports: list[int] = []
        pairs: list[str] = []

        def serve(name: str, *arguments: str) -> Server:
            port = next(ports)
            full = ("serve", *common, "--port", str(port), *arguments)
            return Server(name, full, port, directory / f"{name}.log", env)

        for i in range(prefills):
            bootstrap = str(next(ports))
            mode = ("--disaggregation-mode", "prefill", "--disaggregation-bootstrap-port", bootstrap)
            server = serve(f"prefill-{i}", *mode, *(prefill_extra[i] if i < len(prefill_extra) else ()))
            self.prefills.append(server)
            pairs += ["--prefill", server.url, str(registry_proxies[i]) if registry_proxies else bootstrap]
            self.registry_ports.append(int(bootstrap))
        for i in range(decodes):
            server = serve(f"decode-{i}", "--disaggregation-mode", "decode", *decode_extra)
            self.decodes.append(server)
            pairs += ["--decode", server.url]
        self.reference = serve("single", "--disaggregation-mode", "null") if reference else None
        port = next(ports)
        arguments = ("router", "--pd-disaggregation", *pairs, "--port", str(port), *router_extra)
        self.router = Server("router", arguments, port, directory / "router.log", env)
        self._session: aiohttp.ClientSession | None = None

    @property
    def servers(self) -> list[Server]:
        single = [self.reference] if self.reference is not None else []
        return [*self.prefills, *self.decodes, *single, self.router]

    @property
    def http(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise KVBatonError("a Fleet is used as an async context manager")
        return self._session

    async def __aenter__(self) -> Fleet:
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=None), connector=aiohttp.TCPConnector(limit=0)
        )
        try:
            for server in self.servers:
                await server.start()
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        await asyncio.gather(*(server.stop() for server in self.servers))
        if self._session is not None:
            await self._session.close()

    async def ready(self, server: Server, seconds: float = READY_SECONDS) -> None:
        """Wait until a server takes requests. Raises PeerLostError with its last words if it dies, ExpiredError."""
        deadline = time.monotonic() + seconds
        while True:
            if not server.running:
                raise PeerLostError(f"{server.name} ended before it was ready:\n{server.last_words()}")
            with contextlib.suppress(aiohttp.ClientError, OSError):
                async with self.http.get(f"{server.url}/ready") as response:
                    if response.status == 200:
                        return
            if time.monotonic() > deadline:
                raise ExpiredError(f"{server.name} was not ready within {seconds:g} s:\n{server.last_words()}")
            await asyncio.sleep(0.1)

    async def all_ready(self) -> None:
        await asyncio.gather(*(self.ready(server) for server in self.servers))

    async def info(self, server: Server) -> dict[str, Any]:
        """What ``/get_server_info`` says."""
        async with self.http.get(f"{server.url}/get_server_info") as response:
            answer: dict[str, Any] = msgspec.json.decode(await response.read())
            return answer

    async def held(self, server: Server) -> int:
        """Pages, slots and rooms that a server still holds."""
        info = await self.info(server)
        stats, handoff = info["stats"], info.get("handoff", {})
        return int(stats["pages_used"] + stats["slots_used"] + handoff.get("live_rooms", 0))

    async def all_returned(self, seconds: float = 30.0) -> None:
        """Wait until no engine holds a page, a slot or a room. Raises ExpiredError naming who does."""
        deadline = time.monotonic() + seconds
        while True:
            engines = [server for server in (*self.prefills, *self.decodes) if server.running]
            held = {server.name: await self.held(server) for server in engines}
            if not any(held.values()):
                return
            if time.monotonic() > deadline:
                details = [await self.info(server) for server in engines]
                raise ExpiredError(f"not everything was returned within {seconds:g} s: {held}; {details}")
            await asyncio.sleep(0.05)

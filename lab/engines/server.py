"""One server of an engine as a process: start, wait until it answers, stop, kill, read its metrics."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import aiohttp
import psutil

from kvbaton.discovery.access import is_loopback
from kvbaton.errors import ExpiredError, PeerLostError
from lab.metrics import scraped

READY_SECONDS = 900.0
STOP_SECONDS = 20.0
LOG_LINES = 12


@dataclass(eq=False, kw_only=True)
class EngineServer(ABC):
    """See the module."""

    #: The route that answers 200 once requests are.
    HEALTH: ClassVar[str]

    name: str
    python: Path
    model: Path
    port: int
    log: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    @abstractmethod
    def command(self) -> list[str]:
        """What is started."""

    @property
    @abstractmethod
    def variables(self) -> dict[str, str]:
        """The environment of its processes."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=self.variables, start_new_session=True, close_fds=True
            )

    async def ready(self, session: aiohttp.ClientSession) -> None:
        """Raises PeerLostError if it ends, ExpiredError if it takes too long."""
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            if self.process is None or self.process.poll() is not None:
                raise PeerLostError(f"{self.name} has ended:\n{self.last_words()}")
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                timeout = aiohttp.ClientTimeout(total=2)
                async with session.get(f"{self.url}{self.HEALTH}", timeout=timeout) as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(0.5)
        raise ExpiredError(f"{self.name} was not ready within {READY_SECONDS:g} s:\n{self.last_words()}")

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.is_file() else []
        wrong = [line for line in lines if "Error" in line][-LOG_LINES:]
        return "\n".join(wrong or lines[-LOG_LINES:])

    def beyond_loopback(self) -> list[str]:
        """Of its processes, where others than this machine reach them: ``PROCESS HOST:PORT``."""
        if self.process is None:
            return []
        first = psutil.Process(self.process.pid)
        return [
            f"{process.name()} {connection.laddr.ip}:{connection.laddr.port}"
            for process in (first, *first.children(recursive=True))
            for connection in process.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN and not is_loopback(connection.laddr.ip)
        ]

    def kill(self) -> None:
        """All of its processes at once, as when its host goes."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def send_signal(self, number: signal.Signals) -> None:
        """To all of its processes."""
        if self.process is not None:
            os.killpg(self.process.pid, number)

    async def stop(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        self.kill()

    async def again(self, session: aiohttp.ClientSession) -> None:
        """Killed, and started anew."""
        self.kill()
        self.start()
        await self.ready(session)

    async def metrics(self, session: aiohttp.ClientSession) -> dict[str, float]:
        """The values of ``/metrics`` by name and labels, as they stand there."""
        return await scraped(session, self.url)

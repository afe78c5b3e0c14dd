"""The fleet of the matrix: one prefill and one decode, or two of each, a router, proxies in between, and what every
answer must be.

Deadlines are those of production divided by about five, so that a matrix takes minutes: a peer is lost after 2 s of
silence, a handshake fails after 3 s, a client waits 15 s.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from kvbaton.errors import ExpiredError, PeerLostError, TransferFailedError
from kvbaton.serving.demo.show import Question, ask
from kvbaton.serving.evaluation.recall import make_prompts
from kvbaton.serving.fleet import Fleet, Server, free_ports
from lab.chaos.client import ClientOutcome, request
from lab.chaos.proxy import TcpProxy

HEARTBEAT_SECONDS = 1.0
HANDSHAKE_SECONDS = 3.0
BOOTSTRAP_SECONDS = 8.0
WAITING_SECONDS = 12.0
CLIENT_SECONDS = 15.0
#: What a client's own clock may show beyond its router's deadline on a busy machine.
SLACK_SECONDS = 5.0
GRACE_SECONDS = 8.0
#: How long after the end of a fault everybody may take to serve again, and to return what is leased.
RECOVERY_SECONDS = 30.0

LONG = Question(title="long", prompt=make_prompts(1, seed=3, pairs=(230, 230))[0].prompt, max_tokens=24)
SHORT = Question(title="short", prompt=make_prompts(1, seed=4, pairs=(5, 5))[0].prompt)
SERVE = (
    *("--chunked-prefill-size", "16"),
    *("--disaggregation-heartbeat-interval", str(HEARTBEAT_SECONDS)),
    *("--disaggregation-handshake-timeout", str(HANDSHAKE_SECONDS)),
    *("--disaggregation-bootstrap-timeout", str(BOOTSTRAP_SECONDS)),
    *("--disaggregation-waiting-timeout", str(WAITING_SECONDS)),
    *("--grace-period-secs", str(GRACE_SECONDS)),
)
ROUTER = ("--request-timeout-secs", str(CLIENT_SECONDS), "--grace-period-secs", str(GRACE_SECONDS))

Expected = Mapping[str, tuple[int, ...]]


async def expected_answers(directory: Path) -> Expected:
    """What a single process, started for it, answers to the questions of the matrix."""
    fleet = Fleet(directory, model="recall", reference=True)
    single = fleet.reference
    if single is None:
        raise PeerLostError("the fleet has no single process")
    async with aiohttp.ClientSession() as http:
        await single.start()
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    return await answers_of(single, http)
                except (aiohttp.ClientError, OSError):
                    if time.monotonic() > deadline or not single.running:
                        raise PeerLostError(f"the single process does not answer:\n{single.last_words()}") from None
                    await asyncio.sleep(0.1)
        finally:
            await single.stop()


async def answers_of(single: Server, http: aiohttp.ClientSession) -> Expected:
    """What a single process that runs answers. Raises TransferFailedError."""
    answers = {question.title: await ask(http, single.url, question) for question in (LONG, SHORT)}
    for answer in answers.values():
        if answer.error:
            raise TransferFailedError(f"the single process gave no answer: {answer.error}")
    return {title: answer.tokens for title, answer in answers.items()}


class Scene:
    """See the module. An async context manager; all servers are ready inside. ``controls`` and ``registries`` are the
    proxies in front of each prefill's two ports."""

    def __init__(self, directory: Path, expected: Expected, *, network: str = "shm", workers: int = 1) -> None:
        ports = free_ports(3 * workers)
        control, advertised, registry = ports[:workers], ports[workers : 2 * workers], ports[2 * workers :]
        self.expected = expected
        self.fleet = Fleet(
            directory,
            model="recall",
            prefills=workers,
            decodes=workers,
            extra=SERVE,
            prefill_extra=[
                (
                    *("--disaggregation-control-port", str(port)),
                    *("--disaggregation-control-advertise", f"tcp://127.0.0.1:{proxy}"),
                )
                for port, proxy in zip(control, advertised, strict=True)
            ],
            router_extra=ROUTER,
            registry_proxies=registry,
            environment={"UCX_TLS": "tcp"} if network == "tcp" else {},
        )
        self.controls = [TcpProxy(*both, inspect=True) for both in zip(advertised, control, strict=True)]
        behind = zip(registry, self.fleet.registry_ports, strict=True)
        self.registries = [TcpProxy(*both, inspect=False) for both in behind]
        self._closing = AsyncExitStack()

    async def __aenter__(self) -> Scene:
        try:
            for proxy in (*self.controls, *self.registries):
                await self._closing.enter_async_context(proxy)
            await self._closing.enter_async_context(self.fleet)
            await self.fleet.all_ready()
            await self.recovered()
        except BaseException:
            await self._closing.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._closing.aclose()

    async def decodes_by_instance(self) -> dict[str, Server]:
        return {(await self.fleet.info(server))["instance"]: server for server in self.fleet.decodes}

    async def ask(self, question: Question, limit_seconds: float = CLIENT_SECONDS + SLACK_SECONDS) -> ClientOutcome:
        return await request(self.fleet.http, self.fleet.router.url, question, limit_seconds=limit_seconds)

    def is_corrupt(self, question: Question, outcome: ClientOutcome) -> bool:
        """Whether tokens were served that the single process does not give."""
        return outcome.kind == "answer" and outcome.tokens != self.expected[question.title]

    async def recovered(self) -> float:
        """Wait until requests are answered again; the seconds that took. Raises ExpiredError, TransferFailedError."""
        started = time.monotonic()
        while True:
            if len(self.fleet.decodes) > 1 and not await self._all_usable():
                outcome = ClientOutcome(kind="error", message="the router does not use every worker yet")
            else:
                outcome = await self.ask(SHORT)
            if outcome.kind == "answer" and not self.is_corrupt(SHORT, outcome):
                return time.monotonic() - started
            if outcome.kind != "error":
                raise TransferFailedError(f"while recovering: {outcome}")
            if time.monotonic() - started > RECOVERY_SECONDS:
                raise ExpiredError(f"no answer {RECOVERY_SECONDS:g} s after the fault was over: {outcome.message}")
            await asyncio.sleep(0.2)

    async def _all_usable(self) -> bool:
        async with self.fleet.http.get(f"{self.fleet.router.url}/workers") as response:
            told = msgspec.json.decode(await response.read())
        return all(worker["is_healthy"] for worker in told["workers"])

    async def restart(self, server: Server) -> None:
        """Start a server whose process has ended, and wait until it and the router take requests."""
        await server.start()
        await self.fleet.ready(server)
        await self.fleet.ready(self.fleet.router)

    async def story(self, server: Server, room: int) -> list[str]:
        """What one server tells of a room, oldest first; empty where it cannot."""
        try:
            async with self.fleet.http.get(
                f"{server.url}/story/{room}", timeout=aiohttp.ClientTimeout(total=3.0)
            ) as response:
                told: dict[str, Any] = msgspec.json.decode(await response.read())
        except (aiohttp.ClientError, OSError):
            return []
        return [line["text"] for side in told.get("sides", []) for line in side.get("lines", [])]


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))

"""Servers of one family, in every shape that a topology needs: started by the zygote, asked over HTTP, ended together.

This file must not know what is compared with what.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp
import msgspec

from kvbaton.errors import ExpiredError, KVBatonError, PeerLostError
from kvbaton.serving.fleet import free_ports
from lab.conformance.requests import Start
from lab.conformance.shape import Shape

READY_SECONDS = 120.0
STOP_SECONDS = 30.0
ANSWER_SECONDS = 120.0
LOG_LINES = 15


@dataclass(frozen=True, slots=True)
class PairAnswer:
    """The tokens of one prompt, and the bytes that its hand-off moved."""

    tokens: tuple[int, ...]
    bytes: int = 0


class Zygote:
    """The process that forks servers. An async context manager."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Zygote:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "lab.conformance.zygote",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            await self._process.wait()

    async def fork(self, arguments: Sequence[str], log: Path) -> int:
        """Start ``kvbaton ARGUMENTS``. Returns its process id."""
        if self._process is None or self._process.stdin is None or self._process.stdout is None:
            raise KVBatonError("a Zygote is used as an async context manager")
        self._process.stdin.write(msgspec.json.encode(Start(list(arguments), str(log))) + b"\n")
        await self._process.stdin.drain()
        line = await self._process.stdout.readline()
        if not line:
            raise PeerLostError("the process that forks servers has died; run it by itself to see why")
        return int(line)


class ForkedServer:
    """One server: a process, and the ranks that it forks itself."""

    def __init__(self, shape: Shape, model: Path, log: Path) -> None:
        self.shape = shape
        self.log = log
        self.port, self.registry_port = free_ports(2)
        self._model = model
        self.pid = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self, zygote: Zygote) -> None:
        words = ["serve", "--model", str(self._model), "--port", str(self.port), "--torch-threads", "1"]
        words += ["--disaggregation-bootstrap-port", str(self.registry_port), "--chunked-prefill-size", "48"]
        words += ["--max-total-tokens", "4096", "--max-running-requests", "16", *self.shape.arguments]
        self.pid = await zygote.fork(words, self.log)

    @property
    def running(self) -> bool:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, 0)
            return True
        return False

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join(lines[-LOG_LINES:])

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL where that does not help."""
        deadline = time.monotonic() + STOP_SECONDS
        number = signal.SIGTERM
        while self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)
            while self.running and time.monotonic() < deadline:
                await asyncio.sleep(0.05)
            number = signal.SIGKILL
            deadline = time.monotonic() + STOP_SECONDS


class Servers:
    """The servers of one family. An async context manager; ``get`` starts what is not there yet."""

    def __init__(self, zygote: Zygote, directory: Path) -> None:
        self._zygote = zygote
        self._directory = directory
        self._servers: dict[tuple[Shape, Path], ForkedServer] = {}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Servers:
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS), connector=aiohttp.TCPConnector(limit=0)
        )
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        await asyncio.gather(*(server.stop() for server in self._servers.values()))
        if self._session is not None:
            await self._session.close()

    async def start(self, shapes: Sequence[Shape], model: Path) -> None:
        """Start what is not running yet, all at once; wait until each takes requests or has ended."""
        new = [shape for shape in dict.fromkeys(shapes) if (shape, model) not in self._servers]
        for shape in new:
            log = self._directory / f"{model.name}-{len(self._servers)}-{shape.mode}.log"
            server = self._servers[shape, model] = ForkedServer(shape, model, log)
            await server.start(self._zygote)
        await asyncio.gather(*(self._ready(self._servers[shape, model]) for shape in new))

    async def _ready(self, server: ForkedServer) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while server.running and time.monotonic() < deadline:
            with contextlib.suppress(aiohttp.ClientError, OSError):
                async with self._http.get(f"{server.url}/ready") as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.1)

    @property
    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise KVBatonError("Servers are used as an async context manager")
        return self._session

    def server(self, shape: Shape, model: Path) -> ForkedServer:
        """A running server. Raises PeerLostError with its last words where it has ended."""
        server = self._servers[shape, model]
        if not server.running:
            raise PeerLostError(f"{shape} has ended:\n{server.last_words()}")
        return server

    async def single(self, server: ForkedServer, prompt: Sequence[int], count: int) -> PairAnswer:
        return _answer(await self._post(server, _body(prompt, count)))

    async def pair(self, source: ForkedServer, target: ForkedServer, prompt: Sequence[int], count: int) -> PairAnswer:
        """Both legs of one request, as a router sends them."""
        body = _body(prompt, count)
        body |= {
            "bootstrap_host": "127.0.0.1",
            "bootstrap_port": source.registry_port,
            "bootstrap_room": random.getrandbits(62),
        }
        first, answer = await asyncio.gather(self._post(source, body), self._post(target, body))
        if _answer(first).tokens[:1] != _answer(answer).tokens[:1]:
            raise KVBatonError(f"prefill says {_answer(first).tokens}, decode {_answer(answer).tokens}")
        return _answer(answer)

    async def counted(self, server: ForkedServer, name: str) -> int:
        """What the first rank of a server has counted under a name."""
        try:
            async with self._http.get(f"{server.url}/get_server_info") as response:
                info = msgspec.json.decode(await response.read())
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise PeerLostError(f"{server.shape}: {error}\n{server.last_words()}") from error
        return int(info["handoff"]["counters"].get(name, 0))

    async def _post(self, server: ForkedServer, body: dict[str, Any]) -> dict[str, Any]:
        try:
            async with self._http.post(f"{server.url}/v1/completions", json=body) as response:
                data = await response.read()
                if response.status != 200:
                    raise KVBatonError(f"{server.shape} answers HTTP {response.status}: {data.decode()[:500]}")
        except TimeoutError:
            raise ExpiredError(f"{server.shape} did not answer:\n{server.last_words()}") from None
        except (aiohttp.ClientError, OSError) as error:
            raise PeerLostError(f"{server.shape}: {error}\n{server.last_words()}") from error
        answer: dict[str, Any] = msgspec.json.decode(data)
        return answer


def _body(prompt: Sequence[int], count: int) -> dict[str, Any]:
    return {
        "prompt": list(prompt),
        "max_tokens": count,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


def _answer(data: dict[str, Any]) -> PairAnswer:
    handoff = data.get("handoff") or {}
    return PairAnswer(tuple(data["choices"][0]["token_ids"]), int(handoff.get("bytes", 0)))

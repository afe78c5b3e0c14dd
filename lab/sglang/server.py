"""One SGLang server as a process: start, wait until it answers, stop, hurt its scheduler, read its metrics."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import aiohttp
import msgspec
import psutil

from kvbaton.errors import ExpiredError, PeerLostError

READY_SECONDS = 900.0
STOP_SECONDS = 20.0
LOG_LINES = 12

Role = Literal["plain", "prefill", "decode"]


@dataclass(eq=False, kw_only=True)
class SglangServer:
    """``options``: the backend's; ``arguments``: further ones of SGLang's launcher; ``tokens``: of its pool."""

    name: str
    python: Path
    model: Path
    port: int
    bootstrap_port: int
    log: Path
    role: Role
    backend: str = "kvbaton"
    tp: int = 1
    tokens: int = 16_384
    options: Mapping[str, object] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [
            *(str(self.python), "-m", "sglang.launch_server", "--model-path", str(self.model)),
            *("--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "m"),
            *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
            *("--dtype", "float32", "--disable-cuda-graph", "--disable-overlap-schedule", "--skip-server-warmup"),
            *("--grammar-backend", "none", "--random-seed", "0", "--sleep-on-idle"),
            *("--page-size", "16", "--max-running-requests", "8", "--chunked-prefill-size", "512"),
            *("--mem-fraction-static", "0.3", "--max-total-tokens", str(self.tokens), "--enable-metrics"),
            *("--tp-size", str(self.tp)),
        ]
        if self.role != "plain":
            command += [
                *("--disaggregation-mode", self.role, "--disaggregation-transfer-backend", self.backend),
                *("--disaggregation-bootstrap-port", str(self.bootstrap_port)),
            ]
        if self.role == "decode":
            command += ["--disaggregation-decode-retraction-backup", "cpu_tensor"]
        environment = {
            **os.environ,
            "SGLANG_USE_CPU_ENGINE": "1",
            "SGLANG_CPU_OMP_THREADS_BIND": "|".join(str(core) for core in range(self.tp)),
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "KVBATON_SGLANG": msgspec.json.encode(dict(self.options)).decode(),
            **self.environment,
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *self.arguments],
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
                close_fds=True,
            )

    async def ready(self, session: aiohttp.ClientSession) -> None:
        """Raises PeerLostError if it ends, ExpiredError if it takes too long."""
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            if self.process is None or self.process.poll() is not None:
                raise PeerLostError(f"{self.name} has ended:\n{self.last_words()}")
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with session.get(f"{self.url}/model_info", timeout=aiohttp.ClientTimeout(total=2)) as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(0.5)
        raise ExpiredError(f"{self.name} was not ready within {READY_SECONDS:g} s:\n{self.last_words()}")

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.is_file() else []
        wrong = [line for line in lines if "Error" in line][-LOG_LINES:]
        return "\n".join(wrong or lines[-LOG_LINES:])

    def schedulers(self) -> list[psutil.Process]:
        """The processes that compute, one for each rank."""
        found = []
        if self.process is not None:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if "sglang::scheduler" in f"{child.name()} {' '.join(child.cmdline())}":
                        found.append(child)
        return found

    def kill(self) -> None:
        """All of its processes at once, as when its host goes."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    async def stop(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        self.kill()

    async def metrics(self, session: aiohttp.ClientSession) -> dict[str, float]:
        """The values of ``/metrics`` by name, summed over labels."""
        async with session.get(f"{self.url}/metrics") as answer:
            lines = (await answer.text()).splitlines()
        found: dict[str, float] = {}
        for line in lines:
            name, _, value = line.rpartition(" ")
            if name and not line.startswith("#"):
                bare = name.partition("{")[0]
                found[bare] = found.get(bare, 0.0) + float(value)
        return found

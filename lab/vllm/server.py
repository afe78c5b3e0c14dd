"""One vLLM server as a process: start, wait until it answers, stop, hurt its worker, read its metrics."""

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

Role = Literal["plain", "kv_producer", "kv_consumer", "kv_both"]


@dataclass(eq=False, kw_only=True)
class VllmServer:
    """``options``: ``kv_connector_extra_config``; ``arguments``: further ones of ``vllm serve``; ``connector``: name
    and module, which is empty for one of vLLM's own."""

    name: str
    python: Path
    model: Path
    dtype: str
    port: int
    log: Path
    role: Role
    policy: Literal["fail", "recompute"] = "recompute"
    options: Mapping[str, object] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    blocks: int = 300
    connector: tuple[str, str] = ("KVBatonConnector", "kvbaton.engines.vllm")
    environment: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [
            *(str(self.python.parent / "vllm"), "serve", str(self.model)),
            *("--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "m"),
            *("--enforce-eager", "--dtype", self.dtype, "--seed", "0"),
            *("--max-model-len", "4096", "--max-num-batched-tokens", "512"),
            *("--num-gpu-blocks-override", str(self.blocks)),
            *self.arguments,
        ]
        if self.role != "plain":
            transfer = {
                "kv_connector": self.connector[0],
                **({"kv_connector_module_path": self.connector[1]} if self.connector[1] else {}),
                "kv_role": self.role,
                "kv_load_failure_policy": self.policy,
                "kv_connector_extra_config": dict(self.options),
            }
            command += ["--kv-transfer-config", msgspec.json.encode(transfer).decode()]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=self.variables, start_new_session=True, close_fds=True
            )

    @property
    def variables(self) -> dict[str, str]:
        """The environment of vLLM's processes."""
        return {
            **os.environ,
            "VLLM_TARGET_DEVICE": "cpu",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            **self.environment,
        }

    async def ready(self, session: aiohttp.ClientSession) -> None:
        """Raises PeerLostError if it ends, ExpiredError if it takes too long."""
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            if self.process is None or self.process.poll() is not None:
                raise PeerLostError(f"{self.name} has ended:\n{self.last_words()}")
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with session.get(f"{self.url}/health", timeout=aiohttp.ClientTimeout(total=2)) as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(0.5)
        raise ExpiredError(f"{self.name} was not ready within {READY_SECONDS:g} s:\n{self.last_words()}")

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.is_file() else []
        wrong = [line for line in lines if "Error" in line][-LOG_LINES:]
        return "\n".join(wrong or lines[-LOG_LINES:])

    def worker(self) -> psutil.Process:
        """The process that computes. Raises PeerLostError where there is none."""
        if self.process is not None:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if child.name().startswith("VLLM::Work") or "VLLM::Worker" in " ".join(child.cmdline()):
                        return child
        raise PeerLostError(f"{self.name} has no worker")

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

    async def metrics(self, session: aiohttp.ClientSession) -> dict[str, float]:
        """The values of ``/metrics`` by name and labels, as they stand there."""
        async with session.get(f"{self.url}/metrics") as answer:
            lines = (await answer.text()).splitlines()
        found = {}
        for line in lines:
            name, _, value = line.rpartition(" ")
            if name and not line.startswith("#"):
                found[name] = float(value)
        return found

    async def usage(self, session: aiohttp.ClientSession) -> float:
        """Part of its blocks that is in use, 0 to 1."""
        values = await self.metrics(session)
        return sum(value for name, value in values.items() if name.startswith("vllm:kv_cache_usage_perc"))

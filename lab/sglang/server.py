"""One SGLang server as a process: how it is started, which processes compute, its metrics."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import aiohttp
import msgspec
import psutil

from lab.engines.server import EngineServer
from lab.metrics import summed

Role = Literal["plain", "prefill", "decode"]


@dataclass(eq=False, kw_only=True)
class SglangServer(EngineServer):
    """``options``: the backend's; ``arguments``: further ones of SGLang's launcher; ``tokens``: of its pool."""

    HEALTH: ClassVar[str] = "/model_info"

    bootstrap_port: int
    role: Role
    backend: str = "kvbaton"
    tp: int = 1
    tokens: int = 16_384
    options: Mapping[str, object] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def command(self) -> list[str]:
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
        return [*command, *self.arguments]

    @property
    def variables(self) -> dict[str, str]:
        return {
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

    def schedulers(self) -> list[psutil.Process]:
        """The processes that compute, one for each rank."""
        found = []
        if self.process is not None:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if "sglang::scheduler" in f"{child.name()} {' '.join(child.cmdline())}":
                        found.append(child)
        return found

    async def sums(self, session: aiohttp.ClientSession) -> dict[str, float]:
        """The values of ``/metrics`` by name, summed over labels."""
        return await summed(session, self.url)

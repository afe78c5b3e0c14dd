"""One vLLM server as a process: how it is started, which process computes, what of its blocks is in use."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import aiohttp
import msgspec
import psutil

from kvbaton.errors import PeerLostError
from lab.engines.server import EngineServer

Role = Literal["plain", "kv_producer", "kv_consumer", "kv_both"]


@dataclass(eq=False, kw_only=True)
class VllmServer(EngineServer):
    """``options``: ``kv_connector_extra_config``; ``arguments``: further ones of ``vllm serve``; ``connector``: name
    and module, which is empty for one of vLLM's own."""

    HEALTH: ClassVar[str] = "/health"

    dtype: str
    role: Role
    policy: Literal["fail", "recompute"] = "recompute"
    options: Mapping[str, object] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    blocks: int = 300
    connector: tuple[str, str] = ("KVBatonConnector", "kvbaton.engines.vllm")
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        """Tensor-parallel ranks."""
        name = "--tensor-parallel-size"
        return int(self.arguments[self.arguments.index(name) + 1]) if name in self.arguments else 1

    @property
    def command(self) -> list[str]:
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
        return command

    @property
    def variables(self) -> dict[str, str]:
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

    def worker(self) -> psutil.Process:
        """The process that computes. Raises PeerLostError where there is none."""
        if self.process is not None:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if child.name().startswith("VLLM::Work") or "VLLM::Worker" in " ".join(child.cmdline()):
                        return child
        raise PeerLostError(f"{self.name} has no worker")

    async def usage(self, session: aiohttp.ClientSession) -> float:
        """Part of its blocks that is in use, 0 to 1."""
        values = await self.metrics(session)
        return sum(value for name, value in values.items() if name.startswith("vllm:kv_cache_usage_perc"))

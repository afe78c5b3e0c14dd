"""What the ranks of a group say to each other inside one forward pass, over torch.distributed.

Rules: every rank makes the same calls in the same order, as the leader's orders dictate. A rank that dies breaks the
connections of the others, so that none waits for it for ever. The ranks of a group are on one machine, so gloo and NCCL
listen on loopback only, unless their variables say otherwise. This file must not know of models, pools or schedulers.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kvbaton.serving.engine.shard import RankShard

#: How long ranks may differ in time: they are forked together and compute in step.
PATIENCE = timedelta(minutes=2)
#: What each library reads where it listens from, when its first group is made.
INTERFACES = {"gloo": "GLOO_SOCKET_IFNAME", "nccl": "NCCL_SOCKET_IFNAME"}


class Collective:
    """One rank's end. ``rendezvous`` is a file that does not exist yet and that all ranks can write."""

    def __init__(self, shard: RankShard, rendezvous: Path, device: str) -> None:
        self._shard = shard
        self._device = device
        library = "nccl" if device.startswith("cuda") else "gloo"
        os.environ.setdefault(INTERFACES[library], "lo")
        dist.init_process_group(
            library,
            init_method=f"file://{rendezvous}",
            rank=shard.rank,
            world_size=shard.ranks,
            timeout=PATIENCE,
        )
        stages = [
            dist.new_group([pp * shard.tp_size + tp for tp in range(shard.tp_size)]) for pp in range(shard.pp_size)
        ]
        self._stage = stages[shard.pp_rank]

    def add_up(self, tensor: Any) -> None:
        """Sum over the ranks of a stage, in place."""
        dist.all_reduce(tensor, group=self._stage)

    def hidden_from_before(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """What the stage before has computed."""
        return self._receive(shape, dtype, self._shard.rank - self._shard.tp_size)

    def hidden_to_next(self, hidden: Any) -> None:
        dist.send(hidden.contiguous(), self._shard.rank + self._shard.tp_size)

    def logits_to_leader(self, logits: Any) -> None:
        """From the last stage's first rank."""
        if self._shard.tp_rank == 0:
            dist.send(logits.contiguous(), 0)

    def logits_at_leader(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return self._receive(shape, dtype, (self._shard.pp_size - 1) * self._shard.tp_size)

    def _receive(self, shape: tuple[int, ...], dtype: Any, source: int) -> Any:
        tensor = torch.empty(shape, dtype=dtype, device=self._device)
        dist.recv(tensor, source)
        return tensor

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

"""What the ranks of one engine have to agree on before they open their managers."""

from __future__ import annotations

from typing import Any

from kvbaton.errors import ConfigError
from kvbaton.parts import new_instance


def launch_id(group: Any = None) -> str:
    """A name for an engine's ranks, alike on all of them and new at each launch: what ``group`` asks for.

    The first rank of a ``torch.distributed`` process group mints it and tells the others.

    Args:
        group: the process group, over memory of the host (gloo); None: the default one.

    Raises ConfigError where torch.distributed has not been initialised.
    """
    import torch.distributed as distributed

    if not distributed.is_available() or not distributed.is_initialized():
        raise ConfigError("launch_id needs torch.distributed; without it give all ranks one text, new at each launch")
    told = [new_instance()]
    distributed.broadcast_object_list(told, group_src=0, group=group)
    return told[0]

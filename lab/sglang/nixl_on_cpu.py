"""SGLang's own NIXL backend on a CPU: it takes every cache for memory of a GPU unless it is told otherwise.

Loaded by SGLang as a plug-in of the servers that ours are compared with.
"""

from __future__ import annotations

from typing import Any


def load() -> None:
    """The entry point."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(
        "sglang.srt.disaggregation.nixl.conn.NixlKVManager.__init__", _in_host_memory, HookType.BEFORE
    )


def _in_host_memory(_manager: Any, args: Any, *_: Any, **__: Any) -> None:
    args.kv_data_mem_kinds = ["DRAM"] * len(args.kv_data_ptrs)

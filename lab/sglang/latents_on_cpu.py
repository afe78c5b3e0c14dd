"""MLA on a CPU without SGLang's kernels: its torch attention reads latents from the cache, but is given whole heads for
a prompt's first chunk ("Expected size for first two dimensions of batch2 tensor"). Here it is given latents always.

Loaded by SGLang as a plug-in of the servers of scenes that ask for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def load() -> None:
    """The entry point."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(
        "sglang.srt.models.deepseek_common.attention_backend_handler.AttentionBackendRegistry.get_handler",
        _handler,
        HookType.AROUND,
    )


def _handler(original: Callable[..., Any], *named: Any) -> Any:
    """What chooses the way of a layer's attention, by the backend's name, the last argument."""
    return _absorbed if named[-1] == "torch_native" else original(*named)


def _absorbed(_attention: Any, _batch: Any) -> Any:
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod

    return AttnForwardMethod.MLA

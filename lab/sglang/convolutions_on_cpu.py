"""LFM2 on a CPU: the short convolutions of its layers in torch, where SGLang has kernels for GPUs alone.

Loaded by SGLang as a plug-in of the servers of scenes that ask for it. What is handed over is SGLang's own pool of
states; only the arithmetic is here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_PLACE = "sglang.srt.layers.attention.mamba.causal_conv1d"


#: Kernels of other families that SGLang looks up when it builds any hybrid; nothing here calls them.
_LOOKED_UP = ("fused_sigmoid_gating_delta_rule_update_cpu", "fused_gdn_gating_cpu")


def load() -> None:
    """The entry point."""
    import torch
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for name in _LOOKED_UP:
        torch.library.define(f"sgl_kernel::{name}", "() -> ()")
    HookRegistry.register(f"{_PLACE}.causal_conv1d_fn", _prompts, HookType.AROUND)
    HookRegistry.register(f"{_PLACE}.causal_conv1d_update", _tokens, HookType.AROUND)


def _prompts(
    _original: Callable[..., Any],
    x: Any,
    weight: Any,
    bias: Any,
    *,
    query_start_loc: Any,
    cache_indices: Any,
    has_initial_state: Any,
    conv_states: Any,
    activation: None,  # noqa: ARG001
) -> Any:
    """``x``: [channels, tokens of all sequences]; the states [slots, channels, width - 1] become those after each."""
    import torch

    out, kept = torch.empty_like(x), weight.shape[1] - 1
    starts = query_start_loc.tolist()
    for i, slot in enumerate(cache_indices.tolist()):
        here = slice(starts[i], starts[i + 1])
        state = conv_states[slot] if has_initial_state[i] else torch.zeros_like(conv_states[slot])
        seen = torch.cat((state[:, -kept:], x[:, here]), dim=1)
        out[:, here] = torch.nn.functional.conv1d(seen[None], weight[:, None], bias, groups=len(weight))[0]
        conv_states[slot] = seen[:, -kept:]
    return out


def _tokens(
    _original: Callable[..., Any],
    x: Any,
    conv_state: Any,
    weight: Any,
    bias: Any,
    *,
    conv_state_indices: Any,
    activation: None,  # noqa: ARG001
) -> Any:
    """``x``: one token of each sequence, [sequences, channels]."""
    import torch

    seen = torch.cat((conv_state[conv_state_indices], x[:, :, None]), dim=2)
    conv_state[conv_state_indices] = seen[:, :, 1:]
    out = (seen * weight).sum(dim=2)
    return out if bias is None else out + bias

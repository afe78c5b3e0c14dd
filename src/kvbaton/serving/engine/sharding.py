"""Cuts a loaded network down to one rank's share: heads and columns by transformers' tensor-parallel plan, and layers.

Rules: the plan that the model carries says what is cut and how; attention that it leaves out is cut by heads all the
same, since the cache is. With more ranks than key/value heads a head is repeated over neighbouring ranks, as the
layout's axis says. What a plan would cut only to gather it again (``colwise_gather_output``) stays whole: the result is
the same and a collective is saved. Sizes that do not divide are refused by name before anything is cut.

This file must not know of pools, processes or peers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from kvbaton.errors import ConfigError, LayoutError
from kvbaton.serving.engine.geometry import Geometry
from kvbaton.serving.engine.shard import RankShard

#: Styles of transformers' plans whose tensors stay whole on every rank.
WHOLE = {
    "colwise_gather_output",
    "colwise_rep",
    "embedding_rowwise",
    "embedding_colwise",
    "mla_kv_a_proj",
    "replicate",
    "replicated_with_grad_allreduce",
}
#: What transformers calls the norm after the last layer.
FINAL_NORMS = ("norm", "final_layernorm")
_PROJECTIONS = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise"}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")

Sum = Callable[[Any], None]


def check_sizes(model_config: Any, shard: RankShard) -> None:
    """What a model's config says of :func:`check_fits`, before its weights are loaded. Raises ConfigError."""
    config = model_config.get_text_config(decoder=True)
    shard.layers(int(getattr(config, "num_hidden_layers", shard.pp_size)))
    heads = int(getattr(config, "num_attention_heads", shard.tp_size))
    if heads % shard.tp_size:
        raise ConfigError(
            f"--tensor-parallel-size {shard.tp_size} does not divide the model's {heads} attention heads; "
            f"use a divisor of {heads}"
        )


def check_fits(network: Any, geometry: Geometry, shard: RankShard) -> None:
    """Raise ConfigError where this model cannot be divided so, naming the size that does not."""
    check_sizes(network.config, shard)
    config = network.config.get_text_config(decoder=True)
    shard.layers(geometry.layers)
    if shard.pp_size > 1 and (_final_norm(network) is None or not hasattr(network, "lm_head")):
        raise ConfigError(
            f"{config.model_type} is not built as embed_tokens, layers, a final norm and lm_head; "
            "use --pipeline-parallel-size 1"
        )
    try:
        for pool in geometry.paged:
            for tensor in pool.tensors:
                shard.axis(tensor.heads)
    except LayoutError as error:
        raise ConfigError(f"--tensor-parallel-size {shard.tp_size}: {error.message}") from error


def shard_network(network: Any, shard: RankShard, add_up: Sum) -> None:
    """Keep only this rank's share, in place. ``add_up`` sums a tensor over the ranks of a stage, in place."""
    if shard.pp_size > 1:
        _cut_layers(network, shard)
    if shard.tp_size > 1:
        _Cutter(network, shard, add_up).run()


def _final_norm(network: Any) -> str | None:
    """The name of what comes between the last layer and the head, in a model that can be cut between layers."""
    base = getattr(network, "model", None)
    if base is None or not all(hasattr(base, name) for name in ("embed_tokens", "layers")):
        return None
    return next((name for name in FINAL_NORMS if hasattr(base, name)), None)


class _Absent(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """A layer that another stage computes. ``others``: what such layers return beside hidden states, if anything."""

    def __init__(self, others: tuple[None, ...] | None) -> None:
        super().__init__()
        self._others = others

    def forward(self, hidden_states: Any, *_args: Any, **_kwargs: Any) -> Any:
        return hidden_states if self._others is None else (hidden_states, *self._others)


def _beside_hidden(network: Any) -> tuple[None, ...] | None:
    """Some models' layers return a tuple: one token is computed to see it."""
    seen: list[Any] = []
    hook = network.model.layers[0].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.inference_mode():
        network(input_ids=torch.zeros((1, 1), dtype=torch.long, device=network.device), use_cache=False)
    hook.remove()
    return (None,) * (len(seen[0]) - 1) if isinstance(seen[0], tuple) else None


def _cut_layers(network: Any, shard: RankShard) -> None:
    base = network.model
    kept, others = shard.layers(len(base.layers)), _beside_hidden(network)
    for index in range(len(base.layers)):
        if index not in kept:
            base.layers[index] = _Absent(others)
    if not shard.last:
        setattr(base, _final_norm(network) or "norm", nn.Identity())
        network.lm_head = nn.Identity()
    if not shard.first and hasattr(base, "embedding_multiplier"):
        base.embedding_multiplier = 1.0  # it is for embeddings, and what comes in here is not
    if not shard.first and network.lm_head.weight is not base.embed_tokens.weight:
        base.embed_tokens = nn.Embedding(1, 1, device=base.embed_tokens.weight.device)


class _Cutter:
    def __init__(self, network: Any, shard: RankShard, add_up: Sum) -> None:
        self._network = network
        self._shard = shard
        self._add_up = add_up
        self._config = network.config.get_text_config(decoder=True)

    def run(self) -> None:
        plan = dict(self._network.tp_plan or {})
        modules, parameters = dict(self._network.named_modules()), dict(self._network.named_parameters())
        attentions = {name: module for name, module in modules.items() if _is_attention(module)}
        patterns = {name: _NUMBER.sub("*", name) for name in (*modules, *parameters)}
        styles = {name: plan[pattern] for name, pattern in patterns.items() if pattern in plan}
        for name in attentions:
            for projection, style in _PROJECTIONS.items():
                styles.setdefault(f"{name}.{projection}", style)
        for name, style in styles.items():
            if name in modules:
                self._cut_module(modules[name], name, style)
            else:
                self._cut_parameter(modules, name, style)
        for name, module in attentions.items():
            self._finish_attention(module, name)

    def _cut_module(self, module: Any, name: str, style: str) -> None:
        if style in WHOLE or isinstance(module, _Absent):
            return
        if style == "moe_tp_experts":
            module.register_forward_hook(self._sum_output)
        elif isinstance(module, nn.Linear) and style == "colwise":
            items = self._kv_heads if name.rpartition(".")[2] in ("k_proj", "v_proj") else self._shard.tp_size
            module.weight = _parameter(self._part(module.weight, 0, items, name))
            if module.bias is not None:
                module.bias = _parameter(self._part(module.bias, 0, items, name))
        elif isinstance(module, nn.Linear) and style == "rowwise":
            module.weight = _parameter(self._part(module.weight, 1, self._shard.tp_size, name))
            if module.bias is not None and self._shard.tp_rank:
                module.bias = None  # it is added once
            module.register_forward_hook(self._sum_output)
        else:
            raise ConfigError(
                f"the tensor-parallel plan asks for {style!r} at {name}, which the embedded engine does not know; "
                "use --tensor-parallel-size 1"
            )

    def _cut_parameter(self, modules: dict[str, Any], name: str, style: str) -> None:
        """A bare parameter, as the experts' stacked matrices are: [experts, out, in]."""
        owner, _, attribute = name.rpartition(".")
        tensor = getattr(modules[owner], attribute)
        size = self._shard.tp_size
        if style in WHOLE:
            return
        if style == "colwise":
            part = self._part(tensor, tensor.dim() - 2, size, name)
        elif style == "rowwise":
            part = self._part(tensor, tensor.dim() - 1, size, name)
        elif style == "packed_colwise":
            halves = tensor.chunk(2, dim=tensor.dim() - 2)
            part = torch.cat([self._part(half, tensor.dim() - 2, size, name) for half in halves], tensor.dim() - 2)
        else:
            raise ConfigError(f"the tensor-parallel plan asks for {style!r} at {name}, which is not known here")
        setattr(modules[owner], attribute, _parameter(part))

    def _finish_attention(self, module: Any, name: str) -> None:
        """What else of an attention module counts heads: their ratio, and one number for each query head."""
        heads = int(self._config.num_attention_heads)
        if hasattr(module, "num_key_value_groups"):
            module.num_key_value_groups = heads // self._shard.tp_size // self._shard.axis(self._kv_heads).width
        for attribute, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() == 1 and parameter.shape[0] == heads:
                part = self._part(parameter, 0, self._shard.tp_size, f"{name}.{attribute}")
                setattr(module, attribute, _parameter(part))

    @property
    def _kv_heads(self) -> int:
        return int(getattr(self._config, "num_key_value_heads", None) or self._config.num_attention_heads)

    def _part(self, tensor: Any, dimension: int, items: int, name: str) -> Any:
        """This rank's share of ``items`` equal blocks along ``dimension``, copied out of the whole."""
        if tensor.shape[dimension] % items:
            raise ConfigError(
                f"--tensor-parallel-size {self._shard.tp_size}: {name} has {tensor.shape[dimension]} rows or columns, "
                f"which do not divide into {items}"
            )
        axis, block = self._shard.axis(items), tensor.shape[dimension] // items
        return tensor.narrow(dimension, axis.first * block, axis.width * block).clone(
            memory_format=torch.contiguous_format
        )

    def _sum_output(self, _module: Any, _inputs: Any, output: Any) -> Any:
        output = output.contiguous()
        self._add_up(output)
        return output


def _is_attention(module: Any) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Linear) for name in _PROJECTIONS)


def _parameter(tensor: Any) -> Any:
    return nn.Parameter(tensor, requires_grad=False)

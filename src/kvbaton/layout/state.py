"""Constructors of slots of recurrent state (Mamba, Mamba2, gated delta net): one slot per request, moved whole.

Tensor parallelism shards one dimension of a state tensor, and along it every block by itself: the convolution window
of a gated delta net is ``[q | k | v]`` along its channels, and rank r holds its share of q, of k and of v. A tensor is
therefore given with its shape over all ranks, the sharded dimension and the shards along it; each shard becomes a
plane. Dimensions before the sharded one are rows, dimensions after it belong to the item.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvbaton.errors import LayoutError
from kvbaton.layout.geometry import Axis, Plane, Pool

#: Each tensor of each layer begins at a multiple of this: views of any element type are aligned.
TENSOR_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Shard:
    """A run of ``size`` neighbouring indices of the sharded dimension that divides into ``items`` equal items."""

    name: str
    size: int
    items: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StateTensor:
    """One tensor of a layer's state, as the whole model has it.

    Args:
        name: names its planes: ``name.shard``, or ``name`` alone where there is one shard without a name.
        shape: of one request over all ranks, in elements.
        element_bytes: bytes of one element.
        dtype: element type, compared with the peer's.
        axis: the sharded dimension; None: replicated, every rank holds all of it.
        shards: the blocks along ``axis``, in memory order; their sizes sum up to ``shape[axis]``.
    """

    name: str
    shape: tuple[int, ...]
    element_bytes: int
    dtype: str
    axis: int | None = None
    shards: tuple[Shard, ...] = ()

    def check(self, where: str) -> None:
        """Raise LayoutError where shape, axis and shards do not fit together."""
        where = f"{where} state tensor {self.name!r}"
        if not self.shape or min(self.shape) < 1 or self.element_bytes < 1:
            raise LayoutError(f"{where}: shape {self.shape} of {self.element_bytes}-byte elements must be positive")
        if self.axis is None:
            if self.shards:
                raise LayoutError(f"{where}: it has shards but no sharded axis; name the axis")
            return
        if not 0 <= self.axis < len(self.shape):
            raise LayoutError(f"{where}: axis {self.axis} is unknown, its shape {self.shape} has {len(self.shape)}")
        if sum(shard.size for shard in self.shards) != self.shape[self.axis]:
            sizes = " + ".join(f"{shard.name} {shard.size}" for shard in self.shards) or "nothing"
            raise LayoutError(
                f"{where}: the shards along axis {self.axis} are {sizes}, the axis has {self.shape[self.axis]}"
            )
        for shard in self.shards:
            if shard.items < 1 or shard.size < 1 or shard.size % shard.items:
                raise LayoutError(
                    f"{where}: shard {shard.name!r} of {shard.size} does not divide in {shard.items} items"
                )

    @property
    def rows(self) -> int:
        """Rows of a slot: what lies outside the sharded dimension."""
        return math.prod(self.shape[: self.axis]) if self.axis is not None else 1

    def pieces(self) -> list[tuple[str, int, int]]:
        """(plane name, items, bytes of one item) of every shard."""
        if self.axis is None:
            return [(self.name, 1, math.prod(self.shape) * self.element_bytes)]
        inner = math.prod(self.shape[self.axis + 1 :]) * self.element_bytes
        return [
            (f"{self.name}.{shard.name}" if shard.name else self.name, shard.items, shard.size // shard.items * inner)
            for shard in self.shards
        ]


def state_pool(
    layers: Iterable[int],
    tensors: Sequence[StateTensor],
    *,
    slots: int,
    tp_size: int = 1,
    tp_rank: int = 0,
    name: str = "state",
    region: int = 0,
    offset: int = 0,
) -> Pool:
    """Slots of ``tensors`` for every layer, shaped ``[layers, tensors, slots, *this rank's shape]``.

    This rank's shape has, along the sharded axis, its items of the first shard, then those of the second, and so on.
    Every tensor of every layer begins at a multiple of :data:`TENSOR_ALIGNMENT` from ``offset``.
    """
    if slots < 1 or not tensors:
        raise LayoutError(f"pool {name!r}: slots={slots} and {len(tensors)} tensors must be positive")
    for tensor in tensors:
        tensor.check(f"pool {name!r}")
    planes = []
    begin = 0
    for layer in layers:
        for tensor in tensors:
            pieces = []
            for plane, items, size in tensor.pieces():
                axis = Axis(items, tp_size, tp_rank)
                axis.validate(f"pool {name!r} plane {plane!r}")
                pieces.append((plane, axis, size))
            row = sum(axis.width * size for _, axis, size in pieces)
            unit = tensor.rows * row
            begin = -(-begin // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT
            at = offset + begin
            for plane, axis, size in pieces:
                planes.append(Plane(layer, plane, region, at, unit, row, size, size, axis, tensor.rows))
                at += axis.width * size
            begin += slots * unit
    dtype = ",".join(f"{tensor.name}={tensor.dtype}" for tensor in tensors)
    return Pool(name, "state", slots, 1, False, dtype, tuple(planes))


def gated_delta_net(
    *,
    key_heads: int,
    value_heads: int,
    key_dim: int,
    value_dim: int,
    conv_width: int,
    element_bytes: int,
    dtype: str,
    recurrent_bytes: int = 4,
    recurrent_dtype: str = "float32",
) -> tuple[StateTensor, ...]:
    """State of a gated delta net (Qwen3-Next): ``conv [q | k | v channels, conv_width]``, q, k and v each sharded by
    its own heads, and ``recurrent [value heads, key_dim, value_dim]``. Dimensions are per head."""
    queries, values = key_heads * key_dim, value_heads * value_dim
    return (
        StateTensor(
            name="conv",
            shape=(2 * queries + values, conv_width),
            element_bytes=element_bytes,
            dtype=dtype,
            axis=0,
            shards=(Shard("q", queries, key_heads), Shard("k", queries, key_heads), Shard("v", values, value_heads)),
        ),
        StateTensor(
            name="recurrent",
            shape=(value_heads, key_dim, value_dim),
            element_bytes=recurrent_bytes,
            dtype=recurrent_dtype,
            axis=0,
            shards=(Shard("", value_heads, value_heads),),
        ),
    )


def mamba2(
    *,
    heads: int,
    head_dim: int,
    groups: int,
    state_size: int,
    conv_width: int,
    element_bytes: int,
    dtype: str,
    state_bytes: int = 4,
    state_dtype: str = "float32",
) -> tuple[StateTensor, ...]:
    """State of a Mamba2 layer: ``conv [x | B | C channels, conv_width]``, x sharded by heads, B and C by groups, and
    ``ssm [heads, head_dim, state_size]``. With more ranks than groups, groups are replicated."""
    inner, grouped = heads * head_dim, groups * state_size
    return (
        StateTensor(
            name="conv",
            shape=(inner + 2 * grouped, conv_width),
            element_bytes=element_bytes,
            dtype=dtype,
            axis=0,
            shards=(Shard("x", inner, heads), Shard("b", grouped, groups), Shard("c", grouped, groups)),
        ),
        StateTensor(
            name="ssm",
            shape=(heads, head_dim, state_size),
            element_bytes=state_bytes,
            dtype=state_dtype,
            axis=0,
            shards=(Shard("", heads, heads),),
        ),
    )

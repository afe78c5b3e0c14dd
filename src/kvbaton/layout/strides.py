"""Pools of tensors that an engine has made: from a base, a shape and strides to planes, whatever the order inside.

An engine knows its tensors as (region, offset, shape, strides). What it alone knows is which dimension is which; it
says so with one letter each:

- ``U``: units, pages or slots
- ``N``: tokens of a page
- ``H``: items that tensor parallelism shards, this rank's
- ``C``: what belongs to one item; contiguous

``UHNC`` and ``UNHC`` are pages with heads outside and inside, ``UNC`` are latents, ``UC`` are slots of a state that
nobody looks into. Strides that are not those of a fresh tensor (padding, layers that interleave) need nothing more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvbaton.errors import LayoutError
from kvbaton.layout.geometry import Axis, Plane, Pool, PoolKind


@dataclass(frozen=True, kw_only=True, slots=True)
class Strided:
    """One tensor of one layer, as this rank has it.

    Args:
        layer: absolute id of the layer.
        region, offset: where its first element lies, in bytes from the start of a region.
        shape: in elements; ``strides``: in elements, as ``torch.Tensor.stride()`` gives them.
        element_bytes: bytes of one element.
        name: tells the tensors of a layer apart.
    """

    layer: int
    region: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    element_bytes: int
    name: str = "kv"


def pool_of_strides(
    name: str,
    kind: PoolKind,
    tensors: Iterable[Strided],
    *,
    dims: str,
    dtype: str,
    items: int = 1,
    tp_size: int = 1,
    tp_rank: int = 0,
    window: int = 0,
    packing: str = "",
) -> Pool:
    """A pool of ``tensors``, which are shaped alike.

    Args:
        dims: one letter for each dimension, see the module; with ``N`` the pool is paged, without it has slots.
        items: of the ``H`` dimension over all ranks; without ``H`` 1 for what every rank holds alike.
        packing: names an order inside a page that strides do not tell. Tokens are then not told apart: a page of an
            item is one run, and both sides must have the same page size and the same packing.

    Raises LayoutError where shape, strides and ``dims`` do not fit together.
    """
    listed = list(tensors)
    if not listed:
        raise LayoutError(f"pool {name!r} has no tensors")
    axis = Axis(items, tp_size, tp_rank)
    axis.validate(f"pool {name!r}")
    planes = []
    for tensor in listed:
        where = f"pool {name!r} layer {tensor.layer} tensor {tensor.name!r}"
        _check(tensor, dims, where)
        if tensor.shape[dims.index("U")] != listed[0].shape[dims.index("U")]:
            raise LayoutError(f"{where}: shape {tensor.shape} has another number of units than {listed[0].shape}")
        planes.append(_plane(tensor, dims, axis, bool(packing), where))
    first = dict(zip(dims, listed[0].shape, strict=True))
    rows = first.get("N", 1)
    return Pool(name, kind, first["U"], rows, "N" in dims, dtype, tuple(planes), window, packing)


def _check(tensor: Strided, dims: str, where: str) -> None:
    known = set(dims) <= set("UNHC") and len(set(dims)) == len(dims) and dims[:1] == "U" and dims.endswith("C")
    if not known:
        raise LayoutError(f"{where}: dims {dims!r} must begin with U, end with C, and have N and H at most once")
    if not len(tensor.shape) == len(tensor.strides) == len(dims):
        raise LayoutError(f"{where}: shape {tensor.shape} and strides {tensor.strides} are not {dims!r}")
    if min(*tensor.shape, *tensor.strides, tensor.element_bytes) < 1 or tensor.offset < 0:
        raise LayoutError(f"{where}: shape {tensor.shape} and strides {tensor.strides} must be positive")
    if tensor.strides[-1] != 1 and tensor.shape[-1] > 1:
        raise LayoutError(f"{where}: the elements of an item must be contiguous, their stride is {tensor.strides[-1]}")


def _plane(tensor: Strided, dims: str, axis: Axis, packed: bool, where: str) -> Plane:
    size = dict(zip(dims, tensor.shape, strict=True))
    stride = {dim: step * tensor.element_bytes for dim, step in zip(dims, tensor.strides, strict=True)}
    if size.get("H", 1) != axis.width:
        raise LayoutError(
            f"{where}: shape {tensor.shape} has {size.get('H', 1)} items, {axis.items} over {axis.ranks} ranks are "
            f"{axis.width} on each"
        )
    item_bytes = size["C"] * tensor.element_bytes
    rows = size.get("N", 1)
    if packed and rows > 1:
        if stride["N"] != item_bytes:
            raise LayoutError(f"{where}: a packed page must be contiguous, its tokens are {stride['N']} bytes apart")
        item_bytes, rows = item_bytes * rows, 1
    return Plane(
        layer=tensor.layer,
        name=tensor.name,
        region=tensor.region,
        offset=tensor.offset,
        unit_stride=stride["U"],
        row_stride=stride["N"] if rows > 1 else item_bytes,
        item_stride=stride["H"] if axis.width > 1 else item_bytes,
        item_bytes=item_bytes,
        axis=axis,
        rows=rows,
    )

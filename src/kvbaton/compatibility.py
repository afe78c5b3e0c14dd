"""Whether two layouts can hand over to each other: every difference that matters, named before any traffic.

A sentence for each difference says which field, which values and what would work. The handshake's verdict is the
first of them, told to both sides; tools print all.
"""

from __future__ import annotations

from kvbaton.errors import IncompatibleError, LayoutError
from kvbaton.layout import CacheLayout, Pool
from kvbaton.plan import pair_plan


def differences(source: CacheLayout, target: CacheLayout) -> list[IncompatibleError]:
    """All reasons why ``source`` cannot write for ``target``; empty if it can. ``ours`` is the source's value."""
    found = []
    if source.model != target.model:
        found.append(
            _difference("model", source.model, target.model, "both sides must serve the same weights and configuration")
        )
    theirs = {pool.name: pool for pool in target.pools}
    for pool in source.pools:
        if pool.name in theirs:
            found += _pool_differences(pool, theirs[pool.name])
    if not found:
        try:
            pair_plan(source, target)
        except LayoutError as error:
            found.append(_difference("geometry", "source", "target", error.message))
    return found


def _pool_differences(source: Pool, target: Pool) -> list[IncompatibleError]:
    name = source.name
    found = []
    for field, advice in (
        ("kind", "pools pair by name, name them apart"),
        ("paged", "a pool is paged on both sides or on neither"),
        ("dtype", "start both sides with the same --kv-cache-dtype"),
        ("packing", "the interior of a page is packed differently; use the same attention backend on both sides"),
        ("window", "both sides must keep the same sliding window"),
    ):
        ours, theirs = getattr(source, field), getattr(target, field)
        if ours != theirs:
            found.append(_difference(f"{name}.{field}", ours, theirs, advice))
    if source.rows != target.rows and (not source.paged or source.packing):
        found.append(
            _difference(f"{name}.rows", source.rows, target.rows, "slots and packed pages must be of equal size")
        )
    twins = {(plane.layer, plane.name): plane for plane in target.planes}
    for plane in source.planes:
        twin = twins.get((plane.layer, plane.name))
        if twin is None:
            continue
        where = f"{name}.{plane.layer}.{plane.name}"
        if plane.item_bytes != twin.item_bytes:
            found.append(
                _difference(
                    f"{where}.item_bytes", plane.item_bytes, twin.item_bytes, "head size or element type differ"
                )
            )
        if plane.axis.items != twin.axis.items:
            found.append(
                _difference(
                    f"{where}.items", plane.axis.items, twin.axis.items, "the models have different numbers of heads"
                )
            )
        if found:
            break
    return found


def _difference(field: str, ours: object, theirs: object, advice: str) -> IncompatibleError:
    return IncompatibleError(
        f"{field}: prefill has {ours!r}, decode has {theirs!r}: {advice}",
        field=field,
        ours=str(ours),
        theirs=str(theirs),
    )

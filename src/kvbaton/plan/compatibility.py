"""Whether two layouts, or two groups of ranks, can hand over: every difference that matters, named before any traffic.

A sentence for each difference says which field, which values and what would work (also in ``hint``). The handshake's
verdict is the first difference of a pair, sent to both sides; tools print all, of whole groups.

Not a difference: tensor, pipeline and data parallel sizes, page sizes of which one divides the other, interior orders
and fusions that strides express, kinds of memory, the number of pages, the prefix.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence

from kvbaton.errors import IncompatibleError, LayoutError
from kvbaton.layout import CacheLayout, Plane, Pool
from kvbaton.plan.identity import model_differences
from kvbaton.plan.pair import coverage_gaps, pair_plan

#: Page sizes pair where one divides the other or where they share at least so many tokens.
USEFUL_COMMON_ROWS = 16

_NUMBER = re.compile(r"\.\d+\.")
_POOL_FIELDS = (
    ("kind", "pools pair by name, name them apart"),
    ("paged", "a pool is paged on both sides or on neither"),
    ("dtype", "start both sides with the same --dtype (--kv-cache-dtype in vLLM and SGLang)"),
    ("packing", "the interior of a page is packed differently; use the same attention backend on both sides"),
    ("window", "both sides must keep the same sliding window"),
)


def differences(source: CacheLayout, target: CacheLayout) -> list[IncompatibleError]:
    """All reasons why ``source`` cannot write for ``target``; empty if it can. ``ours`` is the source's value."""
    found = []
    for field, ours, theirs in model_differences(source.model, target.model):
        name = f"model.{field}" if field else "model"
        found.append(_difference(name, ours, theirs, "both sides must serve the same weights and configuration"))
    theirs = {pool.name: pool for pool in target.pools}
    for pool in source.pools:
        if pool.name in theirs:
            found += _pool_differences(pool, theirs[pool.name])
    if not found:
        try:
            pair_plan(source, target)
        except LayoutError as error:
            found.append(IncompatibleError(error.message, field="geometry"))
    return found


def group_differences(sources: Sequence[CacheLayout], targets: Sequence[CacheLayout]) -> list[IncompatibleError]:
    """All reasons why a group of ranks cannot write for another one, each reported once.

    Beyond what pairs of ranks show: what the targets need and no source has, and what the sources have and no target
    takes.
    """
    found: dict[tuple[str, str, str], IncompatibleError] = {}
    for source in sources:
        for target in targets:
            for difference in differences(source, target):
                field = _NUMBER.sub(".", difference.field)  # once, not for every pipeline stage
                found.setdefault((field, difference.ours, difference.theirs), difference)
    absent = [*_pools_missing(sources, targets), *_layers_missing(sources, targets)]
    for difference in absent:
        found.setdefault((difference.field, "", ""), difference)
    if not found:
        for target in targets:
            for gap in coverage_gaps(sources, target):
                found.setdefault((gap.field, "", ""), gap.swapped())
    return list(found.values())


def _pool_differences(source: Pool, target: Pool) -> Iterator[IncompatibleError]:
    name = source.name
    for field, advice in _POOL_FIELDS:
        ours, theirs = getattr(source, field), getattr(target, field)
        if ours != theirs:
            yield _difference(f"{name}.{field}", ours, theirs, advice)
    yield from _row_differences(source, target)
    twins = {(plane.layer, plane.name): plane for plane in target.planes}
    reported: set[tuple[object, ...]] = set()
    for plane in source.planes:
        twin = twins.get((plane.layer, plane.name))
        if twin is None:
            continue
        for field, ours, theirs, advice in _plane_differences(source, plane, target, twin):
            if (plane.name, field, ours, theirs) not in reported:  # once, not for every layer
                reported.add((plane.name, field, ours, theirs))
                yield _difference(f"{name}.{plane.layer}.{plane.name}.{field}", ours, theirs, advice)
    yield from _tensor_differences(source, target)


def _row_differences(source: Pool, target: Pool) -> Iterator[IncompatibleError]:
    ours, theirs = source.rows, target.rows
    if ours == theirs:
        return
    field = f"{source.name}.page_size" if source.paged and target.paged else f"{source.name}.rows"
    if not (source.paged and target.paged) or source.packing or target.packing:
        yield _difference(field, ours, theirs, "slots and packed pages must be of equal size")
    elif ours % theirs and theirs % ours and math.gcd(ours, theirs) < USEFUL_COMMON_ROWS:
        yield _difference(
            field,
            ours,
            theirs,
            f"neither divides the other and they have only {math.gcd(ours, theirs)} tokens in common, so every page "
            f"would fall into small pieces; use page sizes of which one divides the other, such as {ours} and "
            f"{2 * ours}",
        )


def _plane_differences(
    source: Pool, plane: Plane, target: Pool, twin: Plane
) -> Iterator[tuple[str, object, object, str]]:
    if plane.item_bytes != twin.item_bytes:
        yield "item_bytes", plane.item_bytes, twin.item_bytes, "head size or element type differ"
    if plane.axis.items != twin.axis.items:
        yield "items", plane.axis.items, twin.axis.items, "the models have different numbers of heads"
    if source.paged and target.paged:
        ours, theirs = source.row_tokens(plane), target.row_tokens(twin)
        if ours != theirs:
            yield "row_tokens", ours, theirs, "as many tokens must share a row (a scale, a pooled key) on both sides"
        elif math.gcd(source.rows, target.rows) % ours:
            yield (
                "page_size",
                source.rows,
                target.rows,
                f"{ours} tokens share a row, so pages must have a multiple of {ours} in common; use equal page sizes",
            )
    elif source.rows_of(plane) != target.rows_of(twin):
        ours, theirs = source.rows_of(plane), target.rows_of(twin)
        yield "rows", ours, theirs, "the state tensor is laid out differently; use the same kernels on both sides"


def _tensor_differences(source: Pool, target: Pool) -> Iterator[IncompatibleError]:
    """Layers that both ranks hold must be made of the same tensors."""
    ours, theirs = _tensors(source), _tensors(target)
    for layer in sorted(ours.keys() & theirs.keys()):
        if ours[layer] != theirs[layer]:
            yield _difference(
                f"{source.name}.{layer}.tensors",
                sorted(ours[layer]),
                sorted(theirs[layer]),
                "the cache of a layer is split into different tensors; use the same attention backend on both sides",
            )
            return


def _tensors(pool: Pool) -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}
    for plane in pool.planes:
        found.setdefault(plane.layer, set()).add(plane.name)
    return found


def _pools_missing(sources: Sequence[CacheLayout], targets: Sequence[CacheLayout]) -> Iterator[IncompatibleError]:
    ours, theirs = _layers(sources), _layers(targets)
    for name in [*theirs, *ours]:
        if name not in ours:
            advice = "nobody would fill it; start the prefill ranks so that they keep that state, or decode without it"
            yield _difference(f"{name}", "no such pool", _layer_ranges(theirs[name]), advice)
        elif name not in theirs:
            advice = "nobody would take it; decode must run the same model with the same kinds of cache"
            yield _difference(f"{name}", _layer_ranges(ours[name]), "no such pool", advice)


def _layers_missing(sources: Sequence[CacheLayout], targets: Sequence[CacheLayout]) -> Iterator[IncompatibleError]:
    ours, theirs = _layers(sources), _layers(targets)
    for name in ours.keys() & theirs.keys():
        if ours[name] != theirs[name]:
            advice = "both groups must hold every layer; give the layouts of all pipeline stages"
            yield _difference(f"{name}.layers", _layer_ranges(ours[name]), _layer_ranges(theirs[name]), advice)


def _layers(layouts: Iterable[CacheLayout]) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for layout in layouts:
        for pool in layout.pools:
            found.setdefault(pool.name, set()).update(plane.layer for plane in pool.planes)
    return found


def _layer_ranges(layers: set[int]) -> str:
    """Layers for people, such as "layers 0..3, 6"."""
    ranges: list[list[int]] = []
    for layer in sorted(layers):
        if ranges and layer == ranges[-1][1] + 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    if ranges == [[-1, -1]]:
        return "one row per request"
    return "layers " + ", ".join(str(a) if a == b else f"{a}..{b}" for a, b in ranges)


def _difference(field: str, ours: object, theirs: object, advice: str) -> IncompatibleError:
    return IncompatibleError(
        f"{field}: prefill has {ours!r}, decode has {theirs!r}: {advice}",
        field=field,
        ours=str(ours),
        theirs=str(theirs),
        hint=advice,
    )

"""The plan as a picture: SVG, written by hand so that nothing has to be installed.

Every rank is a box with a map for each pool: across are the items that tensor parallelism shards, down are the layers.
A source's share has the source's colour; on a target each piece has the colour of the source rank that writes it. Lines
run from writers to targets, as thick as what they carry.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from kvbaton.explain.topology import Explanation, RankOnPaper
from kvbaton.plan.pair import overlap

#: Colours that stay apart for most people, light enough for black text beside them.
PALETTE = (
    "#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#e15759",
    "#76b7b2", "#f28e2b", "#59a14f", "#b07aa1", "#edc948", "#17becf",
)  # fmt: skip
INK, QUIET, PAPER, EMPTY = "#1b1e23", "#6b7280", "#ffffff", "#eceef1"
MAP_SIZE = 46
MAP_GAP = 14
BOX_PADDING = 12
BOX_GAP = 14
TITLE_HEIGHT = 34
CHANNEL = 300
MARGIN = 24
HEAD = 78
FOOT = 54
FAINT = 0.28  # of what a rank holds and does not write
STROKE_LEAST, STROKE_MOST = 1.5, 11.0

_Box = tuple[float, float]  # top left


def draw(explanation: Explanation) -> str:
    """The picture as an SVG document."""
    width = 2 * BOX_PADDING + len(_pool_layers(explanation)) * (MAP_SIZE + MAP_GAP) - MAP_GAP
    width = max(width, 172)
    height = TITLE_HEIGHT + MAP_SIZE + 16 + BOX_PADDING
    counts = (len(explanation.sources), len(explanation.targets))
    body = max(counts) * (height + BOX_GAP) - BOX_GAP
    total = (2 * MARGIN + 2 * width + CHANNEL, HEAD + body + FOOT)
    boxes = [
        _column(MARGIN if side == 0 else MARGIN + width + CHANNEL, count, height, body)
        for side, count in enumerate(counts)
    ]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total[0]:.0f}" height="{total[1]:.0f}" '
        f'viewBox="0 0 {total[0]:.0f} {total[1]:.0f}" font-family="DejaVu Sans, Helvetica, Arial, sans-serif">',
        f'<rect width="100%" height="100%" rx="10" fill="{PAPER}"/>',
        *_heading(explanation, width),
        *_lines(explanation, boxes, width, height),
    ]
    idle = set(explanation.bystanders)
    layers = _pool_layers(explanation)
    for i, (rank, place) in enumerate(zip(explanation.sources, boxes[0], strict=True)):
        parts += _frame(rank, place, width, height, idle=i in idle)
        parts += _maps(rank, place, layers, [*_held(rank, i), *_sent(rank, i, explanation.targets)])
    for t, (rank, place) in enumerate(zip(explanation.targets, boxes[1], strict=True)):
        parts += _frame(rank, place, width, height, idle=False)
        writers = [(i, explanation.sources[i]) for i in explanation.writers_of(t)]
        parts += _maps(rank, place, layers, [patch for i, w in writers for patch in _shared(w, rank, i)])
    parts += _footer(explanation, total[1])
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def page(explanation: Explanation, table: str) -> str:
    """The picture and a table as one HTML document."""
    title = escape(f"kvbaton plan: {explanation.model.name}")
    style = (
        f"body{{font:14px sans-serif;color:{INK};margin:2em}}svg{{max-width:100%;height:auto}}pre{{overflow-x:auto}}"
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{style}</style></head><body>\n{draw(explanation)}<pre>{escape(table)}</pre>\n</body></html>\n"
    )


def colour(source: int) -> str:
    """The colour of a source rank."""
    return PALETTE[source % len(PALETTE)]


def _pool_layers(explanation: Explanation) -> dict[str, range]:
    """The layers of each pool over all ranks, aux last."""
    found: dict[str, set[int]] = {}
    for rank in (*explanation.sources, *explanation.targets):
        for pool in rank.layout.pools:
            found.setdefault(pool.name, set()).update(plane.layer for plane in pool.planes)
    order = sorted(found, key=lambda name: name == "aux")
    return {name: range(min(found[name]), max(found[name]) + 1) for name in order}


def _column(x: float, count: int, height: float, body: float) -> list[_Box]:
    """Boxes from top to bottom, centred in the body."""
    used = count * (height + BOX_GAP) - BOX_GAP
    return [(x, HEAD + (body - used) / 2 + i * (height + BOX_GAP)) for i in range(count)]


def _text(
    x: float, y: float, text: str, *, size: int = 12, fill: str = INK, anchor: str = "start", weight: str = "normal"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}" text-anchor="{anchor}" '
        f'font-weight="{weight}">{escape(text)}</text>'
    )


def _heading(explanation: Explanation, width: float) -> list[str]:
    right = MARGIN + width + CHANNEL
    return [
        _text(MARGIN, 30, f"{explanation.model.name}: who sends what to whom", size=16, weight="bold"),
        _text(MARGIN, HEAD - 14, f"prefill: {explanation.source_side}", fill=QUIET),
        _text(right + width, HEAD - 14, f"decode: {explanation.target_side}", fill=QUIET, anchor="end"),
    ]


def _footer(explanation: Explanation, height: float) -> list[str]:
    moved = sum(flow.bytes for flow in explanation.flows)
    pieces = sum(flow.descriptors for flow in explanation.flows)
    lines = (
        f"A prompt of {explanation.tokens} tokens: {size(moved)} in {pieces:,} pieces, each piece written once.",
        "Maps: across the items that TP shards, down the layers; the colour is the writer's, faint is held, not sent.",
    )
    return [_text(MARGIN, height - 30 + 15 * i, line, size=10, fill=QUIET) for i, line in enumerate(lines)]


def _lines(explanation: Explanation, boxes: Sequence[Sequence[_Box]], width: float, height: float) -> list[str]:
    """One curve for each pair that has flows; ends are spread along the boxes' sides."""
    pairs = sorted({(flow.source, flow.target) for flow in explanation.flows})
    carried = {pair: sum(flow.bytes for flow in explanation.between(*pair)) for pair in pairs}
    most = max(carried.values(), default=1)
    drawn = []
    for s, t in pairs:
        outgoing = [pair for pair in pairs if pair[0] == s]
        incoming = [pair for pair in pairs if pair[1] == t]
        x0, y0 = boxes[0][s][0] + width, boxes[0][s][1] + height * (outgoing.index((s, t)) + 1) / (len(outgoing) + 1)
        x1, y1 = boxes[1][t][0], boxes[1][t][1] + height * (incoming.index((s, t)) + 1) / (len(incoming) + 1)
        stroke = STROKE_LEAST + (STROKE_MOST - STROKE_LEAST) * math.sqrt(carried[s, t] / most)
        what = "; ".join(
            f"{flow.pool} items {flow.item_start}..{flow.item_stop - 1}: {size(flow.bytes)}"
            for flow in explanation.between(s, t)
        )
        title = f"{explanation.sources[s].name} to {explanation.targets[t].name}: {what}"
        bend = CHANNEL * 0.45
        drawn.append(
            f'<path d="M{x0:.1f},{y0:.1f} C{x0 + bend:.1f},{y0:.1f} {x1 - bend:.1f},{y1:.1f} {x1:.1f},{y1:.1f}" '
            f'fill="none" stroke="{colour(s)}" stroke-opacity="0.75" stroke-width="{stroke:.1f}">'
            f"<title>{escape(title)}</title></path>"
        )
        if len(outgoing) == 1 or len(pairs) <= 8:
            above = y1 > y0
            beside = y0 - stroke / 2 - 4 if above else y0 + stroke / 2 + 12
            drawn.append(_text(x0 + 10, beside, size(carried[s, t]), size=10, fill=QUIET))
    return drawn


@dataclass(frozen=True, slots=True)
class _Patch:
    """Items of a plane that have a colour. ``items``: how many the whole model has."""

    pool: str
    layer: int
    items: int
    shown: range
    fill: str
    opacity: float = 1.0


def _held(rank: RankOnPaper, number: int) -> list[_Patch]:
    """Everything that a rank has."""
    return [
        _Patch(pool.name, plane.layer, axis.items, range(axis.first, axis.first + axis.width), colour(number), FAINT)
        for pool in rank.layout.pools
        for plane in pool.planes
        for axis in (plane.axis,)
    ]


def _sent(rank: RankOnPaper, number: int, targets: Sequence[RankOnPaper]) -> list[_Patch]:
    """What a source rank writes for anybody."""
    return [patch for target in targets for patch in _shared(rank, target, number)]


def _shared(source: RankOnPaper, target: RankOnPaper, number: int) -> list[_Patch]:
    """What ``source``, of that number, writes for ``target``."""
    theirs = {(pool.name, p.layer, p.name): p.axis for pool in target.layout.pools for p in pool.planes}
    patches = []
    for pool in source.layout.pools:
        for plane in pool.planes:
            axis = theirs.get((pool.name, plane.layer, plane.name))
            if axis is not None and (shown := overlap(plane.axis, axis)):
                patches.append(_Patch(pool.name, plane.layer, axis.items, shown, colour(number)))
    return patches


def _frame(rank: RankOnPaper, place: _Box, width: float, height: float, *, idle: bool) -> list[str]:
    x, y = place
    dash = ' stroke-dasharray="5 4"' if idle else ""
    caption = "bystander: writes nothing" if idle else _holding(rank)
    return [
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="7" fill="{PAPER}" '
        f'stroke="{QUIET if idle else INK}" stroke-width="1.2"{dash}/>',
        _text(x + BOX_PADDING, y + 17, rank.name, size=12, weight="bold", fill=QUIET if idle else INK),
        _text(x + BOX_PADDING, y + 30, caption, size=9, fill=QUIET),
    ]


def _maps(rank: RankOnPaper, place: _Box, layers: dict[str, range], patches: Sequence[_Patch]) -> list[str]:
    drawn = []
    held = {pool.name for pool in rank.layout.pools}
    for i, (name, all_layers) in enumerate(layers.items()):
        left, top = place[0] + BOX_PADDING + i * (MAP_SIZE + MAP_GAP), place[1] + TITLE_HEIGHT + 3
        if name in held:
            drawn += _map(left, top, [patch for patch in patches if patch.pool == name], all_layers)
            drawn.append(_text(left + MAP_SIZE / 2, top + MAP_SIZE + 11, name, size=9, fill=QUIET, anchor="middle"))
    return drawn


def _holding(rank: RankOnPaper) -> str:
    layers = f"layers {rank.layers.start}–{rank.layers.stop - 1}"  # noqa: RUF001 - a range, for people
    axes = [plane.axis for pool in rank.layout.pools for plane in pool.planes if plane.axis.items > 1]
    if not axes:
        return layers
    sharded = axes[0]
    last = sharded.first + sharded.width - 1
    heads = f"head {sharded.first}" if sharded.width == 1 else f"heads {sharded.first}–{last}"  # noqa: RUF001
    return f"{layers}, {heads} of {sharded.items}"


def _map(left: float, top: float, patches: Sequence[_Patch], layers: range) -> list[str]:
    """Items across, layers down; neighbouring layers that look the same are one rectangle."""
    drawn = [f'<rect x="{left:.1f}" y="{top:.1f}" width="{MAP_SIZE}" height="{MAP_SIZE}" fill="{EMPTY}"/>']
    alike: dict[tuple[float, int, int, int, str], set[int]] = {}
    for patch in patches:
        key = (patch.opacity, patch.items, patch.shown.start, patch.shown.stop, patch.fill)
        alike.setdefault(key, set()).add(patch.layer)
    for (opacity, items, start, stop, fill), owned in sorted(alike.items()):
        for first, last in _runs(sorted(owned)):
            x0, x1 = MAP_SIZE * start / items, MAP_SIZE * stop / items
            y0, y1 = (MAP_SIZE * (layer - layers.start) / len(layers) for layer in (first, last + 1))
            drawn.append(
                f'<rect x="{left + x0:.1f}" y="{top + y0:.1f}" width="{x1 - x0:.1f}" height="{y1 - y0:.1f}" '
                f'fill="{fill}"' + (f' fill-opacity="{opacity}"' if opacity < 1 else "") + "/>"
            )
    return drawn


def _runs(layers: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbouring layers as (first, last)."""
    runs: list[tuple[int, int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], layer)
        else:
            runs.append((layer, layer))
    return runs


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"

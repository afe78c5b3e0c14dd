"""What of a part has been handed in so far, so that each byte is written once: a set of (layers, tokens).

A chunk is a token range of all layers, or of some. In each layer tokens come in order and without gaps; between layers
there is no order: one may be whole chunks ahead of another. So the set is one number for each layer, the first token
that is still to come, and while all layers are equally far, as they are between whole chunks, one number for all.

What moves at once is a lane: bytes that are contiguous on both sides. Most lanes belong to one layer; where layers lie
side by side in a page on both sides, a lane belongs to several, and goes when the last of them has come. A part that
travels through staging goes by whole blocks, so for it all layers are one (``whole``).

The units of a lane's new tokens are always those of the chunk that made them complete: this chunk moved the hindmost of
the lane's layers, so its tokens begin at or before the lane's and end at or behind them. Nothing of chunks that have
passed needs to be kept.

An engine may withdraw what it has handed in (see ``sending``). Then whatever of it has not left for good, or could not
leave yet, has not come.

Pools of slots have one block and no tokens; what belongs to no layer comes with the last chunk.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from msgspec import Struct

from kvbaton.errors import LocalProtocolError
from kvbaton.layout import NO_LAYER
from kvbaton.plan.pair import Int64s, PartPlan

Layers = tuple[int, int]
"""Absolute ids of layers, half open."""


class Piece(Struct, frozen=True):
    """Blocks of some lanes of a part (None: of all) that can be written now: from token ``start`` on, so many bytes."""

    lanes: Int64s | None
    blocks: range
    start: int
    bytes: int


class Coverage:
    """See the module. ``bytes``: of all pieces so far.

    Args:
        part: what is covered.
        token_start, token_stop: tokens that the target wants of it.
        whole: its blocks travel whole.
    """

    __slots__ = ("_begin", "_come", "_first", "_part", "_stop", "_whole", "bytes")

    def __init__(self, part: PartPlan, token_start: int, token_stop: int, *, whole: bool = False) -> None:
        self._part = part
        self._whole = whole
        self._first, self._stop = (token_start, token_stop) if part.paged else (0, 1)
        self._begin = self._first
        self._come: Int64s | None = None  # by layer, where they differ; otherwise ``_begin`` says it for all
        self.bytes = 0

    def add(self, layers: Layers | None, token_start: int, token_stop: int, *, last: bool) -> list[Piece]:
        """What a chunk makes complete: tokens of ``layers``, or of all; what has come before or is not wanted is left
        out. ``last``: no chunk follows.

        Raises LocalProtocolError where tokens before the chunk are missing, LayoutError where it begins in a block.
        """
        if not self._part.paged:
            token_start, token_stop = 0, 1
        end = min(token_stop, self._stop)
        if layers is None and self._come is None:
            begin, self._begin = self._begin, max(self._begin, end)
            self._check_gap(begin, token_start)
            return self._pieces([(begin, end, None)])
        return self._add_some(layers, token_start, end, last=last)

    def _add_some(self, layers: Layers | None, token_start: int, end: int, *, last: bool) -> list[Piece]:
        numbers = self._part.layers
        chosen = np.ones(len(numbers), dtype=bool)
        if layers is not None:
            chosen = (numbers >= layers[0]) & (numbers < layers[1]) | ((numbers == NO_LAYER) & last)
        if not chosen.any():
            return []
        before = self._come if self._come is not None else np.full(len(numbers), self._begin, dtype=np.int64)
        hindmost = int(before[chosen].min())
        self._check_gap(hindmost, token_start, int(numbers[chosen][before[chosen].argmin()]))
        after = np.where(chosen, np.maximum(before, end), before)
        level = bool((after == after[0]).all())
        self._come, self._begin = (None, int(after[0])) if level else (after, self._begin)
        starts, stops = self._of_lanes(before), self._of_lanes(after)
        moved = np.flatnonzero(stops > starts)
        ranges = np.unique(np.stack((starts[moved], stops[moved]), axis=1), axis=0).tolist()
        return self._pieces(
            [(start, stop, moved[(starts[moved] == start) & (stops[moved] == stop)]) for start, stop in ranges]
        )

    def withdraw(self, out: Iterable[Piece]) -> None:
        """Nothing of these pieces, which are not settled, nor of what has come and not gone counts any more; nor does
        a slot."""
        part, lanes = self._part, self._part.lane_layers
        come = self._come if self._come is not None else np.full(len(part.layers), self._begin, dtype=np.int64)
        gone = self._of_lanes(come)
        for piece in out:
            chosen = slice(None) if piece.lanes is None else piece.lanes
            gone[chosen] = np.minimum(gone[chosen], piece.start)
        if not part.paged:
            gone[:] = self._first
        come = np.full(len(part.layers), self._stop, dtype=np.int64)
        for number, (first, last) in enumerate(lanes.tolist()):
            come[first : last + 1] = np.minimum(come[first : last + 1], gone[number])
        gone = self._of_lanes(come)
        self._come = come
        self.bytes = sum(
            len(part.blocks(self._first, stop)) * int(size) if stop > self._first else 0
            for stop, size in zip(gone.tolist(), part.lane_bytes.tolist(), strict=True)
        )

    def _of_lanes(self, come: Int64s) -> Int64s:
        """By lane, the first token that is not there yet in every layer of it."""
        lanes = self._part.lane_layers
        if self._whole:
            return np.full(len(lanes), come.min(), dtype=np.int64)
        first, last = lanes[:, 0], lanes[:, 1]
        found: Int64s = come[first]
        for number in np.flatnonzero(first < last).tolist():
            found[number] = come[first[number] : last[number] + 1].min()
        return found

    def _pieces(self, ranges: list[tuple[int, int, Int64s | None]]) -> list[Piece]:
        part, made = self._part, []
        for start, stop, lanes in ranges:
            blocks = part.blocks(start, stop) if start < stop else range(0)
            if blocks:
                everything = lanes is None or len(lanes) == len(part.lane_bytes)
                size = part.block_bytes if everything or lanes is None else int(part.lane_bytes[lanes].sum())
                made.append(Piece(None if everything else lanes, blocks, start, len(blocks) * size))
        self.bytes += sum(piece.bytes for piece in made)
        return made

    def _check_gap(self, come: int, token_start: int, layer: int = NO_LAYER) -> None:
        if token_start > come and come < self._stop:
            where = f" of layer {layer}" if layer != NO_LAYER else ""
            raise LocalProtocolError(
                f"pool {self._part.id.pool!r}: chunk starts at token {token_start} but {come}{where} is next; "
                "submit chunks in token order without gaps"
            )

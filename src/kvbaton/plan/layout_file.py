"""Layouts of a group of ranks as JSON: what ``kvbaton check`` compares and what a server answers at ``/layout``.

A file holds one :class:`RankLayout` or a list of them. Structs of the layout that are arrays on the wire (regions,
planes, axes) are arrays here, in the order of their fields. A file is untrusted: everything is checked on the way in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from kvbaton.errors import LayoutError
from kvbaton.layout import CacheLayout, Coordinates
from kvbaton.layout.coordinates import Text

#: Largest file or answer.
MAX_LAYOUT_BYTES = 64 << 20
MAX_RANKS = 4096


class RankLayout(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The memory of one rank and its place in a group of ``group_size`` ranks."""

    layout: CacheLayout
    coordinates: Coordinates = Coordinates()
    group_size: Annotated[int, Meta(ge=1, le=65_536)] = 1
    group: Text = ""

    @property
    def name(self) -> str:
        """The rank for people."""
        at = self.coordinates
        return f"dp {at.dp} pp {at.pp} tp {at.tp}" + (f" cp {at.cp}" if at.cp else "")


def encode(ranks: Sequence[RankLayout]) -> bytes:
    """The file of a group."""
    return msgspec.json.encode(list(ranks))


def decode(payload: bytes, where: str) -> tuple[RankLayout, ...]:
    """The ranks in a file. Raises LayoutError, naming ``where``, for what is not valid layouts of one group."""
    if len(payload) > MAX_LAYOUT_BYTES:
        raise LayoutError(f"{where}: more than {MAX_LAYOUT_BYTES} bytes are no layout")
    try:
        decoded = msgspec.json.decode(payload, type=RankLayout | list[RankLayout])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise LayoutError(f"{where}: not a layout file: {error}") from None
    ranks = tuple(decoded) if isinstance(decoded, list) else (decoded,)
    if not 1 <= len(ranks) <= MAX_RANKS:
        raise LayoutError(f"{where}: {len(ranks)} ranks; a file holds 1 to {MAX_RANKS}")
    seen: dict[Coordinates, int] = {}
    for number, rank in enumerate(ranks):
        try:
            rank.layout.validate()
        except LayoutError as error:
            raise LayoutError(f"{where}: rank {number} ({rank.name}): {error.message}") from None
        if rank.coordinates in seen:
            raise LayoutError(f"{where}: ranks {seen[rank.coordinates]} and {number} both are {rank.name}")
        seen[rank.coordinates] = number
    for field in ("group", "group_size"):
        values = sorted({str(getattr(rank, field)) for rank in ranks})
        if len(values) > 1:
            raise LayoutError(f"{where}: the ranks belong to several groups: {field} is {' and '.join(values)}")
    if len(ranks) > ranks[0].group_size:
        raise LayoutError(f"{where}: {len(ranks)} ranks in a group of {ranks[0].group_size}")
    return ranks

"""Where a rank stands in its group, and the bounded values that say so."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

#: Longest name or reason, in characters.
MAX_TEXT = 2048
Text = Annotated[str, Meta(max_length=MAX_TEXT)]
Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]


class Coordinates(Struct, frozen=True, array_like=True):
    """Data, pipeline, context and tensor parallel rank."""

    dp: Count = 0
    pp: Count = 0
    cp: Count = 0
    tp: Count = 0

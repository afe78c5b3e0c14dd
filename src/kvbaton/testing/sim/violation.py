"""A broken invariant: what a run ends with when the protocol gives way."""

from __future__ import annotations


class Violation(Exception):
    """``kind`` is a stable word that shrinking holds on to; the text says what was seen."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind
        self.text = text

"""What ``CacheLayout.model`` says: which model a rank serves, so that caches of two models never mix.

It is any text, and two ranks serve the same model if theirs are equal. A text that is a JSON object says more: a value
for each thing that changes numbers, so that a verdict can name what differs. A field that only one side has differs
unless its value is empty (null, false, zero, nothing in it): another version of a library may write defaults that
this one leaves out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

#: Longest value that is carried as it is; of longer ones a digest is.
MAX_VALUE = 48
#: Longest text; what does not fit is carried as one digest.
MAX_TEXT = 1_800


def encode(fields: Mapping[str, Any]) -> str:
    """The text of a model with these fields, in the order of their names."""

    def digest(value: object) -> str:
        return hashlib.sha256(msgspec.json.encode(value)).hexdigest()[:16]

    short: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    left = MAX_TEXT
    for name in sorted(fields):
        value = fields[name]
        if len(msgspec.json.encode(value)) > MAX_VALUE:
            value = f"sha256:{digest(value)}"
        left -= len(msgspec.json.encode({name: value}))
        (short if left > 0 else rest)[name] = value
    if rest:
        short["…"] = f"sha256:{digest(rest)}"
    return msgspec.json.encode(short).decode()


def decode(text: str) -> dict[str, Any] | None:
    """The fields of a text that is a JSON object; None of any other."""
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.MsgspecError:
        return None


def model_differences(source: str, target: str) -> Iterator[tuple[str, object, object]]:
    """(field, source's value, target's value) of everything in which two models differ; "" names the whole text."""
    if source == target:
        return
    ours, theirs = decode(source), decode(target)
    if ours is None or theirs is None:
        yield "", source, target
        return
    for name in sorted(ours.keys() | theirs.keys()):
        mine, other = ours.get(name), theirs.get(name)
        if mine != other and (mine or other):
            yield name, mine, other

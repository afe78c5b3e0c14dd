"""What names a model: any text, or fields of which a verdict names those that differ."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbaton.plan.identity import MAX_TEXT, decode, encode, model_differences

VALUES = st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.text(max_size=80), st.lists(st.text(), max_size=9))
FIELDS = st.dictionaries(st.text(min_size=1, max_size=20), VALUES, max_size=200)


@given(FIELDS, FIELDS)
def test_differences_are_told_by_field_and_both_ways(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    forth = [field for field, _, _ in model_differences(encode(ours), encode(theirs))]
    back = [field for field, _, _ in model_differences(encode(theirs), encode(ours))]
    assert forth == back
    differ = {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)}
    weighty = {name for name in differ if ours.get(name) or theirs.get(name)}
    assert bool(forth) >= bool(weighty)
    assert set(forth) - {"…"} <= weighty


@given(FIELDS)
def test_a_text_is_bounded_and_the_order_of_fields_is_none_of_its_business(fields: dict[str, Any]) -> None:
    text = encode(fields)
    assert len(text) <= MAX_TEXT + 200
    assert text == encode(dict(reversed(fields.items())))
    assert decode(text) is not None


def test_a_field_that_one_side_leaves_out_differs_unless_it_is_empty() -> None:
    ours = encode({"weights": "ab", "rope_theta": 10_000.0, "sliding_window": None, "attention_bias": False})
    assert list(model_differences(ours, encode({"weights": "ab", "rope_theta": 10_000.0}))) == []
    assert list(model_differences(ours, encode({"weights": "ab"}))) == [("rope_theta", 10_000.0, None)]


@pytest.mark.parametrize(("ours", "theirs"), [("m", "n"), ("m", "{}"), ("{", '{"a":1}')])
def test_other_texts_are_compared_whole(ours: str, theirs: str) -> None:
    assert list(model_differences(ours, theirs)) == [("", ours, theirs)]
    assert list(model_differences(ours, ours)) == []

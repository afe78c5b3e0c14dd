"""What a router passes on is what it has read: no client's value becomes a field that the router has not seen."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from kvbaton.errors import ConfigError
from kvbaton.serving.router.calls import strip
from kvbaton.serving.router.client_fields import client_fields
from kvbaton.serving.server.fields import FieldRule

OURS = {"bootstrap_host": "ours", "bootstrap_port": 1, "bootstrap_room": 5}
BODIES = (
    b'{"prompt":"a","stop":["x","\\u0000"],"bootstrap_host":"theirs","n":1}',
    b'{"prompt":[1,2],"extra":{"a":{"b":[null,true,1e5]}},"bootstrap_room":7}',
    b'{"prompt":"\\"","b":"}","c":"\\\\","\\u0062ootstrap_port":2,"bootstrap_port":3}',
)
CHANGES = st.lists(
    st.tuples(st.integers(0, 80), st.booleans(), st.sampled_from(b'{}[]",:\\u0 \nabn1e-.\x00\xff')), max_size=4
)


@given(st.sampled_from(BODIES), CHANGES)
def test_no_value_smuggles_a_field_past_the_router(body: bytes, changes: list[tuple[int, bool, int]]) -> None:
    """Bodies with a few bytes changed: refused, or written again with the fields that were read, and ours."""
    changed = bytearray(body)
    for at, inserted, byte in changes:
        at %= len(changed)
        changed[at : at + (not inserted)] = bytes([byte])
    try:
        fields, _ = client_fields(bytes(changed), FieldRule())
    except ConfigError:
        return
    passed_on = msgspec.json.encode({**strip(fields), **OURS})
    again = msgspec.json.decode(passed_on, type=dict[str, msgspec.Raw])
    assert again.keys() == strip(fields).keys() | OURS.keys()
    assert {name: msgspec.json.decode(again[name]) for name in OURS} == OURS

"""The tree of errors: stable codes, whose fault, and what survives the wire."""

from __future__ import annotations

import re

import pytest

from kvbaton import errors
from kvbaton.errors import (
    AbortedError,
    IncompatibleError,
    InternalError,
    KVBatonError,
    TransferFailedError,
    from_code,
)


def tree(root: type[KVBatonError] = KVBatonError) -> list[type[KVBatonError]]:
    """All errors of ``errors.py`` below and with ``root``: what peers may tell each other."""
    below = [child for child in root.__subclasses__() if child.__module__ == errors.__name__]
    return [root, *(kind for child in below for kind in tree(child))]


def test_the_tree_is_the_one_that_is_drawn() -> None:
    drawn = re.findall(r"^[ │├└─]*(\w+Error) +(\w+)", errors.__doc__ or "", re.MULTILINE)
    assert dict(drawn) == {kind.__name__: kind.fault for kind in tree()[1:]}
    depths = {
        m[2]: (len(m[1]) - 4) // 4 + 1 for m in re.finditer(r"^    ([ │├└─]+)(\w+Error)", errors.__doc__ or "", re.M)
    }
    for kind in tree()[1:]:
        assert depths[kind.__name__] == len(kind.__mro__) - len(KVBatonError.__mro__), kind


def test_codes_are_unique_and_stable() -> None:
    assert {kind.code: kind.__name__ for kind in tree()} == {
        "error": "KVBatonError",
        "config": "ConfigError",
        "layout": "LayoutError",
        "capacity": "CapacityError",
        "context_length_exceeded": "ContextLengthError",
        "model_not_found": "UnknownModelError",
        "misuse": "LocalProtocolError",
        "protocol": "RemoteProtocolError",
        "message": "MessageError",
        "incompatible": "IncompatibleError",
        "authentication": "AuthenticationError",
        "peer_lost": "PeerLostError",
        "transfer_failed": "TransferFailedError",
        "aborted": "AbortedError",
        "declined": "DeclinedError",
        "expired": "ExpiredError",
        "overloaded": "OverloadedError",
        "transport": "TransportError",
        "disconnected": "DisconnectedError",
        "registry": "RegistryError",
        "internal": "InternalError",
    }
    assert len({kind.code for kind in tree()}) == len(tree())


@pytest.mark.parametrize("kind", tree(), ids=lambda kind: kind.code)
def test_an_error_that_crossed_the_wire_is_of_the_same_kind(kind: type[KVBatonError]) -> None:
    rebuilt = from_code(kind.code, "why", peer="p", room=7)
    assert type(rebuilt) is kind
    assert (rebuilt.message, rebuilt.peer, rebuilt.room, rebuilt.hint) == ("why", "p", 7, "")


def test_a_code_from_the_future_is_a_failed_transfer() -> None:
    assert type(from_code("from the future", "why")) is TransferFailedError


def test_an_error_says_where_it_happened() -> None:
    assert str(AbortedError("gone")) == "gone"
    assert str(AbortedError("gone", room=0)) == "gone [room 0]"
    assert str(AbortedError("gone", peer="p", room=7).in_room(8, "Transferring")) == (
        "gone [room 8] [while Transferring] [peer p]"
    )


def test_one_cause_of_many_rooms_stays_itself() -> None:
    cause = IncompatibleError("differ", field="f", ours="a", theirs="b", peer="p")
    first, second = cause.in_room(1, "Bootstrapping"), cause.in_room(2)
    assert (cause.room, first.room, second.room) == (None, 1, 2)
    assert isinstance(first, IncompatibleError)
    assert (first.field, first.ours, first.theirs, first.peer) == ("f", "a", "b", "p")
    assert first.in_room(3, "Transferring").phase == "Bootstrapping"


def test_an_error_that_is_raised_again_keeps_its_cause_and_nobody_elses_traceback() -> None:
    cause = ValueError("the first root")
    try:
        raise InternalError("the thread died", peer="p", hint="restart") from cause
    except InternalError as error:
        told = error
    twin = told.again()
    assert twin is not told
    assert (twin.__cause__, twin.__traceback__, twin.__context__) == (cause, None, None)
    assert (twin.peer, twin.hint) == ("p", "restart")


def test_a_difference_is_mirrored_for_the_other_side() -> None:
    error = IncompatibleError("differ", field="f", ours="a", theirs="b", peer="p", room=3, hint="h")
    swapped = error.swapped()
    assert (swapped.field, swapped.ours, swapped.theirs) == ("f", "b", "a")
    assert (swapped.message, swapped.peer, swapped.room, swapped.hint) == ("differ", "p", 3, "h")

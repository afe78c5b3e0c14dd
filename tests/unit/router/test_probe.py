"""What a worker's answer to a probe makes of it."""

from __future__ import annotations

import msgspec
import pytest

from kvbaton.protocol.messages import PROTOCOL_VERSION
from kvbaton.serving.router.probe import ProbeAnswer, decoded
from kvbaton.serving.router.worker import State


def verdict(status: int = 200, **body: object) -> tuple[State, str]:
    return decoded(msgspec.json.encode(body)).verdict("decode", "/ready", status, "m")


@pytest.mark.parametrize(
    ("body", "trouble"),
    [
        ({"mode": "prefill"}, "it is a prefill server; name it with --prefill"),
        ({"protocol": PROTOCOL_VERSION + 1}, f"it speaks protocol version {PROTOCOL_VERSION + 1}"),
        ({"admits": False}, "it does not take this router's secret"),
        ({"model": "other"}, "it serves the model 'other'"),
    ],
)
def test_what_would_fail_every_request_is_not_used_and_says_why(body: dict[str, object], trouble: str) -> None:
    state, told = verdict(**{"mode": "decode", "model": "m", **body})
    assert state is State.UNFIT
    assert trouble in told


def test_a_server_that_fits_is_ready_or_says_that_it_starts_or_drains() -> None:
    fits = {"mode": "decode", "protocol": PROTOCOL_VERSION, "admits": True, "model": "m"}
    assert verdict(**fits) == (State.READY, "")
    assert verdict(503, **fits, reason="loading") == (State.NEW, "/ready answers HTTP 503 (loading)")
    assert verdict(503, **fits, draining=True)[0] is State.DRAINING


@pytest.mark.parametrize("payload", [b"", b"ok", b"[]", b'{"mode": 7}', b"\xff", b"[" * 100_000])
def test_of_a_body_that_is_none_of_ours_only_the_status_counts(payload: bytes) -> None:
    assert decoded(payload) == ProbeAnswer()
    assert decoded(payload).verdict("prefill", "/health", 200) == (State.READY, "")

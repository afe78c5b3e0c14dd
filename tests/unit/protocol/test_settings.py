"""Durations and bounds: positive each, and what follows from them."""

from __future__ import annotations

import pytest

from kvbaton.errors import ConfigError
from kvbaton.protocol.settings import Settings


@pytest.mark.parametrize("wrong", [{"rooms": 0}, {"retry_seconds": 0.0}, {"write_bytes": -1}, {"settle_seconds": -0.5}])
def test_a_duration_or_bound_that_is_not_positive_is_named(wrong: dict[str, float]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ConfigError, match=f"{name}={value} must be positive"):
        Settings(**wrong)  # type: ignore[arg-type]


def test_a_peer_is_lost_after_its_missed_heartbeats() -> None:
    assert Settings(heartbeat_interval=3.0, heartbeat_misses=4).silence_seconds == 12.0


def test_settings_from_a_mapping() -> None:
    given = {"bootstrap_timeout": 30, "quarantine_seconds": None, "rooms": 5, "staging": "never"}
    assert Settings.from_mapping(given) == Settings(
        bootstrap_timeout=30, quarantine_seconds=None, rooms=5, staging="never"
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bootstrap": 1}, "is no setting; there are: handshake_timeout"),
        ({"rooms": 1.5}, "rooms=1.5 is no int"),
        ({"rooms": True}, "rooms=True is no int"),
        ({"settle_seconds": "10"}, "settle_seconds='10' is no float"),
        ({"settle_seconds": None}, "settle_seconds=None is no float"),
        ({"settle_seconds": float("inf")}, "settle_seconds=inf is no float"),
        ({"staging": "perhaps"}, "staging='perhaps' is no StagingPolicy"),
        ({"rooms": 0}, "must be positive"),
    ],
)
def test_a_mapping_that_says_something_else(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Settings.from_mapping(values)

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

"""Every transport through the same suite."""

from __future__ import annotations

import pytest

from kvbaton.errors import ConfigError
from kvbaton.testing.transport_conformance import TransportConformance
from kvbaton.transports import make_transport


class TestMemory(TransportConformance):
    transport_name = "memory"


class TestNixl(TransportConformance):
    transport_name = "nixl"


def test_an_unknown_transport_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="nixl, memory"):
        make_transport("carrier-pigeon", "instance")

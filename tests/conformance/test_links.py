"""All links through the same suite."""

from __future__ import annotations

import pytest

from kvbaton.control.base import Links
from kvbaton.control.memory import Network
from kvbaton.control.zmq import ZmqLinks
from kvbaton.testing.links_conformance import LinksConformance


class TestMemory(LinksConformance):
    bad_addresses = ("", "nonsense", "memory://", "tcp://127.0.0.1:1")

    @pytest.fixture(autouse=True)
    def _network(self) -> None:
        self.network = Network()

    def listen(self, address: str = "") -> Links:
        return self.network.listen(address)


class TestZmq(LinksConformance):
    bad_addresses = (
        "",
        "nonsense",
        "tcp://",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:0",
        "tcp://127.0.0.1:65536",
        "tcp://127.0.0.1:-1",
        "tcp://127.0.0.1:٣",
        "tcp://::1:5",
        "tcp://[::1:5",
        "tcp://[127.0.0.1]:5",
        "tcp://prefill-0.example:8998",
        "tcp://0.0.0.0:8998",
        "tcp://192.0.2.1:8998",  # on the network, without a secret
        "ipc:///tmp/x",
    )

    def listen(self, address: str = "") -> Links:
        return ZmqLinks(address or "tcp://127.0.0.1:0")


class TestZmqWithSecret(LinksConformance):
    bad_addresses = ("", "tcp://0.0.0.0:8998", "tcp://[::]:8998")

    def listen(self, address: str = "") -> Links:
        return ZmqLinks(address or "tcp://127.0.0.1:0", secret="a secret of many words")

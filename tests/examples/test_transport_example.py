"""The example of a data plane passes the suite that our own pass, and serves a manager by its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.tcp_transport import TcpTransport
from kvbaton import Transport
from kvbaton.errors import ConfigError
from kvbaton.testing.target_process import TargetProcess
from kvbaton.testing.transport_conformance import TransportConformance
from kvbaton.transports import make_transport

ROOT = Path(__file__).parents[2]
NAME = "examples.tcp_transport:TcpTransport"


class TestTcp(TransportConformance):
    transport_name = "tcp"

    @pytest.fixture(autouse=True)
    def _importable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The target's process imports the example, too."""
        monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'src'}:{ROOT}")

    def make(self, instance: str) -> Transport:
        return make_transport(NAME, instance)

    def make_target_process(self, instance: str, size: int) -> TargetProcess:
        return TargetProcess(NAME, instance, size)


def test_a_plug_in_is_named_by_module_and_class() -> None:
    with make_transport(NAME, "source") as transport:
        assert type(transport) is TcpTransport


@pytest.mark.parametrize("name", ["examples.nothing:TcpTransport", "examples.tcp_transport:Nothing", ":TcpTransport"])
def test_a_plug_in_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' cannot be imported"):
        make_transport(name, "source")

"""Which interfaces UCX is told to use."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from kvbaton.engines.sglang.options import Options as SglangOptions
from kvbaton.engines.vllm.options import Options as VllmOptions
from kvbaton.serving.server.allow import AllowList
from kvbaton.serving.server.data_network import data_addresses
from kvbaton.transports import interfaces
from kvbaton.transports.interfaces import LOOPBACK, VARIABLE, interface_of, restrict, source_towards


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv(VARIABLE, "to be restored")
    monkeypatch.delenv(VARIABLE)


@pytest.fixture
def rdma(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for port in ("mlx5_0/ports/1", "mlx5_1/ports/1"):
        (tmp_path / port).mkdir(parents=True)
    monkeypatch.setattr(interfaces, "_RDMA", tmp_path)


def chosen() -> str | None:
    return interfaces.os.environ.get(VARIABLE)


@pytest.mark.usefixtures("rdma")
@pytest.mark.parametrize("addresses", [("127.0.0.1",), ("::1",), ("127.0.0.1", "127.8.8.8")])
def test_loopback_is_loopback_alone(addresses: tuple[str, ...]) -> None:
    restrict(addresses)
    assert chosen() == LOOPBACK


@pytest.mark.usefixtures("rdma")
def test_another_address_is_its_interface_and_rdma_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    outer = interfaces.ipaddress.ip_address("198.51.100.7")
    monkeypatch.setattr(interfaces, "_all_addresses", lambda: {outer: "eth7"})
    restrict(["198.51.100.7", "127.0.0.1"])
    assert chosen() == "eth7,lo,mlx5_0:1,mlx5_1:1"


def test_what_the_operator_has_set_stays_and_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(VARIABLE, "mlx5_3:1")
    restrict(["127.0.0.1"])
    assert chosen() == "mlx5_3:1"
    assert "UCX listens on mlx5_3:1, as UCX_NET_DEVICES says" in caplog.text


@pytest.mark.parametrize("addresses", [(), ("198.51.100.77",), ("registry.example",), ("127.0.0.1", "198.51.100.77")])
def test_what_is_no_address_of_this_machine_restricts_nothing_and_is_told(
    addresses: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    restrict(addresses)
    assert chosen() is None
    assert "UCX listens on every interface" in caplog.text
    assert f"set {VARIABLE}" in caplog.text


@pytest.mark.usefixtures("rdma")
@pytest.mark.parametrize(
    ("options", "receives", "chosen_devices"),
    [
        ({}, False, LOOPBACK),
        ({}, True, LOOPBACK),
        ({"secret_file": "s"}, False, LOOPBACK),
        ({"secret_file": "s"}, True, None),  # prefill may be anywhere
        ({"secret_file": "s", "host": "198.51.100.7"}, True, "eth7,mlx5_0:1,mlx5_1:1"),
        ({"secret_file": "s", "host": "0.0.0.0", "advertise": "198.51.100.7"}, False, "eth7,mlx5_0:1,mlx5_1:1"),
        ({"backend": "memory"}, False, None),
    ],
)
def test_a_rank_of_vllm_uses_the_interface_where_it_is_reached(
    options: dict[str, object], receives: bool, chosen_devices: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    outer = interfaces.ipaddress.ip_address("198.51.100.7")
    monkeypatch.setattr(interfaces, "_all_addresses", lambda: {outer: "eth7"})
    VllmOptions.from_mapping(options).place_data_plane(receives=receives)
    assert chosen() == chosen_devices


@pytest.mark.usefixtures("rdma")
@pytest.mark.parametrize(("secret", "chosen_devices"), [("", LOOPBACK), ("s", "eth7,mlx5_0:1,mlx5_1:1")])
def test_a_rank_of_sglang_uses_that_interface_and_without_a_secret_loopback(
    secret: str, chosen_devices: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outer = interfaces.ipaddress.ip_address("198.51.100.7")
    monkeypatch.setattr(interfaces, "_all_addresses", lambda: {outer: "eth7"})
    SglangOptions(secret_file=secret).keep_to("198.51.100.7")
    assert chosen() == chosen_devices


def test_every_address_of_this_machine_has_its_interface() -> None:
    names = {name for _, name in interfaces.socket.if_nameindex()}
    found = interfaces._all_addresses()
    assert found
    assert set(found.values()) <= names
    assert interface_of(source_towards("127.0.0.1")) == LOOPBACK


@pytest.mark.parametrize(
    ("mode", "allow", "listens", "advertised", "addresses"),
    [
        ("prefill", (), "127.0.0.1", "", ["127.0.0.1"]),
        ("prefill", (), "127.0.0.1", "203.0.113.5", ["127.0.0.1"]),  # address translation in front of it
        ("prefill", (), "0.0.0.0", "127.0.0.1", ["127.0.0.1"]),
        ("prefill", (), "0.0.0.0", "203.0.113.5", ["203.0.113.5"]),
        ("decode", (), "127.0.0.1", "", ["127.0.0.1"]),
        ("decode", ("localhost",), "127.0.0.1", "", ["127.0.0.1"]),
        ("decode", ("host.invalid",), "127.0.0.1", "", ["host.invalid"]),
    ],
)
def test_the_addresses_that_a_server_needs(
    mode: str, allow: tuple[str, ...], listens: str, advertised: str, addresses: list[str]
) -> None:
    assert data_addresses(mode, AllowList.parse(allow), listens, advertised) == addresses

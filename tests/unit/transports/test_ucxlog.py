"""The parser of UCX's protocol tables, on a log as UCX 1.20 writes it."""

from __future__ import annotations

import logging
import os

import pytest

from kvbaton.transports.ucxlog import Chosen, UcxLog, _tables

LOG = """\
[1795231108.136905] [vm:4130 :0]   +--------+-------------+-----------------------------------+
[1795231108.136905] [vm:4130 :0]   | S self cfg#0                                             |
[1795231108.136905] [vm:4130 :0]   | remote memory write by ucp_put* from host memory to host |
[1795231108.136905] [vm:4130 :0]   +--------+-------------+-----------------------------------+
[1795231108.136905] [vm:4130 :0]   | Range  | Description |              Config               |
[1795231108.136905] [vm:4130 :0]   +--------+-------------+-----------------------------------+
[1795231108.136905] [vm:4130 :0]   | 0..inf | zero-copy   | cma/memory                        |
[1795231108.136905] [vm:4130 :0]   +--------+-------------+-----------------------------------+
[1795231108.138128] [vm:4130 :0]   +------------+--------------------+---------------+
[1795231108.138128] [vm:4130 :0]   | S intra-node cfg#1                              |
[1795231108.138128] [vm:4130 :0]   | active message by ucp_am_send* from host memory |
[1795231108.138128] [vm:4130 :0]   +------------+--------------------+---------------+
[1795231108.138128] [vm:4130 :0]   |   Range    |    Description     |    Config     |
[1795231108.138128] [vm:4130 :0]   |          0 | short              | tcp/lo        |
[1795231108.138128] [vm:4130 :0]   |   1..16515 | zero-copy          | tcp/lo        |
[1795231108.140000] [vm:4130 :0]   | a b inter-node cfg#2                                     |
[1795231108.140000] [vm:4130 :0]   | remote memory write by ucp_put* from cuda memory to cuda |
[1795231108.140000] [vm:4130 :0]   |      0 | short       | 52% on tcp/lo and 48% on tcp/eth0 |
[1795231108.140000] [vm:4130 :0]   | 1..inf | zero-copy   | rc_mlx5/mlx5_0:1                  |
"""
COMPLAINTS = """\
[1795232009.753982] [vm:5522 :0]           mpool.c:40   UCX  WARN  object 0x56 was not returned to mpool
[1795232009.753982] [vm:5522 :0]           tcp_ep.c:40   UCX  ERROR connection refused
[1795232009.753982] [vm:5522 :0]           tcp_ep.c:40   UCX  INFO  nobody asked
[1795232009.753982] [vm:5522 :0]           half a li"""


def test_only_tables_of_writes_are_taken() -> None:
    found = [(table.agent, table.scope, table.ways) for table in _tables(LOG.encode())]
    assert found == [
        ("S", "self", ("cma/memory",)),
        ("a b", "inter-node", ("52% on tcp/lo and 48% on tcp/eth0", "rc_mlx5/mlx5_0:1")),
    ]


def test_positions_rise() -> None:
    first, second = (table.at for table in _tables(LOG.encode()))
    assert LOG[first:].splitlines()[0].endswith("| S self cfg#0                                             |")
    assert second > first


@pytest.mark.parametrize("log", [b"", b"\xff\xfe\n" * 10, LOG.encode()[:-60], b"| x self cfg#1 |\n| 0 | a | b |\n"])
def test_a_log_that_is_cut_or_strange_is_no_error(log: bytes) -> None:
    assert all(isinstance(table, Chosen) for table in _tables(log))


def test_complaints_are_passed_on_once_and_whole(caplog: pytest.LogCaptureFixture) -> None:
    log = UcxLog()
    if log._file < 0:  # UCX is loaded already, or a variable is set
        log.active, log._file = True, os.memfd_create("test")
    try:
        os.write(log._file, COMPLAINTS.encode())
        with caplog.at_level(logging.WARNING):
            log.pass_on()
            log.pass_on()
        assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
            ("WARNING", "UCX: object 0x56 was not returned to mpool"),
            ("ERROR", "UCX: connection refused"),
        ]
    finally:
        os.close(log._file)


def test_what_a_user_set_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_PROTO_INFO", "n")
    log = UcxLog()
    with log.capturing():
        assert os.environ["UCX_PROTO_INFO"] == "n"
        assert "UCX_LOG_FILE" not in os.environ
    assert not log.active
    assert log.chosen("anybody") == []

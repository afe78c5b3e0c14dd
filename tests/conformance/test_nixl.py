"""What is particular to the NIXL transport: real TCP, the fence, the evidence, and what it does to the process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from kvbaton.errors import ConfigError, TransportError
from kvbaton.layout import Region
from kvbaton.testing.target_process import TargetProcess, digest
from kvbaton.testing.transport_conformance import PlaneRank, indices, settled, table, write
from kvbaton.transports.base import TableId, WriteState
from kvbaton.transports.nixl import NixlTransport

PIECE = 64 * 1024
PIECES = 512


@pytest.fixture
def source() -> Iterator[PlaneRank]:
    with NixlTransport("source") as transport:
        yield PlaneRank(transport, PIECE * PIECES, fill=2)


def connect(source: PlaneRank, target: TargetProcess) -> TableId:
    source.transport.connect(target.instance, target.metadata)
    pieces = (0, PIECE, PIECE, PIECES)
    return source.transport.prepare(target.instance, source.table(pieces), table(target.address, pieces))


def test_nothing_is_read_after_a_fence_even_over_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")
    everything = np.arange(PIECES, dtype=np.int32)
    with (
        NixlTransport("source") as transport,
        TargetProcess("nixl", "stuck", PIECE * PIECES) as stuck,
        TargetProcess("nixl", "other", PIECE * PIECES) as other,
    ):
        source = PlaneRank(transport, PIECE * PIECES, fill=2)
        slow, spared = connect(source, stuck), connect(source, other)
        write(transport, slow, [0], [0])
        stuck.stop()
        pending = transport.post(slow, everything, everything)
        fine = transport.post(spared, everything, everything)
        assert transport.poll(pending) is WriteState.PENDING
        transport.fence("stuck")
        source.memory[:] = 7
        stuck.go_on()
        assert settled(transport, fine) is WriteState.DONE, "the fence let the other peer's write finish"
        assert stuck.ask("count 7") == 0
        assert other.ask("count 2") == PIECE * PIECES
        write(transport, spared, everything.tolist(), everything.tolist())
        assert other.ask("digest") == digest(source.memory)
        assert stuck.ask("count 7") == 0
        write(transport, connect(source, stuck), [1], [1])
        assert stuck.ask("count 7") == PIECE


def test_a_peer_killed_in_mid_transfer_over_tcp_breaks_the_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")
    everything = np.arange(PIECES, dtype=np.int32)
    with NixlTransport("source") as transport, TargetProcess("nixl", "target", PIECE * PIECES) as target:
        source = PlaneRank(transport, PIECE * PIECES, fill=2)
        prepared = connect(source, target)
        write(transport, prepared, [0], [0])
        target.stop()
        pending = transport.post(prepared, everything, everything)
        target.kill()
        assert settled(transport, pending) is WriteState.BROKEN
        with pytest.raises(TransportError, match="gone"):
            transport.post(prepared, everything, everything)
        transport.fence("target")


def test_the_evidence_is_what_ucx_logged(source: PlaneRank) -> None:
    with TargetProcess("nixl", "target", PIECE * PIECES) as target:
        prepared = connect(source, target)
        assert source.transport.evidence("target") == ""
        write(source.transport, prepared, [0], [0])
        assert source.transport.evidence("target").startswith("UCX: ")
        assert source.transport.evidence("target") != "UCX: "


def test_the_evidence_is_kept_of_a_peer_that_had_several_writes_before_the_first_was_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with NixlTransport("source") as transport, TargetProcess("nixl", "near", PIECE * PIECES) as near:
        source = PlaneRank(transport, PIECE * PIECES, fill=2)
        write(transport, connect(source, near), [0], [0])
        monkeypatch.setenv("UCX_TLS", "tcp")  # so that the log has two ways, and whose is whose matters
        with TargetProcess("nixl", "target", PIECE * PIECES) as target:
            prepared = connect(source, target)
            pending = [transport.post(prepared, indices(number), indices(number)) for number in range(3)]
            for handle in pending:
                assert settled(transport, handle) is WriteState.DONE
            assert transport.evidence("target").startswith("UCX: ")


def test_the_evidence_differs_with_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")
    with NixlTransport("source") as transport, TargetProcess("nixl", "target", PIECE * PIECES) as target:
        source = PlaneRank(transport, PIECE * PIECES, fill=2)
        write(transport, connect(source, target), [0], [0])
        assert "tcp/" in transport.evidence("target")


def test_a_user_who_reads_ucx_logs_keeps_them() -> None:
    script = (
        "import os; from kvbaton.transports.nixl import NixlTransport\n"
        "with NixlTransport('source') as t: print(os.environ['UCX_LOG_LEVEL'], 'UCX_LOG_FILE' in os.environ)"
    )
    environment = {**os.environ, "UCX_LOG_LEVEL": "info"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert "info False" in run.stdout
    assert "UCX  INFO" in run.stdout


def test_the_process_is_left_as_it_was() -> None:
    script = (
        "import kvbaton.transports.nixl, logging, os, sys\n"
        "assert not [name for name in sys.modules if name.startswith('nixl')], 'importing the module must be cheap'\n"
        "with kvbaton.transports.nixl.NixlTransport('source') as t: t.metadata()\n"
        "assert not [name for name in os.environ if name.startswith('UCX_')], os.environ\n"
        "assert logging.raiseExceptions"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("UCX_")}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout == "", "stdout belongs to data"


def test_the_agent_needs_a_name() -> None:
    with pytest.raises(ConfigError):
        NixlTransport("")


def test_two_peers_cannot_share_an_agent(source: PlaneRank) -> None:
    with NixlTransport("target") as target:
        metadata = target.metadata()
        source.transport.connect("target", metadata)
        with pytest.raises(TransportError, match="agent name"):
            source.transport.connect("another", metadata)


def test_registering_is_all_or_nothing(source: PlaneRank) -> None:
    memory = np.zeros(4096, dtype=np.uint8)
    here = Region(memory.ctypes.data, 4096)
    with pytest.raises(TransportError):
        source.transport.register([here, Region(memory.ctypes.data, 4096, "VRAM")])
    assert repr(source.transport) == "<NixlTransport source peers=0 writes=0>"
    source.transport.connect("source", source.transport.metadata())
    with pytest.raises(TransportError):
        source.transport.prepare("source", table(here.address, (0, 64, 64, 1)), table(here.address, (0, 64, 64, 1)))


def test_released_while_pending_is_reaped_when_it_settles(source: PlaneRank) -> None:
    with NixlTransport("target") as transport:
        target = PlaneRank(transport, PIECE * PIECES, fill=0)
        source.transport.connect("target", transport.metadata())
        pieces = (0, PIECE, PIECE, PIECES)
        prepared = source.transport.prepare("target", source.table(pieces), target.table(pieces))
        handle = source.transport.post(prepared, indices(3), indices(3))
        assert source.transport.poll(handle) is WriteState.PENDING, "connecting needs the target"
        source.transport.release(handle)
        assert settled(source.transport, handle, transport) is WriteState.DONE
        source.transport.progress()
        assert source.transport.poll(handle) is WriteState.BROKEN
        assert (target.memory[3 * PIECE : 4 * PIECE] == 2).all()


def test_a_fence_that_finds_no_new_agent_holds_and_one_is_started_when_it_is_needed(
    source: PlaneRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host out of file descriptors: the old agent is gone, which is what a fence is for; the memory is not lost."""
    transport = source.transport
    assert isinstance(transport, NixlTransport)
    backend_error = transport._nixl.api.nixlBind.nixlBackendError

    def fail(*_: object) -> None:
        raise backend_error("too many open files")

    with TargetProcess("nixl", "target", PIECE * PIECES) as target, TargetProcess("nixl", "other", PIECE) as other:
        prepared = connect(source, target)
        transport.connect("other", other.metadata)
        spared = transport.prepare("other", source.table((0, PIECE, PIECE, 1)), table(other.address, (0, PIECE, 0, 1)))
        with monkeypatch.context() as patch:
            patch.setattr(transport._agent, "transfer", fail)
            with pytest.raises(TransportError):
                transport.post(prepared, indices(1), indices(1))
            patch.setattr(transport._nixl.api, "nixl_agent", fail)
            transport.fence("target")
            assert transport._agent is None
            transport.progress()
            with pytest.raises(TransportError, match="starting a nixl agent"):
                transport.post(spared, indices(0), indices(0))
            with pytest.raises(TransportError, match="starting a nixl agent"):
                transport.connect("target", target.metadata)
            transport.fence("other")
            transport.fence("other")
        write(transport, connect(source, target), [2], [2])
        transport.connect("other", other.metadata)
        spared = transport.prepare("other", source.table((0, PIECE, PIECE, 1)), table(other.address, (0, PIECE, 0, 1)))
        write(transport, spared, [0], [0])
        assert target.ask("count 2") == PIECE
        assert other.ask("count 2") == PIECE
    transport.close()
    with pytest.raises(TransportError, match="closed"):
        transport.progress()


def test_a_post_that_fails_is_unsettled_until_the_fence_has_replaced_the_agent(
    source: PlaneRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever part of it is on its way, only the end of the agent stops it."""
    transport = source.transport
    assert isinstance(transport, NixlTransport)
    backend_error = transport._nixl.api.nixlBind.nixlBackendError
    with TargetProcess("nixl", "target", PIECE * PIECES) as target, TargetProcess("nixl", "other", PIECE) as other:
        prepared = connect(source, target)
        transport.connect("other", other.metadata)
        spared = transport.prepare("other", source.table((0, PIECE, PIECE, 1)), table(other.address, (0, PIECE, 0, 1)))
        write(transport, prepared, [0], [0])
        agent = transport._agent

        def fail(*_: object) -> None:
            raise backend_error("half of it is posted")

        with monkeypatch.context() as patch:
            patch.setattr(agent, "transfer", fail)
            with pytest.raises(TransportError, match="nixlBackendError"):
                transport.post(prepared, indices(1), indices(1))
        transport.fence("target")
        assert transport._agent is not agent
        write(transport, spared, [0], [0])
        write(transport, connect(source, target), [2], [2])
        assert target.ask("count 2") == 2 * PIECE
        assert other.ask("count 2") == PIECE

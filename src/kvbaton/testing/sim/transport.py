"""A simulated data plane: writes whose bytes are read and land late, out of order, in part or never.

It keeps the contract of :class:`kvbaton.transports.base.Transport` at its edges: source memory is read until a write
is DONE or its peer is fenced; a broken write goes on landing until then; bytes that had left local memory when a peer
was fenced or a writer died still land, on planes where the target must help (``must_progress``).

It is also where most violations are seen: every byte that is read or lands is checked against who owns the unit.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from kvbaton.errors import DisconnectedError, TransportError
from kvbaton.layout import Region
from kvbaton.plan.runs import merge
from kvbaton.plan.table import Table
from kvbaton.testing.sim.fabric import Fabric, Host, Run, Write, runs_between
from kvbaton.testing.sim.scenario import WriteFault
from kvbaton.transports.base import Capabilities, Handle, TableId, Transport, WriteState, check_entries

LATENCY_SECONDS = (0.0001, 0.003)
#: Bytes that have left a writer when it is cut off land at most this much later.
FLIGHT_SECONDS = 0.1


@dataclass(slots=True)
class _Peer:
    host: Host
    generation: int
    tables: dict[TableId, tuple[Table, Table]] = field(default_factory=dict)


class SimTransport(Transport):
    """The data plane of one process."""

    def __init__(self, fabric: Fabric, host: Host, *, must_progress: bool, fence_breaks_others: bool) -> None:
        self.host = host
        self.closed = False
        self._fabric = fabric
        self._clockwork = fabric.clockwork
        self._must_progress = must_progress
        self._fence_breaks_others = fence_breaks_others
        self._random = fabric.clockwork.stream(f"wire {host.name}")
        self._peers: dict[str, _Peer] = {}
        self._writes: dict[Handle, Write] = {}
        self._ids = itertools.count(1)
        self._landing: list[tuple[Write, Run]] = []
        self._generation = 0
        fabric.transports[host.instance] = self

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(name="sim", target_must_progress=self._must_progress, post_copies=False)

    def register(self, regions: Sequence[Region]) -> None:
        if self.closed or not regions:
            raise self._clockwork.violated("after close", f"{self.host.name} registers memory")

    @property
    def generation(self) -> int:
        return self._generation

    def metadata(self) -> bytes:
        return f"{self.host.instance}#{self._generation}".encode()

    def connect(self, peer: str, metadata: bytes) -> None:
        number = self._clockwork.happened("prepare")
        instance, _, generation = metadata.decode().rpartition("#")
        there = self._fabric.transports.get(instance)
        if number in self._fabric.prepare_faults:
            self._clockwork.fault("peer unreachable", self.host.name, peer)
            raise TransportError("the simulated fabric refuses", peer=peer)
        if there is None or not there.host.alive or there.closed:
            raise DisconnectedError("the peer is gone", peer=peer)
        self._peers[peer] = _Peer(there.host, int(generation))

    def prepare(self, peer: str, source: Table, target: Table) -> TableId:
        table = TableId(next(self._ids))
        self._peers[peer].tables[table] = (source, target)
        return table

    # ---- writes -------------------------------------------------------------------------------------------------

    def post(self, table: TableId, source_entries: NDArray[np.int32], target_entries: NDArray[np.int32]) -> Handle:
        if self.closed:
            raise self._clockwork.violated("after close", f"{self.host.name} posts a write")
        name, peer = next((n, p) for n, p in self._peers.items() if table in p.tables)
        source, target = peer.tables[table]
        check_entries(source, target, source_entries, target_entries)
        merged = merge(source, source_entries, target, target_entries)
        triples = zip(merged.source.tolist(), merged.target.tolist(), merged.length.tolist(), strict=True)
        runs = [run for triple in triples for run in runs_between(self.host, peer.host, *triple)]
        write = Write(Handle(next(self._ids)), self, name, peer.host, runs)
        number = self._clockwork.happened("post")
        if peer.host.alive:
            for run in runs:
                self._fabric.inspector.posted(self.host, peer.host, run)
        write.fault = next((f for f in self._fabric.write_faults if f.nth <= number < f.nth + f.count), None)
        self._clockwork.tell(self.host.name, f"posts write {number} to {peer.host.name} of {merged.bytes} B")
        return self._launch(
            write, number, stale=peer.generation != self._fabric.transports[peer.host.instance].generation
        )

    @property
    def _reachable(self) -> bool:
        """Whether bytes still land here: a plane that helps nobody any more takes none."""
        return self.host.alive and not (self.closed and self._must_progress)

    def _launch(self, write: Write, number: int, *, stale: bool) -> Handle:
        kind, seconds = (write.fault.kind, write.fault.seconds) if write.fault else ("", 0.0)
        if kind:
            self._clockwork.fault(f"write {kind}", self.host.name, f"write {number}")
        if kind in ("raises", "breaks", "never_settles"):
            write.flying.clear()
        if stale or not write.target.alive:
            write.flying.clear()
        for run in list(write.flying):
            self._schedule(write, run, kind, seconds)
        if write.flying:
            self._fabric.flying.setdefault(write.target.instance, {})[write] = None
        if kind.startswith("raises"):
            raise DisconnectedError("the simulated fabric broke while posting", peer=write.peer)
        self._writes[write.handle] = write
        if kind.startswith("breaks"):
            self._later(self._random.uniform(*LATENCY_SECONDS), write, WriteState.BROKEN)
        elif not write.flying and not kind:
            self._later(0.5, write, WriteState.BROKEN)  # the peer is dead, or its agent was replaced
        return write.handle

    def _schedule(self, write: Write, run: Run, kind: str, seconds: float) -> None:
        delay = self._random.uniform(*LATENCY_SECONDS)
        if kind in ("late", "raises_and_lands", "breaks_and_lands"):
            delay += seconds
        elif kind == "scatter":
            delay += seconds * self._random.random()
        self._clockwork.after(delay, lambda: self._fly(write, run))

    def _later(self, seconds: float, write: Write, state: WriteState) -> None:
        def settle() -> None:
            if write.handle in self._writes and not self.closed:
                write.state = state
                self.host.stir()

        self._clockwork.after(seconds, settle)

    def _fly(self, write: Write, run: Run) -> None:
        """The bytes of a run leave: now they are read; they land at once, or when the target helps."""
        if run not in write.flying or write.stopped:
            return
        there = self._fabric.transports[write.target.instance]
        if not there._reachable:
            self._landed(write, run)
            return
        self._capture(write, run)
        if there._must_progress:
            there._landing.append((write, run))
            write.target.stir()
        else:
            self._land(write, run)

    def _capture(self, write: Write, run: Run) -> None:
        for unit, owner in run.source_owners:
            if self.host.owner_of(unit, reading=True) != owner:
                self._fabric.inspector.read_late(write, unit, owner)
        run.captured = self.host.memory.bytes[run.source : run.source + run.length].copy()

    def _land(self, write: Write, run: Run) -> None:
        memory = write.target.memory
        for unit, owner in run.target_owners:
            if write.target.owner_of(unit, reading=False) != owner:
                self._fabric.inspector.trespassed(write, unit, owner)
        assert run.captured is not None  # noqa: S101 - our own invariant
        memory.bytes[run.target : run.target + run.length] = run.captured
        self._landed(write, run)

    def _landed(self, write: Write, run: Run) -> None:
        write.flying.remove(run)
        if write.flying:
            return
        self._fabric.flying.get(write.target.instance, {}).pop(write, None)
        kind = write.fault.kind if write.fault else ""
        if write.stopped or kind in ("lands_never_settles", "breaks_and_lands"):
            return
        there = self._fabric.transports[write.target.instance]
        done = WriteState.DONE if there._reachable else WriteState.BROKEN
        self._later(self._random.uniform(0.00005, 0.0005), write, done)

    def poll(self, handle: Handle) -> WriteState:
        write = self._writes.get(handle)
        return write.state if write is not None else WriteState.BROKEN

    def release(self, handle: Handle) -> None:
        self._writes.pop(handle, None)

    def fence(self, peer: str) -> None:
        self._peers.pop(peer, None)
        pending = False
        for write in [w for writes in list(self._fabric.flying.values()) for w in list(writes) if w.writer is self]:
            if write.peer == peer:
                pending = True
                self._stop(write)
        for handle, write in list(self._writes.items()):
            if write.peer == peer:
                del self._writes[handle]
            elif pending and self._fence_breaks_others and write.state is WriteState.PENDING:
                self._clockwork.fault("write broken by another peer's fence", self.host.name)
                write.fault = write.fault or WriteFault(kind="breaks_and_lands")
                write.state = WriteState.BROKEN
        if pending and self._fence_breaks_others:
            self._replace_agent()
        self._clockwork.tell(self.host.name, f"fences {peer}")

    def _replace_agent(self) -> None:
        """What peers know of us holds no more. Their writes under way break, and may land all the same."""
        self._generation += 1
        self._clockwork.fault("agent replaced", self.host.name)
        for write in self._fabric.towards(self.host.instance):
            if write.state is WriteState.PENDING and not write.stopped:
                write.fault = write.fault or WriteFault(kind="breaks_and_lands")
                write.state = WriteState.BROKEN
                write.writer.host.stir()

    def _stop(self, write: Write) -> None:
        """Cut a write off: nothing reads our memory any more; what has left it may still be on its way."""
        write.stopped = True
        there = self._fabric.transports[write.target.instance]
        for run in list(write.flying):
            if run.captured is not None:
                continue  # it waits at the target
            if there._must_progress and there._reachable and self._random.random() < 0.5:
                self._capture(write, run)
                self._clockwork.faults["bytes in flight at a fence"] += 1
                self._clockwork.after(
                    self._random.uniform(0, FLIGHT_SECONDS), partial(self._arrive_late, there, write, run)
                )
            else:
                write.flying.remove(run)
        if not write.flying:
            self._fabric.flying.get(write.target.instance, {}).pop(write, None)

    def _arrive_late(self, there: SimTransport, write: Write, run: Run) -> None:
        if not there._reachable:
            if run in write.flying:
                self._landed(write, run)
            return
        there._landing.append((write, run))
        there.host.stir()

    def progress(self) -> None:
        landing, self._landing = self._landing, []
        for write, run in landing:
            if run in write.flying:
                write.writer._land(write, run)

    def evidence(self, peer: str) -> str:
        return f"simulated, to {peer}"

    def die(self) -> None:
        """The process ends: its writes end with it, what has left it may still be on its way."""
        self.closed = True
        self._stop_own()
        self._lose_incoming()

    def _stop_own(self) -> None:
        for writes in list(self._fabric.flying.values()):
            for write in list(writes):
                if write.writer is self:
                    self._stop(write)

    def _lose_incoming(self) -> None:
        for write in self._fabric.towards(self.host.instance):
            for run in list(write.flying):
                write.writer._landed(write, run)

    def close(self) -> None:
        """Our writes end; those of peers go on landing, but where the target must help."""
        if self.closed:
            return
        self.closed = True
        self._stop_own()
        if self._must_progress:
            self._lose_incoming()

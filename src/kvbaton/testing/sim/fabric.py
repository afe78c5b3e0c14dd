"""What simulated data planes share: the hosts by instance, every write that may touch memory, and their faults."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from kvbaton.testing.sim.clockwork import Clockwork
from kvbaton.testing.sim.memory import Bytes, RankMemory
from kvbaton.testing.sim.scenario import PrepareFault, WriteFault
from kvbaton.transports.base import Handle, WriteState

if TYPE_CHECKING:
    from kvbaton.testing.sim.transport import SimTransport

#: A unit, and who owns it.
Owned = tuple[int, object]


@dataclass(eq=False, slots=True)
class Run:
    """One contiguous piece of a write; offsets in the buffers of both ranks, and who owned the units when posted."""

    source: int
    target: int
    length: int
    source_owners: tuple[Owned, ...]
    target_owners: tuple[Owned, ...]
    captured: Bytes | None = None


@dataclass(eq=False, slots=True)
class Write:
    """One posted write. ``flying``: runs that have not landed; while there are any, memory may be touched."""

    handle: Handle
    writer: SimTransport
    peer: str
    target: Host
    flying: list[Run]
    state: WriteState = WriteState.PENDING
    stopped: bool = False
    fault: WriteFault | None = None


class Host(Protocol):
    """The process whose memory a write reads or touches, as the data plane sees it."""

    name: str
    instance: str
    memory: RankMemory

    @property
    def alive(self) -> bool: ...
    def stir(self) -> None: ...
    def owner_of(self, unit: int, *, reading: bool) -> object | None: ...
    def in_two_roles(self, unit: int) -> bool: ...


class Inspector(Protocol):
    """Who judges what writes do."""

    def posted(self, source: Host, target: Host, run: Run) -> None: ...
    def read_late(self, write: Write, unit: int, owner: object) -> None: ...
    def trespassed(self, write: Write, unit: int, owner: object) -> None: ...


def runs_between(source: Host, target: Host, source_at: int, target_at: int, length: int) -> Iterator[Run]:
    """A piece, or one for each pair of owners: what several rooms write in one post may lie side by side."""
    ours, theirs = source.memory, target.memory
    here, there = ours.at(source_at), theirs.at(target_at)
    ends = ours.unit_of[here : here + length], theirs.unit_of[there : there + length]
    changes = np.flatnonzero((ends[0][1:] != ends[0][:-1]) | (ends[1][1:] != ends[1][:-1])) + 1
    bounds = [0, *changes.tolist(), length]
    pieces = [
        (_owned(source, ends[0][at], reading=True), _owned(target, ends[1][at], reading=False), at, stop)
        for at, stop in itertools.pairwise(bounds)
    ]
    for _, group in itertools.groupby(pieces, key=lambda piece: (id(piece[0][1]), id(piece[1][1]))):
        reads, writes, starts, stops = zip(*group, strict=True)
        at, size = starts[0], stops[-1] - starts[0]
        yield Run(here + at, there + at, size, tuple(dict.fromkeys(reads)), tuple(dict.fromkeys(writes)))


def _owned(host: Host, unit: int, *, reading: bool) -> Owned:
    return int(unit), host.owner_of(int(unit), reading=reading)


class Fabric:
    """What connects the transports of a run."""

    def __init__(self, clockwork: Clockwork, inspector: Inspector) -> None:
        self.clockwork = clockwork
        self.inspector = inspector
        self.transports: dict[str, SimTransport] = {}
        self.flying: dict[str, dict[Write, None]] = {}
        self.write_faults: list[WriteFault] = []
        self.prepare_faults: set[int] = set()

    def add_write_fault(self, fault: WriteFault) -> None:
        self.write_faults.append(fault)

    def add_prepare_fault(self, fault: PrepareFault) -> None:
        self.prepare_faults.add(fault.nth)

    def end_faults(self) -> None:
        """Nothing happens to writes any more."""
        self.write_faults.clear()
        self.prepare_faults.clear()

    def towards(self, instance: str) -> list[Write]:
        """Writes that may still touch the memory of an instance."""
        return list(self.flying.get(instance, ()))

    def reading(self, instance: str) -> list[Write]:
        """Writes that may still read the memory of an instance."""
        return [write for writes in self.flying.values() for write in writes if write.writer.host.instance == instance]

    @property
    def busy(self) -> bool:
        return any(self.flying.values())

"""The faults and the phases of the matrix, as data. What they do to processes is a cell's business."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace


class Phase(enum.Enum):
    """Where a transfer is when the fault strikes, and how the cell knows.

    Four are held: the proxy in front of prefill's control port stops at the message, so that neither side goes on.
    Two are watched: prefill's story of the room is polled, and by the time of the fault it may be a chunk further.
    """

    HANDSHAKE = "handshake"  #: held at the Hello of a decode process that prefill has never heard of
    OPEN = "open"  #: held at Open
    FIRST = "first chunk"  #: watched: one chunk is submitted
    MIDDLE = "middle"  #: watched: half of the prompt is submitted
    DELIVERED = "last settled"  #: held at Done: every write has settled, decode does not know it
    CLOSING = "closing"  #: held at Close: decode has everything, prefill does not know it


class Fault(enum.Enum):
    """What happens. Values are what ``--faults`` takes."""

    KILL = "kill"  #: SIGKILL; a successor is started once the client has its outcome
    RESTART = "restart"  #: SIGKILL, and a successor on the same ports at once
    TERM = "term"  #: SIGTERM; it must drain and end with 0
    STOP = "stop"  #: SIGSTOP for 10 s
    HANG = "hang"  #: SIGSTOP for ever; in the end SIGKILL and a successor
    PARTITION = "partition"  #: the control link passes nothing for 5 s, connections stay
    CUT = "cut"  #: the control link is reset, what it held is lost, it comes back at once
    MUTE = "mute"  #: a peer (or registry) that accepts connections and never speaks
    REGISTRY = "registry"  #: the registry refuses connections for 3 s
    FILES = "files"  #: the victim can open no further file or socket for 5 s
    DISK = "disk"  #: the victim logs to a full disk while its peer is killed


class Victim(enum.Enum):
    PREFILL = "prefill"
    DECODE = "decode"
    LINK = "link"
    REGISTRY = "registry"


STOP_SECONDS = 10.0
PARTITION_SECONDS = 5.0
REGISTRY_SECONDS = 3.0
FILES_SECONDS = 5.0

PROCESSES = (Victim.PREFILL, Victim.DECODE)
_VICTIMS: dict[Fault, tuple[Victim, ...]] = {
    Fault.PARTITION: (Victim.LINK,),
    Fault.CUT: (Victim.LINK,),
    Fault.MUTE: (Victim.LINK, Victim.REGISTRY),
    Fault.REGISTRY: (Victim.REGISTRY,),
}


@dataclass(frozen=True, slots=True)
class Spec:
    """One cell. ``network``: how bytes travel, ``shm`` (shared memory) or ``tcp``. ``workers``: of each role; where
    there are two, no client may notice."""

    fault: Fault
    victim: Victim
    phase: Phase
    network: str = "shm"
    workers: int = 1

    def __str__(self) -> str:
        tcp = " over tcp" if self.network == "tcp" else ""
        beside = ", with a second worker" if self.workers > 1 else ""
        return f"{self.fault.value} {self.victim.value} at {self.phase.value}{tcp}{beside}"


def matrix() -> list[Spec]:
    """All cells, those of one scene together: without and with a second worker of each role. Over TCP: the faults that
    meet writes in flight."""
    cells = [replace(spec, workers=workers) for workers in (1, 2) for spec in _cells(tuple(Fault))]
    return sorted(cells, key=lambda spec: (spec.workers, spec.network))


def _cells(faults: tuple[Fault, ...]) -> list[Spec]:
    specs = []
    for fault in faults:
        for victim in _VICTIMS.get(fault, PROCESSES):
            phases = (Phase.HANDSHAKE,) if fault is Fault.MUTE else tuple(Phase)
            specs += [Spec(fault, victim, phase) for phase in phases]
    over_tcp = [fault for fault in faults if fault in (Fault.KILL, Fault.HANG)]
    specs += [Spec(fault, victim, phase, "tcp") for fault in over_tcp for victim in PROCESSES for phase in Phase]
    return specs


def quick() -> list[Spec]:
    """A fixed handful that fits into a test run."""
    return [
        Spec(Fault.KILL, Victim.PREFILL, Phase.DELIVERED),
        Spec(Fault.CUT, Victim.LINK, Phase.CLOSING),
        Spec(Fault.RESTART, Victim.DECODE, Phase.MIDDLE, workers=2),
    ]

"""What every data plane offers: registered memory, prepared tables, posted writes.

Rules:
- One thread owns a transport and makes every call. There are no callbacks: ``post`` then ``poll``.
- A write is named by two index arrays into a *table*: entry ``i`` of the source side is written to entry
  ``j`` of the target side. Tables are built once per peer, so that a post costs little Python.
- A handle that is not :data:`DONE` may still touch memory on both sides. Releasing is not cancelling.
- Foreign exceptions never leave a transport: they become :class:`~kvbaton.errors.TransportError` or
  :class:`~kvbaton.errors.DisconnectedError`. A ``post`` that raises may have put writes on the wire.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NewType

import numpy as np
from numpy.typing import NDArray

from kvbaton.errors import TransportError
from kvbaton.layout import Region
from kvbaton.plan.table import Table

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

__all__ = [
    "MAX_ENTRIES",
    "Capabilities",
    "Handle",
    "Table",
    "TableId",
    "Transport",
    "WriteState",
    "check_entries",
    "check_table",
]

Handle = NewType("Handle", int)
"""One posted write; minted by the transport, never reused while the transport lives."""

TableId = NewType("TableId", int)
"""One prepared pair of tables; minted by the transport."""

#: Most entries a table may have: entries are int32.
MAX_ENTRIES = (1 << 31) - 1
_MAX_ADDRESS = (1 << 63) - 1


class WriteState(enum.Enum):
    """What is known about a posted write."""

    PENDING = "pending"  #: may still touch memory
    DONE = "done"  #: all bytes are in the target's memory and nothing will touch either side
    BROKEN = "broken"  #: failed; part may have landed and more may land until the peer is fenced


def check_table(table: Table) -> None:
    """Raise TransportError where the rows are no table: shape, type, sign, overlap of blocks, overflow."""
    rows = table.rows
    if rows.dtype != np.int64 or rows.ndim != 2 or rows.shape[1] != 5 or not len(rows):
        raise TransportError(f"a table is an int64 array of shape [n, 5], not {rows.dtype} {list(rows.shape)}")
    address, length, _, stride, count = rows.T
    if (rows < 0).any() or (length < 1).any() or (count < 1).any() or ((count > 1) & (stride < length)).any():
        raise TransportError("a row of a table is negative or empty, or its blocks overlap")
    if (count > MAX_ENTRIES).any() or count.sum() > MAX_ENTRIES:
        raise TransportError(f"a table has more than {MAX_ENTRIES} entries")
    if (length > _MAX_ADDRESS - address).any() or (stride > (_MAX_ADDRESS - address - length) // count).any():
        raise TransportError("a row of a table leaves the address space")


def check_entries(
    source: Table, target: Table, source_entries: NDArray[np.int32], target_entries: NDArray[np.int32]
) -> None:
    """Raise TransportError unless the two index arrays name a write between the two tables."""
    for table, entries in ((source, source_entries), (target, target_entries)):
        if entries.dtype != np.int32 or entries.ndim != 1 or not len(entries):
            raise TransportError(f"entries are a non-empty int32 vector, not {entries.dtype} {list(entries.shape)}")
        if entries.view(np.uint32).max() >= table.entries:  # what is negative is large then
            raise TransportError(f"entries {entries.min()}..{entries.max()} leave a table of {table.entries}")
    if len(source_entries) != len(target_entries):
        raise TransportError(f"{len(source_entries)} source entries cannot fill {len(target_entries)} target entries")


@dataclass(frozen=True, kw_only=True, slots=True)
class Capabilities:
    """What the runtime has to know about a data plane.

    Args:
        name: the name of ``--disaggregation-transfer-backend``.
        target_must_progress: writes only land while the target calls :meth:`Transport.progress`.
        post_copies: ``post`` copies the bytes itself and returns when it is done (shared memory).
    """

    name: str
    target_must_progress: bool
    post_copies: bool


class Transport(ABC):
    """A data plane. Idempotent: ``close``, ``fence``, ``release``. Not thread safe: one owner."""

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities: ...

    @property
    def generation(self) -> int:
        """Grows whenever :meth:`metadata` has changed by itself: peers that know the metadata of before cannot write
        here any more."""
        return 0

    @abstractmethod
    def register(self, regions: Sequence[Region]) -> None:
        """Make local memory reachable. Raises TransportError; nothing stays registered then."""

    def deregister(self) -> None:
        """Let go of all local memory, which may then be given back to its device, until :meth:`register` is called
        again. Nothing may be in flight, from here or towards here: the caller knows. Peers and tables are kept; until
        then ``prepare`` and ``post`` raise TransportError.

        Raises TransportError where a data plane cannot do that.
        """
        raise TransportError(
            f"the data plane {self.capabilities.name!r} cannot let go of memory that it has registered"
        )

    @abstractmethod
    def metadata(self) -> bytes:
        """What a peer needs for :meth:`connect`; changes after :meth:`register`, and may after :meth:`fence`."""

    @abstractmethod
    def connect(self, peer: str, metadata: bytes) -> None:
        """Learn how to reach ``peer`` (an instance id). Connecting again replaces what was known.

        Raises TransportError when the metadata is not usable.
        """

    @abstractmethod
    def prepare(self, peer: str, source: Table, target: Table) -> TableId:
        """Build the tables for writes from here to ``peer``. They live until the peer is fenced.

        Raises TransportError when memory on either side is not registered.
        """

    @abstractmethod
    def post(self, table: TableId, source_entries: NDArray[np.int32], target_entries: NDArray[np.int32]) -> Handle:
        """Start writing ``source_entries[i]`` to ``target_entries[i]`` for all i (equal lengths, not empty).

        Raises TransportError or DisconnectedError; bytes may be on the wire then, until the peer is fenced.
        """

    @abstractmethod
    def poll(self, handle: Handle) -> WriteState:
        """State of a posted write; drives progress. Unknown handles are BROKEN."""

    @abstractmethod
    def release(self, handle: Handle) -> None:
        """Forget a handle that is DONE or BROKEN. Releasing a pending handle does not stop it."""

    @abstractmethod
    def fence(self, peer: str) -> None:
        """Cut ``peer`` off: tables and handles towards it are gone, and when this returns nothing posted to it
        from here reads local memory any more. ``connect`` makes it reachable again.

        Bytes that had left local memory (socket buffers, a wire) may still land at the peer. Where writes were
        still pending this can take a second, and writes to *other* peers that do not settle meanwhile become
        BROKEN; their tables stay valid."""

    @abstractmethod
    def progress(self) -> None:
        """Move whatever needs moving (incoming writes on transports where the target must help)."""

    @abstractmethod
    def evidence(self, peer: str) -> str:
        """How bytes really travel to ``peer``, as observed, for people: ``"UCX: cma/memory"``. Empty if unknown."""

    def sizes(self) -> dict[str, int]:
        """Entries of each table, by name, for people who look for leaks. Empty where a transport keeps none."""
        return {}

    @abstractmethod
    def close(self) -> None:
        """Release everything. Idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

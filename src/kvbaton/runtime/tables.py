"""Prepared tables: what the transport was told of a peer's memory, so that a write is a table and entries of it.

All parts of equal memory share one pair of tables, as far as their entries can be numbered, so that small writes of
different parts can go in one post. A part that may be staged has a table of its own, from our staging memory to theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvbaton.errors import DisconnectedError
from kvbaton.plan.pair import MAX_ENTRIES, PartPlan
from kvbaton.plan.table import join
from kvbaton.protocol.effects import PostWrite, PreparePeer
from kvbaton.protocol.messages import MAX_GRANTS
from kvbaton.transports.base import TableId, Transport

Entries = NDArray[np.int32]

#: A table of more entries is prepared by itself: those of joined tables are numbered with 32 bits.
LARGE_TABLE = MAX_ENTRIES // MAX_GRANTS


@dataclass(frozen=True, slots=True)
class _Direct:
    """Where a part's entries are in a table that is prepared for all parts of equal memory."""

    table: TableId
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class _Tables:
    """Those towards one peer, by part: for direct writes, and for those through staging memory."""

    direct: tuple[_Direct, ...]
    staged: tuple[TableId | None, ...]


class PeerTables:
    """See the module. Those of every peer whose memory is reachable."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._tables: dict[str, _Tables] = {}

    def __len__(self) -> int:
        return len(self._tables)

    def prepare(self, effect: PreparePeer) -> None:
        """Those of a peer that is connected, in place of what was known of it. Raises TransportError."""
        self._tables[effect.peer] = _Tables(
            self._prepare_direct(effect.peer, effect.pair.parts),
            tuple(
                self._transport.prepare(effect.peer, staged.source, staged.target) if staged is not None else None
                for staged in effect.staged
            ),
        )

    def _prepare_direct(self, peer: str, parts: Sequence[PartPlan]) -> tuple[_Direct, ...]:
        groups: dict[tuple[str, str, int], list[int]] = {}
        for number, part in enumerate(parts):
            source, target = part.source.table, part.target.table
            overflow = number if max(source.entries, target.entries) > LARGE_TABLE else -1
            groups.setdefault((source.memory, target.memory, overflow), []).append(number)
        placed: dict[int, _Direct] = {}
        for members in groups.values():
            sources = [parts[number].source.table for number in members]
            targets = [parts[number].target.table for number in members]
            table = self._transport.prepare(peer, join(sources), join(targets))
            source_at = target_at = 0
            for number, source, target in zip(members, sources, targets, strict=True):
                placed[number] = _Direct(table, source_at, target_at)
                source_at, target_at = source_at + source.entries, target_at + target.entries
        return tuple(placed[number] for number in range(len(parts)))

    def drop(self, peer: str) -> None:
        """Forget those of a peer that was fenced."""
        self._tables.pop(peer, None)

    def direct(self, write: PostWrite) -> TableId:
        """The table of a write that goes straight to its pages. Raises DisconnectedError."""
        return self._place(write).table

    def staged(self, write: PostWrite) -> TableId:
        """The table of a write through staging memory. Raises DisconnectedError."""
        tables = self._tables.get(write.peer)
        table = tables.staged[write.part] if tables is not None else None
        if table is None:
            raise DisconnectedError("the peer's staging memory is not reachable", peer=write.peer)
        return table

    def entries(self, writes: Sequence[PostWrite]) -> tuple[Entries, Entries]:
        """Those of direct writes to one peer, source and target, in the table that the writes share."""
        places = [self._place(write) for write in writes]
        source = [write.source_entries + np.int32(at.source) for write, at in zip(writes, places, strict=True)]
        target = [write.target_entries + np.int32(at.target) for write, at in zip(writes, places, strict=True)]
        return (source[0], target[0]) if len(writes) == 1 else (np.concatenate(source), np.concatenate(target))

    def _place(self, write: PostWrite) -> _Direct:
        tables = self._tables.get(write.peer)
        if tables is None:
            raise DisconnectedError("the peer's memory is not reachable", peer=write.peer)
        return tables.direct[write.part]

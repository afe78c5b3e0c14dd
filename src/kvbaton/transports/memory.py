"""Reference data plane for processes of one host: the kernel copies from our address space into the peer's.

Rules:
- A write is finished when ``post`` returns; the target need not do anything.
- Every entry is checked against the registered regions of its side when tables are prepared, never later.
- A peer is recognised by a random word in its memory, read before and after each write: it is gone when the
  process died, was replaced, or closed its transport. Between the two reads a peer may still go.
- Linux only (``process_vm_writev``). With Yama or in containers the kernel may refuse (EPERM).

This file must not know NIXL, links or the protocol.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from kvbaton.errors import DisconnectedError, TransportError
from kvbaton.layout import Region
from kvbaton.transports.address_space import (
    NONCE_BYTES,
    OPEN_HERE,
    AddressSpace,
    OtherProcess,
    SameProcess,
    Vector,
    coalesce,
)
from kvbaton.transports.base import (
    Capabilities,
    Handle,
    Table,
    TableId,
    Transport,
    WriteState,
    check_entries,
    check_table,
)

#: Largest metadata accepted from a peer, in bytes.
MAX_METADATA_BYTES = 4 << 20


class _Metadata(Struct, frozen=True, array_like=True):
    """Where a process is and which of its memory may be written. ``cell`` is the address of ``nonce``."""

    host: str
    pid: int
    started: int
    cell: int
    nonce: bytes
    regions: tuple[Region, ...]


def _host() -> str:
    """Names this boot of this kernel and our pid namespace: the space in which a pid means something."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}"


def _started(pid: int) -> int:
    """Clock tick at which a process started (0 if there is none): tells two users of one pid apart."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return 0
    return int(stat[stat.rindex(b")") + 1 :].split()[19])


@dataclass(frozen=True, slots=True)
class _Peer:
    place: AddressSpace
    regions: tuple[Region, ...]


@dataclass(frozen=True, slots=True)
class _Prepared:
    peer: str
    source: Table
    target: Table


def _check_covered(table: Table, regions: Sequence[Region], whose: str) -> None:
    """Every row must lie in one region of its memory kind."""
    check_table(table)
    fitting = sorted((r.address, r.address + r.length) for r in regions if r.memory == table.memory)
    bounds = np.array(fitting, dtype=np.int64).reshape(-1, 2)
    start = table.rows[:, 0]
    end = start + (table.rows[:, 4] - 1) * table.rows[:, 3] + table.rows[:, 1]
    region = np.searchsorted(bounds[:, 0], start, side="right") - 1
    reach = np.concatenate((np.maximum.accumulate(bounds[:, 1]), [-1]))  # index -1: before the first region
    outside = np.flatnonzero(end > reach[region])
    if len(outside):
        row = int(outside[0])
        raise TransportError(f"bytes {start[row]:#x}..{end[row]:#x} are not in registered memory of {whose}")


class MemoryTransport(Transport):
    """See the module. ``instance`` is for people only."""

    def __init__(self, instance: str) -> None:
        self._instance = instance
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._cell = ctypes.create_string_buffer(self._nonce, NONCE_BYTES)
        self._regions: list[Region] = []
        self._peers: dict[str, _Peer] = {}
        self._tables: dict[TableId, _Prepared] = {}
        self._done: dict[Handle, str] = {}
        self._written: set[str] = set()
        self._ids = itertools.count(1)
        self._closed = False
        OPEN_HERE[self._nonce] = self

    def __repr__(self) -> str:
        return f"<MemoryTransport {self._instance} pid={os.getpid()} peers={len(self._peers)} closed={self._closed}>"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(name="memory", target_must_progress=False, post_copies=True)

    def register(self, regions: Sequence[Region]) -> None:
        self._check_open()
        for region in regions:
            if region.memory != "DRAM":
                raise TransportError(f"the memory transport moves host memory only, not {region.memory}; use nixl")
            if region.address <= 0 or region.length < 1 or region.address + region.length >= 1 << 63:
                raise TransportError(f"{region} is not memory")
        self._regions.extend(regions)

    def deregister(self) -> None:
        self._check_open()
        self._regions.clear()

    def metadata(self) -> bytes:
        self._check_open()
        pid = os.getpid()
        here = _Metadata(_host(), pid, _started(pid), ctypes.addressof(self._cell), self._nonce, tuple(self._regions))
        return msgspec.msgpack.encode(here)

    def connect(self, peer: str, metadata: bytes) -> None:
        self._check_open()
        self.fence(peer)
        if len(metadata) > MAX_METADATA_BYTES:
            raise TransportError(f"metadata of {len(metadata)} bytes is too large", peer=peer)
        try:
            there = msgspec.msgpack.decode(metadata, type=_Metadata)
        except msgspec.MsgspecError as error:
            raise TransportError(f"metadata is not of a memory transport: {error}", peer=peer) from error
        if there.host != _host():
            raise TransportError("the peer is on another host or in another pid namespace; use nixl", peer=peer)
        place: AddressSpace
        if there.pid == os.getpid():
            place = SameProcess(there.nonce)
        elif not 0 < there.pid < 1 << 31 or not 0 < there.cell < 1 << 63 or _started(there.pid) != there.started:
            raise DisconnectedError(f"process {there.pid} is gone", peer=peer)
        else:
            place = OtherProcess(there.pid, there.cell, there.nonce)
        if not place.alive():
            raise DisconnectedError(f"process {there.pid} has closed its transport", peer=peer)
        self._peers[peer] = _Peer(place, there.regions)

    def prepare(self, peer: str, source: Table, target: Table) -> TableId:
        known = self._peers.get(peer)
        if known is None:
            raise TransportError("peer is not connected", peer=peer)
        _check_covered(source, self._regions, "this process")
        _check_covered(target, known.regions, f"peer {peer}")
        table = TableId(next(self._ids))
        self._tables[table] = _Prepared(peer, source, target)
        return table

    def post(self, table: TableId, source_entries: NDArray[np.int32], target_entries: NDArray[np.int32]) -> Handle:
        prepared = self._tables.get(table)
        if prepared is None:
            raise TransportError(f"table {table} is unknown; its peer was fenced, or the transport closed")
        if not self._regions:
            raise TransportError("no memory is registered", peer=prepared.peer)
        source, target, peer = prepared.source, prepared.target, prepared.peer
        check_entries(source, target, source_entries, target_entries)
        length = source.lengths(source_entries)
        if (length != target.lengths(target_entries)).any():
            raise TransportError("entries of a write differ in length on the two sides", peer=peer)
        self._copy(peer, *coalesce(source.addresses(source_entries), target.addresses(target_entries), length))
        handle = Handle(next(self._ids))
        self._done[handle] = peer
        self._written.add(peer)
        return handle

    def _copy(self, peer: str, source: Vector, target: Vector, length: Vector) -> None:
        place = self._peers[peer].place
        try:
            intact = place.alive()
            if intact:
                place.write(source, target, length)
                intact = place.alive()
        except OSError as error:
            if error.errno == errno.ESRCH or not place.alive():
                raise DisconnectedError(f"peer is gone: {error.strerror}", peer=peer) from error
            raise TransportError(f"writing to the peer failed: {error.strerror}", peer=peer) from error
        if not intact:
            raise DisconnectedError("peer is gone: it died, or closed its transport", peer=peer)

    def poll(self, handle: Handle) -> WriteState:
        return WriteState.DONE if handle in self._done else WriteState.BROKEN

    def release(self, handle: Handle) -> None:
        self._done.pop(handle, None)

    def fence(self, peer: str) -> None:
        if self._peers.pop(peer, None) is None:
            return
        self._written.discard(peer)
        self._tables = {table: prepared for table, prepared in self._tables.items() if prepared.peer != peer}
        self._done = {handle: whose for handle, whose in self._done.items() if whose != peer}

    def progress(self) -> None:
        """Nothing to move: the kernel has done it."""

    def evidence(self, peer: str) -> str:
        return self._peers[peer].place.how if peer in self._written else ""

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        OPEN_HERE.pop(self._nonce, None)
        ctypes.memset(self._cell, 0, NONCE_BYTES)
        for peer in list(self._peers):
            self.fence(peer)
        self._regions.clear()

    def _check_open(self) -> None:
        if self._closed:
            raise TransportError("the transport is closed")

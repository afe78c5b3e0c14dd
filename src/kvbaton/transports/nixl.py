"""The NIXL data plane: UCX writes from registered memory into a peer's.

Rules, each from measurement (``docs/design.md`` keeps the figures):

- No progress thread: it burns a core and delays small writes. Whoever has transfers open polls, the *target*
  too: UCX connects lazily and needs it for the first write even where shared memory moves the bytes.
- A write is two int32 vectors into prepared strided tables; NIXL merges entries that are neighbours on both sides.
- Releasing a pending handle does not stop it, and neither does removing the remote agent: over TCP the rest of
  the data was still read from local memory afterwards. Only destroying the agent ends it. ``fence`` therefore
  lets pending writes settle for a moment and, where they do not, replaces the whole agent.
- A disconnect ends every handle and table of that peer; the peer must be fenced or connected again.

This file must not know links, layouts' meaning, or the protocol.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from kvbaton.errors import ConfigError, DisconnectedError, TransportError
from kvbaton.layout import Region
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
from kvbaton.transports.nixl_library import library

#: How long ``fence`` lets writes to the fenced peer settle before it replaces the agent.
FENCE_SETTLE_SECONDS = 0.05
#: How long a replacement of the agent lets writes to the other peers settle.
REPLACE_SETTLE_SECONDS = 1.0
#: Largest metadata accepted from a peer, in bytes.
MAX_METADATA_BYTES = 16 << 20


class _Metadata(Struct, frozen=True, array_like=True):
    """What peers exchange. The digest keeps damaged bytes away from NIXL, which would half load them."""

    agent_name: str
    digest: bytes
    exported: bytes


def _digest(exported: bytes) -> bytes:
    return hashlib.blake2b(exported, digest_size=16).digest()


@dataclass(slots=True)
class _Peer:
    """A peer and its nixl agent. ``lost``: disconnected. ``unsettled``: a write failed in a way that may go on.
    ``log_start``: where UCX's log was before the first write."""

    metadata: _Metadata
    lost: bool = False
    unsettled: bool = False
    wrote: bool = False
    log_start: int | None = None


@dataclass(slots=True)
class _Prepared:
    """A pair of tables; ``local`` and ``remote`` are nixl's handles, None until (re)built."""

    peer: str
    source: Table
    target: Table
    local: Any = None
    remote: Any = None


@dataclass(slots=True)
class _Write:
    peer: str
    nixl_handle: Any
    state: WriteState = WriteState.PENDING
    forgotten: bool = False


class NixlTransport(Transport):
    """See the module. ``instance`` becomes the name of the nixl agent."""

    def __init__(self, instance: str) -> None:
        if not instance:
            raise ConfigError("a nixl agent needs a name: pass the instance id")
        self._instance = instance
        self._nixl = library()
        self._closed = False
        self._regions: list[Region] = []
        self._registered: list[tuple[list[Region], Any]] = []  # with the agent that is there
        self._peers: dict[str, _Peer] = {}
        self._tables: dict[TableId, _Prepared] = {}
        self._writes: dict[Handle, _Write] = {}
        self._ids = itertools.count(1)
        self._generation = 0
        self._away = False  # our memory was let go of
        self._agent: Any = self._new_agent()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"peers={len(self._peers)} writes={len(self._writes)}"
        return f"<NixlTransport {self._instance} {state}>"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(name="nixl", target_must_progress=True, post_copies=False)

    @property
    def generation(self) -> int:
        return self._generation

    # -- memory and peers

    def register(self, regions: Sequence[Region]) -> None:
        away, self._away = self._away, False
        try:
            self._check_open()
            self._register(regions)
        except TransportError:
            self._away = away
            raise
        self._regions.extend(regions)
        self._generation += away

    def deregister(self) -> None:
        """The agent goes with the memory: it is what peers have metadata of."""
        if self._closed:
            raise TransportError("the transport is closed")
        self._stop_agent()
        self._regions, self._away = [], True

    def _register(self, regions: Sequence[Region]) -> None:
        done: list[tuple[list[Region], Any]] = []
        try:
            for group in _by_memory(regions):
                done.append((group, self._register_group(group)))
        except TransportError:
            self._deregister(done)
            raise
        self._registered.extend(done)

    def _register_group(self, group: list[Region]) -> Any:
        rows = np.array([(r.address, r.length, r.device) for r in group], dtype=np.uint64)
        try:
            return self._agent.register_memory(rows, group[0].memory)
        except self._nixl.errors as error:
            raise self._nixl.translate(error, f"registering {len(group)} {group[0].memory} regions") from error

    def metadata(self) -> bytes:
        self._check_open()
        exported = self._export()
        return msgspec.msgpack.encode(_Metadata(self._instance, _digest(exported), exported))

    def _export(self) -> bytes:
        try:
            return bytes(self._agent.get_agent_metadata())
        except self._nixl.errors as error:
            raise self._nixl.translate(error, "exporting metadata") from error

    def connect(self, peer: str, metadata: bytes) -> None:
        self._check_open()
        self.fence(peer)
        self._check_open()  # the fence may have cost the agent
        if len(metadata) > MAX_METADATA_BYTES:
            raise TransportError(f"metadata of {len(metadata)} bytes is too large", peer=peer)
        try:
            there = msgspec.msgpack.decode(metadata, type=_Metadata)
        except msgspec.MsgspecError as error:
            raise TransportError(f"metadata is not of a nixl transport: {error}", peer=peer) from error
        if there.digest != _digest(there.exported):
            raise TransportError("metadata is damaged", peer=peer)
        if any(known.metadata.agent_name == there.agent_name for known in self._peers.values()):
            raise TransportError(f"another peer already uses the nixl agent name {there.agent_name!r}", peer=peer)
        self._add(peer, there)
        self._peers[peer] = _Peer(there)

    def _add(self, peer: str, there: _Metadata) -> None:
        if there.agent_name == self._instance:
            if there.exported != self._export():
                raise TransportError("the peer has our own instance id", peer=peer)
            return  # loopback: nixl knows itself
        try:
            self._agent.add_remote_agent(there.exported)
        except self._nixl.errors as error:
            self._remove(there)  # it may be half loaded, and could not be loaded again
            raise self._nixl.translate(error, "reading the peer's metadata", peer) from error

    # -- tables

    def prepare(self, peer: str, source: Table, target: Table) -> TableId:
        self._check_open()
        known = self._peers.get(peer)
        if known is None:
            raise TransportError("peer is not connected", peer=peer)
        check_table(source)
        check_table(target)
        prepared = _Prepared(peer, source, target)
        self._build(prepared, known)
        table = TableId(next(self._ids))
        self._tables[table] = prepared
        return table

    def _build(self, prepared: _Prepared, peer: _Peer) -> None:
        if prepared.local is not None:
            return
        source, target = prepared.source, prepared.target
        local = None
        try:
            local = self._agent.prep_xfer_dlist("NIXL_INIT_AGENT", _rows(source), source.memory)
            prepared.remote = self._agent.prep_xfer_dlist(peer.metadata.agent_name, _rows(target), target.memory)
        except self._nixl.errors as error:
            if local is not None:
                self._release_quietly(local)
            raise self._nixl.translate(error, "preparing tables", prepared.peer) from error
        prepared.local = local

    # -- writes

    def post(self, table: TableId, source_entries: NDArray[np.int32], target_entries: NDArray[np.int32]) -> Handle:
        prepared = self._tables.get(table)
        if prepared is None:
            raise TransportError(f"table {table} is unknown; its peer was fenced, or the transport closed")
        peer = self._peers[prepared.peer]
        if peer.lost:
            raise DisconnectedError("posting: the peer is gone; fence it and connect again", peer=prepared.peer)
        check_entries(prepared.source, prepared.target, source_entries, target_entries)
        self._check_open()
        if peer.lost:  # a new agent could not reach it
            raise DisconnectedError("posting: the peer is gone; fence it and connect again", peer=prepared.peer)
        self._build(prepared, peer)
        if peer.log_start is None:
            peer.log_start = self._nixl.log.position()
        try:
            handle = self._agent.make_prepped_xfer(
                "WRITE", prepared.local, source_entries, prepared.remote, target_entries
            )
        except self._nixl.errors as error:  # nothing was posted yet
            peer.lost = peer.lost or self._nixl.is_disconnect(error)
            raise self._nixl.translate(error, "making a write", prepared.peer) from error
        return self._start(prepared.peer, handle)

    def _start(self, name: str, nixl_handle: Any) -> Handle:
        write = _Write(name, nixl_handle)
        handle = Handle(next(self._ids))
        self._writes[handle] = write
        try:
            self._note(write, self._agent.transfer(nixl_handle))
        except self._nixl.errors as error:
            self._note_error(write, error)
            write.forgotten = True  # the caller never learns its handle; fence settles it
            raise self._nixl.translate(error, "posting a write", name) from error
        if write.state is WriteState.BROKEN:
            write.forgotten = True
            raise TransportError("posting a write: nixl reports an error state", peer=name)
        return handle

    def poll(self, handle: Handle) -> WriteState:
        write = self._writes.get(handle)
        if write is None:
            return WriteState.BROKEN
        self._refresh(write)
        return write.state

    def _refresh(self, write: _Write) -> None:
        if write.state is not WriteState.PENDING:
            return
        try:
            self._note(write, self._agent.check_xfer_state(write.nixl_handle))
        except self._nixl.errors as error:
            self._note_error(write, error)

    def _note(self, write: _Write, state: str) -> None:
        if state == "DONE":
            write.state = WriteState.DONE
            self._peers[write.peer].wrote = True
        elif state != "PROC":
            write.state = WriteState.BROKEN
            self._peers[write.peer].unsettled = True

    def _note_error(self, write: _Write, error: Exception) -> None:
        write.state = WriteState.BROKEN
        if self._nixl.is_disconnect(error):  # UCX has closed the connection: nothing passes it any more
            self._peers[write.peer].lost = True
        else:
            self._peers[write.peer].unsettled = True

    def release(self, handle: Handle) -> None:
        write = self._writes.get(handle)
        if write is None:
            return
        if write.state is WriteState.DONE:
            del self._writes[handle]
            self._release_quietly(write.nixl_handle)
        else:
            write.forgotten = True  # kept until it settles or its peer is fenced

    def progress(self) -> None:
        if self._agent is None and not self._closed:
            return  # one is started when there is something to move
        self._check_open()
        try:
            self._agent.get_new_notifs()  # drives UCX; kvbaton sends no notifications
        except self._nixl.errors as error:
            _logger.debug("progress: %r", error)  # whose writes suffer learns it at poll or post
        for handle in [handle for handle, write in self._writes.items() if write.forgotten]:
            self._refresh(self._writes[handle])
            self.release(handle)

    # -- the end of a peer, of an agent, of the transport

    def fence(self, peer: str) -> None:
        known = self._peers.get(peer)
        if known is None:
            return
        writes = [write for write in self._writes.values() if write.peer == peer]
        unsettled = not self._settle(writes, FENCE_SETTLE_SECONDS) or known.unsettled
        self._forget(peer)
        if unsettled:
            self._replace_agent()

    def _settle(self, writes: Sequence[_Write], limit_seconds: float) -> bool:
        """Poll until none of the writes is pending; False if the time was not enough."""
        deadline = time.monotonic() + limit_seconds
        pending = [write for write in writes if write.state is WriteState.PENDING]
        while pending and time.monotonic() < deadline:
            for write in pending:
                self._refresh(write)
            pending = [write for write in pending if write.state is WriteState.PENDING]
        return not pending

    def _forget(self, peer: str) -> None:
        for handle in [handle for handle, write in self._writes.items() if write.peer == peer]:
            self._release_quietly(self._writes.pop(handle).nixl_handle)
        for table in [table for table, prepared in self._tables.items() if prepared.peer == peer]:
            self._release_tables(self._tables.pop(table))
        self._remove(self._peers.pop(peer).metadata)

    def _remove(self, there: _Metadata) -> None:
        if there.agent_name == self._instance or self._agent is None:
            return
        try:
            self._agent.remove_remote_agent(there.agent_name)
        except self._nixl.errors as error:
            _logger.debug("removing %s: %r", there.agent_name, error)  # a disconnect has removed it already

    def _replace_agent(self) -> None:
        """Destroy the agent, which stops every write, and make a new one that knows the same memory and peers."""
        _logger.warning("replacing the nixl agent %s: a fenced peer had writes that do not settle", self._instance)
        self._stop_agent()
        try:
            self._start_agent()
        except TransportError as error:
            _logger.error("%s; trying again when something is to be moved", error)

    def _stop_agent(self) -> None:
        """Destroy the agent, which stops every write. Tables and peers are kept for the next one."""
        self._settle(list(self._writes.values()), REPLACE_SETTLE_SECONDS)
        for write in self._writes.values():
            self._release_quietly(write.nixl_handle)
            if write.state is WriteState.PENDING:
                write.state = WriteState.BROKEN
            write.nixl_handle = None
        for prepared in self._tables.values():
            self._release_tables(prepared)
        for peer in self._peers.values():
            self._remove(peer.metadata)
        self._destroy_agent()
        for peer in self._peers.values():
            peer.unsettled = False

    def _start_agent(self) -> None:
        """An agent that knows our memory and our peers. Raises TransportError; then there is none."""
        self._agent = self._new_agent()
        try:
            self._register(self._regions)
        except TransportError:
            self._destroy_agent()
            raise
        self._generation += 1
        for name, peer in self._peers.items():
            try:
                self._add(name, peer.metadata)
            except TransportError as error:
                peer.lost = True
                _logger.warning("%s; it stays lost until it is connected again", error)

    def _new_agent(self) -> Any:
        config = self._nixl.api.nixl_agent_config(enable_prog_thread=False, num_threads=0, backends=["UCX"])
        try:
            with self._nixl.log.capturing():
                return self._nixl.api.nixl_agent(self._instance, config)
        except self._nixl.errors as error:
            raise self._nixl.translate(error, "starting a nixl agent") from error

    def _destroy_agent(self) -> None:
        self._deregister(self._registered)
        self._registered = []
        self._agent = None  # the last reference: NIXL has no call for it

    def _deregister(self, groups: Iterable[tuple[list[Region], Any]]) -> None:
        for _, descriptors in groups:
            try:
                self._agent.deregister_memory(descriptors)
            except self._nixl.errors as error:
                _logger.warning("deregistering memory of %s: %r", self._instance, error)

    def _release_tables(self, prepared: _Prepared) -> None:
        for handle in (prepared.local, prepared.remote):
            self._release_quietly(handle)
        prepared.local = prepared.remote = None

    def _release_quietly(self, nixl_handle: Any) -> None:
        if nixl_handle is None:
            return
        try:
            nixl_handle.release()
        except self._nixl.errors as error:
            _logger.debug("releasing a nixl handle: %r", error)  # a disconnect has released it already

    def sizes(self) -> dict[str, int]:
        return {
            "regions": sum(len(group) for group, _ in self._registered),
            "peers": len(self._peers),
            "tables": len(self._tables),
            "writes": len(self._writes),
            "log_bytes": self._nixl.log.position(),
        }

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for peer in list(self._peers):
            self._forget(peer)
        self._destroy_agent()
        self._nixl.log.pass_on()

    def evidence(self, peer: str) -> str:
        """What UCX logged when it chose how to write to ``peer``; empty before the first write is done, where
        UCX's log is not ours to read, or where connections differ and the log does not say whose is whose."""
        self._nixl.log.pass_on()
        known = self._peers.get(peer)
        if known is None or not known.wrote:
            return ""
        loopback = known.metadata.agent_name == self._instance
        tables = [t for t in self._nixl.log.chosen(self._instance) if (t.scope == "self") == loopback]
        if len({table.ways for table in tables}) != 1:
            start = known.log_start or 0
            starts = sorted(other.log_start or 0 for other in self._peers.values() if other.wrote)
            until = next((later for later in starts if later > start), None)
            alone = starts.count(start) == 1
            tables = [t for t in tables if t.at >= start and (until is None or t.at < until) and alone]
        return f"UCX: {', '.join(tables[-1].ways)}" if tables else ""

    def _check_open(self) -> None:
        """Raises TransportError when it is closed, or has no agent and none can be started."""
        if self._closed:
            raise TransportError("the transport is closed")
        if self._away:
            raise TransportError("no memory is registered")
        if self._agent is None:
            self._start_agent()


_logger = logging.getLogger(__name__)


def _rows(table: Table) -> NDArray[np.int64]:
    """Rows as nixl takes them: it refuses a stride below the length even where there is one block only."""
    rows = table.rows.copy()
    rows[:, 3] = np.where(rows[:, 4] == 1, rows[:, 1], rows[:, 3])
    return rows


def _by_memory(regions: Sequence[Region]) -> list[list[Region]]:
    """Regions grouped by memory kind: one registration each."""
    kinds = dict.fromkeys(region.memory for region in regions)
    return [[region for region in regions if region.memory == kind] for kind in kinds]

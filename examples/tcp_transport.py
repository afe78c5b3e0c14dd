"""A data plane of one's own: writes travel over TCP sockets of this host. It passes kvbaton's conformance suite.

Run: python examples/handoff.py tcp_transport:TcpTransport

A source connects to the socket of its target and sends frames: a header, the pieces as (address, length), their bytes.
``post`` copies the bytes out of the pool, so nothing reads the pool afterwards, and queues the frame; ``poll`` sends
what the socket takes and reads acknowledgements. The target applies frames in ``progress``, and only to memory that it
has registered. Frames carry a key from the target's metadata. They are not encrypted: this is for reading.
"""

from __future__ import annotations

import ctypes
import itertools
import secrets
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvbaton.errors import DisconnectedError, TransportError
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

HEADER = struct.Struct("<16sQQQ")  # key, write, pieces, bytes
ACKNOWLEDGEMENT = struct.Struct("<Q")
MAX_FRAME_BYTES = 1 << 30
READ_BYTES = 1 << 20
CONNECT_SECONDS = 5.0


class Metadata(msgspec.Struct, frozen=True):
    """What a source has to know."""

    port: int
    key: bytes
    regions: tuple[Region, ...]


class Stream:
    """A socket that never blocks, with what is still to be sent and what has come but is not yet understood."""

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        self._socket = connected
        self._unsent = bytearray()
        self.received = bytearray()
        self.broken = False

    def send(self, *parts: bytes) -> None:
        for part in parts:
            self._unsent += part
        self.pump()

    def pump(self) -> None:
        """Send and receive what can be without waiting."""
        try:
            while self._unsent and not self.broken:
                del self._unsent[: self._socket.send(memoryview(self._unsent)[:READ_BYTES])]
        except BlockingIOError:
            pass
        except OSError:
            self.broken = True
        try:
            while not self.broken:
                came = self._socket.recv(READ_BYTES)
                self.broken = not came
                self.received += came
        except BlockingIOError:
            pass
        except OSError:
            self.broken = True

    def take(self, size: int) -> bytes | None:
        """The next ``size`` bytes, once they are there."""
        if len(self.received) < size:
            return None
        taken = bytes(self.received[:size])
        del self.received[:size]
        return taken

    def close(self) -> None:
        self.broken = True
        self._socket.close()


@dataclass(slots=True)
class Peer:
    """A target, and what became of the writes to it."""

    metadata: Metadata
    stream: Stream
    pending: set[int] = field(default_factory=set)
    done: set[int] = field(default_factory=set)
    wrote: bool = False

    def pump(self) -> None:
        self.stream.pump()
        while (answer := self.stream.take(ACKNOWLEDGEMENT.size)) is not None:
            (write,) = ACKNOWLEDGEMENT.unpack(answer)
            if write in self.pending:
                self.pending.discard(write)
                self.done.add(write)
                self.wrote = True


def covered(address: int, length: int, regions: Sequence[Region]) -> bool:
    """Whether bytes are registered."""
    return any(r.address <= address and address + length <= r.address + r.length for r in regions)


class TcpTransport(Transport):
    """See the module. ``instance`` is for people only."""

    def __init__(self, instance: str) -> None:
        self._instance = instance
        self._key = secrets.token_bytes(16)
        self._regions: list[Region] = []
        self._peers: dict[str, Peer] = {}
        self._tables: dict[TableId, tuple[str, Table, Table]] = {}
        self._writes: dict[Handle, str] = {}
        self._ids = itertools.count(1)
        self._sources: list[Stream] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._listener.setblocking(False)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(name="tcp", target_must_progress=True, post_copies=False)

    # -- what a target does

    def register(self, regions: Sequence[Region]) -> None:
        self._check_open()
        if any(region.memory != "DRAM" for region in regions):
            raise TransportError("TCP moves host memory only")
        self._regions.extend(regions)

    def metadata(self) -> bytes:
        self._check_open()
        return msgspec.json.encode(Metadata(self._listener.getsockname()[1], self._key, tuple(self._regions)))

    def progress(self) -> None:
        self._check_open()
        try:
            while True:
                self._sources.append(Stream(self._listener.accept()[0]))
        except BlockingIOError:
            pass
        for source in self._sources:
            source.pump()
            while self._apply(source):
                pass
            if source.broken:
                source.close()
        self._sources = [source for source in self._sources if not source.broken]

    def _apply(self, source: Stream) -> bool:
        """Do the next write of a source, if all of it has come."""
        if len(source.received) < HEADER.size:
            return False
        key, write, pieces, size = HEADER.unpack_from(source.received)
        if key != self._key or pieces * 16 + size > MAX_FRAME_BYTES:
            source.close()
            return False
        if len(source.received) < HEADER.size + pieces * 16 + size:
            return False
        frame = source.take(HEADER.size + pieces * 16 + size) or b""
        table = np.frombuffer(frame, np.int64, pieces * 2, HEADER.size).reshape(-1, 2)
        if (table[:, 1] < 0).any() or table[:, 1].sum() != size:
            source.close()
            return False
        at = HEADER.size + pieces * 16
        for address, length in table.tolist():
            if not covered(address, length, self._regions):
                source.close()
                return False
            ctypes.memmove(address, frame[at : at + length], length)
            at += length
        source.send(ACKNOWLEDGEMENT.pack(write))
        return True

    # -- what a source does

    def connect(self, peer: str, metadata: bytes) -> None:
        self._check_open()
        self.fence(peer)
        try:
            known = msgspec.json.decode(metadata, type=Metadata)
        except msgspec.MsgspecError as error:
            raise TransportError(f"metadata is not of a TCP transport: {error}", peer=peer) from error
        try:
            connected = socket.create_connection(("127.0.0.1", known.port), CONNECT_SECONDS)
        except OSError as error:
            raise DisconnectedError(f"nobody listens at port {known.port}: {error}", peer=peer) from error
        self._peers[peer] = Peer(known, Stream(connected))

    def prepare(self, peer: str, source: Table, target: Table) -> TableId:
        known = self._peers.get(peer)
        if known is None:
            raise TransportError("peer is not connected", peer=peer)
        for table, regions in ((source, self._regions), (target, known.metadata.regions)):
            check_table(table)
            for address, length, _, stride, count in table.rows.tolist():
                if not covered(address, (count - 1) * stride + length, regions):
                    raise TransportError(f"a table leaves registered memory at {address:#x}", peer=peer)
        prepared = TableId(next(self._ids))
        self._tables[prepared] = (peer, source, target)
        return prepared

    def post(self, table: TableId, source_entries: NDArray[np.int32], target_entries: NDArray[np.int32]) -> Handle:
        if table not in self._tables:
            raise TransportError(f"table {table} is unknown; its peer was fenced, or the transport closed")
        name, source, target = self._tables[table]
        check_entries(source, target, source_entries, target_entries)
        lengths = source.lengths(source_entries)
        if (lengths != target.lengths(target_entries)).any():
            raise TransportError("entries of a write differ in length on the two sides", peer=name)
        peer = self._peers[name]
        peer.pump()
        if peer.stream.broken:
            raise DisconnectedError("the peer has closed the connection", peer=name)
        handle = Handle(next(self._ids))
        pieces = np.stack([target.addresses(target_entries), lengths], axis=1)
        addresses = source.addresses(source_entries).tolist()
        data = b"".join(map(ctypes.string_at, addresses, lengths.tolist()))
        peer.pending.add(handle)
        self._writes[handle] = name
        peer.stream.send(
            HEADER.pack(peer.metadata.key, handle, len(pieces), len(data)), pieces.astype("<i8").tobytes(), data
        )
        return handle

    def poll(self, handle: Handle) -> WriteState:
        name = self._writes.get(handle)
        if name is None:
            return WriteState.BROKEN
        peer = self._peers[name]
        peer.pump()
        if handle in peer.done:
            return WriteState.DONE
        return WriteState.BROKEN if peer.stream.broken else WriteState.PENDING

    def release(self, handle: Handle) -> None:
        name = self._writes.get(handle)
        if name is not None and self.poll(handle) is not WriteState.PENDING:
            del self._writes[handle]
            self._peers[name].done.discard(handle)

    def fence(self, peer: str) -> None:
        known = self._peers.pop(peer, None)
        if known is not None:
            known.stream.close()
        self._tables = {table: entry for table, entry in self._tables.items() if entry[0] != peer}
        self._writes = {handle: whose for handle, whose in self._writes.items() if whose != peer}

    def evidence(self, peer: str) -> str:
        known = self._peers.get(peer)
        return f"TCP to port {known.metadata.port}" if known is not None and known.wrote else ""

    def close(self) -> None:
        for peer in list(self._peers):
            self.fence(peer)
        for source in self._sources:
            source.close()
        self._sources.clear()
        self._regions.clear()
        self._listener.close()

    def _check_open(self) -> None:
        if self._listener.fileno() < 0:
            raise TransportError("the transport is closed")

"""Baselines on NIXL itself: the leanest loop that moves a room, and one write of the same bytes.

Leanest: prepared tables, no progress thread, one post with a notification per room and peer, spinning on both sides;
no protocol, no failure handling, no fairness. Where a room would fall into pieces of a token it is copied together, one
strided copy a layer, written once and copied apart. It shares the plan's tables with kvbaton, nothing else: besides the
NIXL transport this is the only file that uses nixl, so that the baseline cannot inherit what the transport does.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvbaton.errors import TransportError
from kvbaton.layout import Region
from kvbaton.plan.pair import PartPlan
from kvbaton.transports import nixl_package

Entries = tuple[NDArray[np.int32], NDArray[np.int32]]


class Leanest:
    """One raw NIXL agent over one registered region."""

    def __init__(self, name: str, region: Region, bounce: Region | None = None) -> None:
        nixl: Any = nixl_package.load()
        config = nixl.nixl_agent_config(enable_prog_thread=False, num_threads=0, backends=["UCX"])
        self.agent: Any = nixl.nixl_agent(name, config)
        self._region = region
        registered = [region] if bounce is None else [region, bounce]
        rows = np.array([[r.address, r.length, r.device] for r in registered], dtype=np.uint64)
        self._registered = self.agent.register_memory(rows, region.memory)
        self._tables: dict[str, tuple[Any, Any]] = {}
        self._wholes: dict[str, tuple[Any, Any]] = {}
        self._bounces: dict[str, tuple[Any, Any]] = {}

    def metadata(self) -> bytes:
        metadata: bytes = self.agent.get_agent_metadata()
        return metadata

    def add_peer(self, metadata: bytes) -> str:
        peer = self.agent.add_remote_agent(metadata)
        return peer.decode() if isinstance(peer, bytes) else str(peer)

    def notify(self, peers: list[str]) -> None:
        for peer in peers:
            self.agent.send_notif(peer, b"go")

    def connect(self, metadata: bytes, part: PartPlan | None, region: Region, chunk: int) -> str:
        """Prepare the tables of one part, and tables of whole runs of ``chunk`` bytes for the single write."""
        peer = self.add_peer(metadata)
        if part is not None:
            rows = part.source.table.rows.copy(), part.target.table.rows.copy()
            self._tables[peer] = self._prepare(peer, region, *rows)
        if self._region.length == region.length:
            sides = []
            for side in (self._region, region):
                rows_of_side = [side.address, chunk, side.device, chunk, side.length // chunk]
                sides.append(np.array([rows_of_side], dtype=np.int64))
            self._wholes[peer] = self._prepare(peer, region, sides[0], sides[1])
        return peer

    def connect_bounce(self, peer: str, region: Region, source: int, target: int, length: int) -> None:
        """Prepare one write of ``length`` bytes between two addresses of the bounce buffers."""
        sides = [np.array([[address, length, region.device, length, 1]]) for address in (source, target)]
        self._bounces[peer] = self._prepare(peer, region, sides[0], sides[1])

    def write_bounce(self, peer: str) -> None:
        self._write(self._bounces[peer])

    def _prepare(
        self, peer: str, region: Region, source: NDArray[np.int64], target: NDArray[np.int64]
    ) -> tuple[Any, Any]:
        for rows in (source, target):  # nixl judges the stride even where there is one block only
            rows[:, 3] = np.where(rows[:, 4] == 1, rows[:, 1], rows[:, 3])
        return (
            self.agent.prep_xfer_dlist("", source.astype(np.uint64), self._region.memory),
            self.agent.prep_xfer_dlist(peer, target.astype(np.uint64), region.memory),
        )

    def write_rooms(self, rooms: list[list[dict[str, Entries]]]) -> None:
        """Write every room to every peer, chunk by chunk, a notification with the last."""
        for number, chunks in enumerate(rooms):
            handles = []
            for left, chunk in zip(range(len(chunks) - 1, -1, -1), chunks, strict=True):
                for peer, (source, target) in chunk.items():
                    local, remote = self._tables[peer]
                    note = b"" if left else b"%d" % number
                    handle = self.agent.make_prepped_xfer("WRITE", local, source, remote, target, note)
                    self.agent.transfer(handle)
                    handles.append(handle)
            self._settle(handles)

    def write_wholes(self, peer: str, count: int) -> None:
        """Write ``count`` contiguous chunks, one request each, a notification with each."""
        for number in range(count):
            self._write(self._wholes[peer], number)

    def _write(self, tables: tuple[Any, Any], number: int = 0) -> None:
        index = np.array([number], dtype=np.int32)
        handle = self.agent.make_prepped_xfer("WRITE", tables[0], index, tables[1], index, b"%d" % number)
        self.agent.transfer(handle)
        self._settle([handle])

    def _settle(self, handles: list[Any]) -> None:
        for handle in handles:
            while (state := self.agent.check_xfer_state(handle)) == "PROC":
                pass
            if state != "DONE":
                raise TransportError(f"the baseline's write ended as {state}")
            self.agent.release_xfer_handle(handle)

    def await_notifications(self, count: int, timeout_seconds: float) -> None:
        """Spin until ``count`` notifications are in."""
        deadline = time.monotonic() + timeout_seconds
        while count > 0:
            for messages in self.agent.get_new_notifs().values():
                count -= len(messages)
            if time.monotonic() > deadline:
                raise TransportError(f"{count} notifications of the baseline are missing after {timeout_seconds:g} s")

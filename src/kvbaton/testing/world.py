"""A world of ranks without threads, sockets or clocks: real cores, real plans, bytes in numpy arrays.

Everything happens in :meth:`World.run`, in a fixed order, under a virtual clock. A message may be intercepted on its
way (:attr:`World.network`), so that tests lose, double, delay, reorder and forge as they like. After every step of
every rank the invariants are checked: the core's own, and that whoever may still be written holds a lease.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from kvbaton.control.base import LinkId
from kvbaton.errors import DisconnectedError, InternalError
from kvbaton.layout import CacheLayout, Coordinates
from kvbaton.plan.pair import PairSide
from kvbaton.plan.runs import merge
from kvbaton.protocol.core import Core
from kvbaton.protocol.effects import (
    CancelWrites,
    CloseLink,
    Dial,
    Effect,
    FencePeer,
    PeerLost,
    PostWrite,
    PreparePeer,
    Quiesce,
    Report,
    Scatter,
    Send,
    StagedRun,
)
from kvbaton.protocol.events import (
    Dialed,
    Event,
    LinkRefused,
    LinkUp,
    MessageArrived,
    PeerFenced,
    PeerPrepared,
    PeerUnprepared,
    TimePassed,
    WriteId,
    WriteSettled,
)
from kvbaton.protocol.messages import AnyMessage, Ping, Pong, decode, encode
from kvbaton.protocol.session import Identity
from kvbaton.protocol.settings import Settings
from kvbaton.testing.rank import Rank

#: What the network does with one message: how many copies arrive (0 loses it), or what arrives instead, in order.
Network = Callable[["Rank", "Rank", AnyMessage], "int | Sequence[AnyMessage]"]


class World:
    """See the module. ``trace`` keeps every message in order: (time, from, to, message).

    Args:
        settings: of every rank.
        checking: check the invariants after every step.
    """

    def __init__(self, settings: Settings | None = None, *, checking: bool = True) -> None:
        self.now = 0.0
        self.checking = checking
        self.settings = settings if settings is not None else Settings()
        self.ranks: dict[str, Rank] = {}
        self.network: Network = lambda _from, _to, _message: 1
        self.trace: list[tuple[float, str, str, AnyMessage]] = []
        self._link_ids = itertools.count(1)
        self._mail: deque[tuple[Rank, LinkId, bytes]] = deque()
        self._todo: deque[tuple[Rank, Event]] = deque()

    def add(
        self,
        name: str,
        layout: CacheLayout,
        *,
        group: str = "",
        group_size: int = 1,
        coordinates: Coordinates | None = None,
        address: str = "",
        instance: str = "",
        machine: str = "",
    ) -> Rank:
        """A new rank whose memory is zero. A rank at an address in use replaces the old one there."""
        identity = Identity(
            instance=instance or f"i-{name}",
            group=group or name,
            group_size=group_size,
            coordinates=coordinates if coordinates is not None else Coordinates(),
            layout=layout,
            agent_metadata=name.encode(),
            transport="world",
            machine=machine,
        )
        memory = {region.address: np.zeros(region.length, dtype=np.uint8) for region in layout.regions}
        rank = Rank(self, name, Core(identity, self.settings), address or f"world://{name}", memory)
        self.ranks[name] = rank
        return rank

    def kill(self, rank: Rank) -> None:
        """The process dies: it does nothing any more, whoever dialled it is refused."""
        rank.alive = False
        for other in self.ranks.values():
            for link, (end, _, _) in list(other.links.items()):
                if end is rank and other.alive:
                    self._todo.append((other, LinkRefused(link)))
        self.run()

    def replace(self, rank: Rank, name: str) -> Rank:
        """The process dies and another one with the same memory layout stands at its address, as another instance."""
        rank.alive = False
        old = rank.core.identity
        successor = self.add(
            name,
            old.layout,
            group=old.group,
            group_size=old.group_size,
            coordinates=old.coordinates,
            address=rank.address,
        )
        for dialler in list(self.ranks.values()):
            if dialler.alive:
                self.reconnect(dialler, rank.address)
        return successor

    def inject(self, sender: Rank, receiver: Rank, message: AnyMessage) -> None:
        """``message`` arrives at ``receiver`` as if ``sender`` had sent it."""
        receiver.do(MessageArrived(receiver.link_to(sender), encode(message)))
        self._drain()

    def describe(self) -> str:
        """Every message so far but the heartbeat, one line each: what a failed test prints."""
        return "\n".join(
            f"{at:9.3f} {sender} → {receiver} {str(message)[:200]}"
            for at, sender, receiver, message in self.trace
            if not isinstance(message, Ping | Pong)
        )

    def reconnect(self, dialler: Rank, address: str) -> None:
        """The dialler's link to ``address`` comes up again, to whoever listens there now."""
        for link, (_, _, where) in list(dialler.links.items()):
            if where == address:
                self._connect(dialler, link, address)
                self._todo.append((dialler, LinkUp(link)))
        self.run()

    def run(self, until: float | None = None) -> None:
        """Deliver and do everything that is due; with ``until``, let time pass to it, deadline by deadline."""
        self._drain()
        while until is not None and self.now < until:
            deadlines = [d for r in self.ranks.values() if r.alive and (d := r.core.next_deadline()) is not None]
            self.now = min([until, *(max(d, self.now) for d in deadlines)])
            for rank in list(self.ranks.values()):
                deadline = rank.core.next_deadline()
                if rank.alive and deadline is not None and deadline <= self.now:
                    rank.do(TimePassed())
            self._drain()

    def perform(self, rank: Rank, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self._send(rank, effect)
            elif isinstance(effect, Report):
                self._note(rank, effect)
            elif isinstance(effect, PeerLost):
                rank.lost.append(effect)
            elif isinstance(effect, Dial):
                link = LinkId(next(self._link_ids))
                self._todo.append((rank, Dialed(effect.address, link)))
                self._connect(rank, link, effect.address)
            elif isinstance(effect, CloseLink):
                rank.links.pop(effect.link, None)
            elif isinstance(effect, PreparePeer):
                rank.pairs[effect.peer] = effect.pair
                found = self.by_instance(effect.peer) is not None
                event = PeerPrepared(effect.peer) if found else PeerUnprepared(effect.peer, DisconnectedError("gone"))
                self._todo.append((rank, event))
            elif isinstance(effect, FencePeer):
                rank.held = [write for write in rank.held if write.peer != effect.peer]
                self._todo.append((rank, PeerFenced(effect.peer)))
            elif isinstance(effect, Scatter):
                self._scatter(rank, effect)
            elif isinstance(effect, Quiesce):
                rank.quiescing.append(effect.peer)
                if not rank.hold_quiesce:
                    rank.release_quiesced()
            elif isinstance(effect, PostWrite):
                self._post(rank, effect)
            elif isinstance(effect, CancelWrites):
                self._cancel(rank, effect.writes)

    def later(self, rank: Rank, events: Iterable[Event]) -> None:
        """Events that happen once everything before them has."""
        self._todo.extend((rank, event) for event in events)

    def land(self, rank: Rank, write: PostWrite) -> None:
        """Copy the bytes of a write."""
        target = self.by_instance(write.peer)
        if target is None:
            return
        part = rank.pairs[write.peer].parts[write.part]
        if write.staged is not None:
            self._land_staged(rank, target, write, write.staged)
            return
        runs = merge(part.source.table, write.source_entries, part.target.table, write.target_entries)
        for source_at, target_at, length in zip(runs.source, runs.target, runs.length, strict=True):
            target.view(int(target_at), int(length))[:] = rank.view(int(source_at), int(length))

    def by_instance(self, instance: str) -> Rank | None:
        """The living rank of that instance."""
        return next((r for r in self.ranks.values() if r.core.instance == instance and r.alive), None)

    def _land_staged(self, rank: Rank, target: Rank, write: PostWrite, run: StagedRun) -> None:
        """Gather, block by block and lane by lane, straight into the target's slot."""
        part = run.staged.part
        at = _all_lanes(part.source, part.lane_bytes, write.source_entries)
        place = int(run.staged.target.rows[run.slot, 0]) + run.first * part.block_bytes
        for block in range(run.count):
            for lane, length in enumerate(part.lane_bytes.tolist()):
                target.view(place, length)[:] = rank.view(int(at[lane, block]), length)
                place += length

    def _scatter(self, rank: Rank, effect: Scatter) -> None:
        part = effect.staged.part
        at = _all_lanes(part.target, part.lane_bytes, effect.target_entries)
        place = int(effect.staged.target.rows[effect.slot, 0])
        for block in range(effect.count):
            for lane, length in enumerate(part.lane_bytes.tolist()):
                rank.view(int(at[lane, block]), length)[:] = rank.view(place, length)
                place += length

    # ---- inside -------------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        while self._todo or self._mail:
            if self._todo:
                rank, event = self._todo.popleft()
                rank.do(event)
            else:
                receiver, link, payload = self._mail.popleft()
                receiver.do(MessageArrived(link, payload))

    def _connect(self, rank: Rank, link: LinkId, address: str) -> None:
        peer = next((r for r in self.ranks.values() if r.address == address and r.alive), None)
        back = LinkId(next(self._link_ids)) if peer is not None else None
        rank.links[link] = (peer, back, address)
        if peer is not None and back is not None:
            peer.links[back] = (rank, link, "")
        else:
            self._todo.append((rank, LinkRefused(link)))

    def _send(self, rank: Rank, effect: Send) -> None:
        peer, back, _ = rank.links.get(effect.link, (None, None, ""))
        if peer is None or back is None or not peer.alive:
            return
        message = decode(effect.payload)
        self.trace.append((self.now, rank.name, peer.name, message))
        arriving = self.network(rank, peer, message)
        payloads = [effect.payload] * arriving if isinstance(arriving, int) else [encode(m) for m in arriving]
        self._mail.extend((peer, back, payload) for payload in payloads)

    def _note(self, rank: Rank, report: Report) -> None:
        before = rank.statuses.get((report.role, report.room))
        ended = before is not None and before.poll.name in ("Failed", "Success")
        if ended and before is not None and report.status.poll is not before.poll:
            raise InternalError(f"room {report.room} ended as {before.poll.name} and became {report.status.poll.name}")
        rank.statuses[report.role, report.room] = report.status

    def _post(self, rank: Rank, write: PostWrite) -> None:
        if rank.hold_writes:
            rank.held.append(write)
            return
        self.land(rank, write)
        self._todo.append((rank, WriteSettled(write.write)))

    def _cancel(self, rank: Rank, writes: frozenset[WriteId]) -> None:
        """Nothing can be cancelled here: every write is posted at once, as on the fastest of drivers."""


def _all_lanes(side: PairSide, lane_bytes: NDArray[np.int64], blocks: NDArray[np.int32]) -> NDArray[np.int64]:
    """Addresses of blocks' pieces, ``[lanes, blocks]``, by the table alone, which is what gather must agree with."""
    stride = side.units * side.blocks_per_unit
    first = np.arange(0, len(lane_bytes) * stride, stride, dtype=np.int64)
    return side.table.addresses((first[:, None] + blocks).ravel()).reshape(len(lane_bytes), len(blocks))

"""The leader's end of a group of ranks: to its scheduler they look like one KVManager and one model.

Rules: every decision is the leader's. It orders before it does its own part, and all ranks do the same in the same
order, so that their units carry the same numbers and their collectives meet. A room is what :func:`combine` makes of
all ranks; it is leased while it is leased on any of them. A follower that is lost ends the group: its share of every
cache is gone, so every room fails at once and ``on_lost`` is called.

This file must not know how followers are started.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection

from kvbaton.errors import AbortedError, InternalError, KVBatonError
from kvbaton.manager import KVManager, KVPoll, KVReceiver, KVSender, Span
from kvbaton.protocol.messages import Role
from kvbaton.runtime.commands import Fence
from kvbaton.serving.engine import orders
from kvbaton.serving.engine.ahead import Ahead
from kvbaton.serving.engine.cache import Extent
from kvbaton.serving.engine.pipe import Died, Pipe
from kvbaton.serving.engine.polls import combine
from kvbaton.serving.engine.pool import LEADER_POOLS, Copies, Pools

logger = logging.getLogger(__name__)

READY_SECONDS = 600.0
#: How long a follower may take to end once it was told to.
STOP_SECONDS = 20.0


class Member:
    """One follower: the pipe to it, and what it said when it was ready. ``kill`` ends its process."""

    def __init__(self, rank: int, connection: Connection, kill: Callable[[], None]) -> None:
        self.rank = rank
        self.pipe: Pipe[orders.RankReport] = Pipe(
            connection, f"rank {rank} of this group", orders.RankReport, kill=kill
        )
        self.ready: orders.RankReady | None = None

    def await_ready(self, seconds: float) -> orders.RankReady:
        """Raises InternalError, or what kept it from being ready."""
        self.ready = self.pipe.first(orders.RankReady, seconds)
        return self.ready


class Group:
    """All followers of one leader. Start it when they are ready; close it after the scheduler, before the manager."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = tuple(members)
        self.on_lost: Callable[[KVBatonError], None] = lambda _error: None
        self.lost: KVBatonError | None = None
        self.wakeup = threading.Event()
        self._sides: dict[int, GroupRoom] = {}
        self._numbers = itertools.count(1)
        self._closing = False
        self._threads = [
            threading.Thread(target=self._listen, args=(member,), name=f"kvbaton-rank-{member.rank}", daemon=True)
            for member in self.members
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def order(self, order: orders.RankOrder) -> None:
        """Tell every follower. Raises InternalError when the group is broken."""
        if self.lost is not None:
            raise self.lost.again()
        for member in self.members:
            member.pipe.send(order)

    def announce(self, tokens: list[list[int]], extents: list[Extent], ahead: Ahead | None, every: bool) -> None:
        """Have every follower take part in the forward pass that the leader begins now, and send its own layers of it
        ahead."""
        requests = tuple(
            orders.ForwardRequest(tuple(row), e.block_table.pages, e.block_table.ring, e.block_table.state, e.cached)
            for row, e in zip(tokens, extents, strict=True)
        )
        sends = (ahead.sender.number, ahead.spans) if ahead and isinstance(ahead.sender, GroupSender) else None
        self.order(orders.Forward(requests, sends, every))

    def announce_copy(self, copies: Copies) -> None:
        """Have every follower copy the same units."""
        self.order(orders.Copy(copies))

    def enter(self, side: GroupRoom) -> int:
        number = next(self._numbers)
        self._sides[number] = side
        return number

    def leave(self, number: int) -> None:
        self._sides.pop(number, None)

    def close(self) -> None:
        """Tell the followers to stop and wait for their pipes to end. Idempotent."""
        if self._closing:
            return
        self._closing = True
        for member in self.members:
            try:
                member.pipe.send(orders.Stop())
            except KVBatonError as error:
                logger.debug("%s", error)
        deadline = time.monotonic() + STOP_SECONDS
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))
        for member in self.members:
            member.pipe.close()

    def _listen(self, member: Member) -> None:
        """Thread of one follower."""
        while True:
            report = member.pipe.recv()
            if isinstance(report, orders.RankStatus):
                side = self._sides.get(report.side)
                if side is not None:
                    side.on_status(member.rank, report)
                    self.wakeup.set()
                continue
            if not self._closing:
                self._lose(member.pipe.lost(report), quiet=isinstance(report, Died))
            return

    def _lose(self, error: KVBatonError, *, quiet: bool) -> None:
        if self.lost is None:
            self.lost = error
            logger.log(logging.ERROR if not quiet else logging.WARNING, "%s", error)
            self.on_lost(error)
            self.wakeup.set()


class GroupRoom:
    """What senders and receivers of all ranks at once share; see :mod:`kvbaton.engines.port`."""

    def __init__(self, group: Group, local: KVSender | KVReceiver, pools: Pools) -> None:
        self.room = local.room
        self._group = group
        self._local = local
        self._pools = pools
        self._handed_over = False
        self._others: dict[int, orders.RankStatus] = {}
        self.number = group.enter(self)
        for member in group.members:
            self._others[member.rank] = orders.RankStatus(self.number, KVPoll.Bootstrapping)

    def begin(self, role: Role, sources: Sequence[str]) -> None:
        """Have the others begin it as well. Raises InternalError where they cannot be told; it has ended here then."""
        try:
            self._group.order(orders.Begin(self.number, role, self.room, tuple(sources)))
        except InternalError as error:
            self._group.leave(self.number)
            self._local.fail(error)
            raise

    def on_status(self, rank: int, report: orders.RankStatus) -> None:
        """On the thread of a follower."""
        self._others[rank] = report

    def poll(self) -> KVPoll:
        if self._group.lost is not None:
            return KVPoll.Failed
        return combine([self._local.poll(), *(other.poll for other in self._others.values())])

    @property
    def error(self) -> KVBatonError | None:
        """The first root cause that is known, an abort only where there is nothing better."""
        found = [self._local.error] if self._local.error is not None else []
        found += [self._group.lost.in_room(self.room)] if self._group.lost is not None else []
        found += [other.error for other in self._others.values() if other.error is not None]
        return min(found, key=lambda error: isinstance(error, AbortedError), default=None)

    @property
    def leased(self) -> bool:
        return self._local.leased or any(self._leased_on(other) for other in self._others.values())

    def _leased_on(self, other: orders.RankStatus) -> bool:
        ended = other.poll in (KVPoll.Failed, KVPoll.Success)
        return self._group.lost is None and (other.leased or (self._handed_over and not ended))

    @property
    def released(self) -> bool:
        """Ended on every rank, and no unit is leased on any: a rank that failed does not end the others by itself."""
        ended = {KVPoll.Failed, KVPoll.Success}
        others = self._group.lost is not None or all(
            other.poll in ended and not other.leased for other in self._others.values()
        )
        if others and self._local.released:
            self._group.leave(self.number)
            return True
        return False

    @property
    def bytes(self) -> int:
        return self._local.bytes + sum(other.bytes for other in self._others.values())

    @property
    def handoff_seconds(self) -> float:
        return self._local.handoff_seconds

    @property
    def exposed_seconds(self) -> float:
        return max([self._local.exposed_seconds, *(other.exposed_seconds for other in self._others.values())])

    def fail(self, error: KVBatonError) -> None:
        try:
            self._group.order(orders.Fail(self.number, error))
        except InternalError:
            logger.debug("room %d: the group is lost, only the leader's part is failed", self.room)
        self._local.fail(error)

    def abort(self, reason: str) -> None:
        self.fail(AbortedError(reason, room=self.room))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} room {self.room}: {self.poll().name}, here {self._local!r}>"


class GroupSender(GroupRoom):
    """A sender of all ranks at once."""

    def __init__(self, group: Group, local: KVSender, pools: Pools) -> None:
        super().__init__(group, local, pools)
        self._sender = local

    @property
    def prefix_len(self) -> int:
        return min([self._sender.prefix_len, *(other.prefix_len for other in self._others.values())])

    def submit(self, spans: Sequence[Span], *, last: bool, ready: Fence, layers: tuple[int, int] | None = None) -> None:
        """Layers are the leader's own: the others hand over theirs as they compute them (see ``orders.Forward``)."""
        if layers is not None:
            self._sender.submit(self._pools.here(spans), last=last, ready=ready, layers=layers)
            return
        written = tuple(
            (span.pool, unit, self._pools.read_unit(span.pool, unit))
            for span in spans
            if span.pool in LEADER_POOLS
            for unit in span.units
        )
        self._handed_over = True
        self._group.order(orders.SubmitChunk(self.number, tuple(spans), last, written))
        self._sender.submit(self._pools.here(spans), last=last, ready=ready)


class GroupReceiver(GroupRoom):
    """A receiver of all ranks at once."""

    def __init__(self, group: Group, local: KVReceiver, pools: Pools) -> None:
        super().__init__(group, local, pools)
        self._receiver = local

    def publish(self, spans: Sequence[Span], *, token_count: int) -> None:
        self._handed_over = True
        self._group.order(orders.Publish(self.number, tuple(spans), token_count))
        self._receiver.publish(self._pools.here(spans), token_count=token_count)


class GroupManager:
    """A :class:`kvbaton.engines.port.Manager` over all ranks."""

    def __init__(self, manager: KVManager, group: Group, pools: Pools) -> None:
        self.wakeup = group.wakeup
        self._manager = manager
        self._group = group
        self._pools = pools

    def sender(self, room: int) -> GroupSender:
        sender = GroupSender(self._group, self._manager.sender(room), self._pools)
        sender.begin("source", ())
        return sender

    def receiver(self, room: int, sources: Sequence[str]) -> GroupReceiver:
        receiver = GroupReceiver(self._group, self._manager.receiver(room, sources), self._pools)
        receiver.begin("target", sources)
        return receiver

"""The transport at work: tables of each peer, writes that wait, are in flight or broken, fences, and what was seen.

The rule of the data plane: a write that was posted may touch memory on both sides until it is DONE or its peer is
fenced. So a broken write keeps its staging slot, a fence that fails is tried again, and only what a fence or a settled
write proves is told to the core. Agents that are replaced to stop a write have new metadata, which is told as well:
peers that write to this rank have to know it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence

from kvbaton.errors import DisconnectedError, InternalError, KVBatonError, TransportError
from kvbaton.layout import Region
from kvbaton.plan.staging import StagingPool
from kvbaton.protocol.effects import CancelWrites, PostWrite, PreparePeer, Scatter
from kvbaton.protocol.events import (
    AgentReplaced,
    Event,
    PeerFenced,
    PeerPrepared,
    PeerQuiesced,
    PeerUnprepared,
    WriteBroken,
    WriteSettled,
    WriteUnderWay,
)
from kvbaton.runtime.guard import Guard
from kvbaton.runtime.posted import PostedWrites
from kvbaton.runtime.posting import PostingQueue, Window
from kvbaton.runtime.staging import StagingDesk
from kvbaton.runtime.tables import PeerTables
from kvbaton.transports.base import Handle, Transport, WriteState

log = logging.getLogger("kvbaton.driver")

#: Bytes of a peer that was stopped by force may sit in our transport's buffers: it is polled at least so long and so
#: often before they count as landed. Only where the target must help writes to land.
QUIESCE_SECONDS = 0.5
QUIESCE_POLLS = 500
#: How long after a fence that failed it is tried again.
FENCE_AGAIN_SECONDS = 1.0
#: How often the transport is asked for evidence of the path in the life of a rank.
MAX_EVIDENCE_ASKED = 1_000
#: Small writes to one peer go in one post, up to this size: what is first in it is done when all of it is.
JOINED = Window(bytes=1 << 20, entries=4096)


class DataPlane:
    """See the module. Owned by the driver's thread. ``happened`` is told what follows, in order."""

    def __init__(
        self,
        transport: Transport,
        staging: StagingPool,
        window: Window,
        *,
        happened: Callable[[Event], None],
        guard: Guard,
        counters: Counter[str],
        clock: Callable[[], float],
    ) -> None:
        self._transport = transport
        self._happened = happened
        self._guard = guard
        self._counters = counters
        self._clock = clock
        self._staging = StagingDesk(staging)
        self._queue = PostingQueue(window, self._staging.slot_free)
        self._tables = PeerTables(transport)
        self._posted = PostedWrites()
        self._quiescing: dict[str, tuple[float, int]] = {}
        self._to_fence: dict[str, float] = {}
        self._needs_help = transport.capabilities.target_must_progress
        self._generation = transport.generation
        self._closed = False
        self._away = False  # our memory was let go of
        #: How bytes were seen to travel, by peer; filled in after the first writes.
        self.evidence: dict[str, str] = {}

    def sizes(self) -> dict[str, int]:
        return {
            **self._posted.sizes(),
            "staging_slots_taken": len(self._staging),
            "peers_with_tables": len(self._tables),
            "peers_with_evidence": len(self.evidence),
            "peers_posting": len(self._queue),
            "peers_to_fence": len(self._to_fence),
            **{f"transport_{name}": size for name, size in self._transport.sizes().items()},
        }

    @property
    def ready(self) -> bool:
        """A write could be posted now."""
        return self._queue.ready

    @property
    def moving(self) -> bool:
        """Something is under way that tells nobody when it is over."""
        return self._posted.moving or bool(self._quiescing)

    @property
    def quiescing(self) -> bool:
        """Bytes of a peer that was stopped by force are being waited for, turn by turn."""
        return bool(self._quiescing)

    @property
    def target_must_progress(self) -> bool:
        return self._needs_help and not self._closed

    def next_fence(self) -> float | None:
        """When a fence that failed is due again."""
        return min(self._to_fence.values(), default=None)

    def staging_reader(self, slot: int) -> object | None:
        """The write that reads one of our staging slots; None if it is free."""
        return self._staging.reader(slot)

    # ---- writes -------------------------------------------------------------------------------------------------

    def offer(self, write: PostWrite) -> None:
        self._queue.offer(write)

    def cancel(self, effect: CancelWrites) -> None:
        for write in self._queue.cancel(effect.writes):
            self._happened(WriteSettled(write))

    def post_one(self) -> bool:
        """One post a turn: it may copy its bytes itself, and messages must not wait for all of them.

        Returns whether there was one.
        """
        write = self._queue.take()
        if write is None:
            return False
        writes: tuple[PostWrite, ...] = (write,)
        try:
            if write.staged is None:
                table = self._tables.direct(write)
                along = self._queue.take_along(write, lambda other: self._tables.direct(other) == table, JOINED)
                writes = (write, *along)
                entries = self._tables.entries(writes)
            else:
                table = self._tables.staged(write)
                entries = self._staging.gather(write)
            handle = self._transport.post(table, *entries)
        except TransportError as error:
            self._break(writes, error)
            return True
        except Exception as error:
            self._break(writes, unforeseen("posting a write", error, write.peer))
            raise
        size = sum(one.bytes for one in writes)
        self._counters["posts"] += 1
        self._counters["writes_posted"] += len(writes)
        self._counters["bytes_posted"] += size
        self._counters["entries_posted"] += len(entries[0])
        if write.staged is not None:
            self._counters["writes_staged"] += 1
            self._counters["bytes_staged"] += size
        self._posted.begun(handle, writes)
        if not self._check(handle, writes):
            for one in writes:
                self._happened(WriteUnderWay(one.write))
        return True

    def poll_writes(self) -> bool:
        """Look after every post in flight. Returns whether one has ended."""
        return sum(self._check(handle, writes) for handle, writes in self._posted.in_flight()) > 0

    def _check(self, handle: Handle, writes: tuple[PostWrite, ...]) -> bool:
        """Returns whether it has ended."""
        state = WriteState.BROKEN
        try:
            state = self._transport.poll(handle)
        except Exception as error:  # noqa: BLE001 - the writes behind it must be looked after as well
            self._guard.failed(error)
        if state is WriteState.PENDING:
            return False
        self._posted.ended(handle)
        peer = writes[0].peer
        if state is WriteState.DONE:
            for write in writes:
                self._queue.settled(write)
                self._staging.settled(write)
                self._happened(WriteSettled(write.write))
            if not self.evidence.get(peer):
                self._guard.attempt(lambda: self._note_evidence(peer))
        else:
            self._break(writes, DisconnectedError("a write broke on the wire", peer=peer))
        self._guard.attempt(lambda: self._transport.release(handle))
        return True

    def _break(self, writes: tuple[PostWrite, ...], error: KVBatonError) -> None:
        """Until its peer is fenced they may still be read from here."""
        for write in writes:
            self._queue.settled(write)
            self._posted.broke(write)
            self._happened(WriteBroken(write.write, error))

    def _note_evidence(self, peer: str) -> None:
        """Ask the transport how the bytes went, until it knows or has been asked often enough."""
        if self._counters["evidence_asked"] < MAX_EVIDENCE_ASKED:
            self._counters["evidence_asked"] += 1
            self.evidence[peer] = self._transport.evidence(peer)

    def scatter(self, effect: Scatter) -> None:
        self._staging.scatter(effect)

    def progress(self) -> None:
        self._transport.progress()

    # ---- peers --------------------------------------------------------------------------------------------------

    def prepare(self, effect: PreparePeer) -> None:
        """Make a peer's memory reachable, in place of what was known of it."""
        try:
            self._transport.connect(effect.peer, effect.metadata)
            self._tables.prepare(effect)
        except TransportError as error:
            log.warning("cannot prepare %s: %s", effect.peer, error)
            self._happened(PeerUnprepared(effect.peer, error))
        else:
            self._happened(PeerPrepared(effect.peer))

    def fence(self, peer: str) -> None:
        """Cut a peer off from our writes, at once if that is possible."""
        self._to_fence[peer] = self._clock()
        self.fence_due()

    def fence_due(self) -> None:
        """Fence who is to be fenced; again and again until it is done, since only that frees what they hold."""
        for peer, when in list(self._to_fence.items()):
            if when <= self._clock():
                self._to_fence[peer] = self._clock() + FENCE_AGAIN_SECONDS
                self._fence(peer)

    def _fence(self, peer: str) -> None:
        self._transport.fence(peer)
        del self._to_fence[peer]
        self._queue.drop_peer(peer)
        self._tables.drop(peer)
        self.evidence.pop(peer, None)
        for write in self._posted.drop(peer):
            self._staging.settled(write)
        self._counters["peers_fenced"] += 1
        self._happened(PeerFenced(peer))

    def quiesce(self, peer: str) -> None:
        self._quiescing[peer] = (self._clock() + QUIESCE_SECONDS, QUIESCE_POLLS)

    def poll_quiescing(self) -> None:
        for peer, (until, polls) in list(self._quiescing.items()):
            if self.target_must_progress and (polls > 0 or self._clock() < until):
                self._transport.progress()
                self._quiescing[peer] = (until, polls - 1)
            else:
                del self._quiescing[peer]
                self._happened(PeerQuiesced(peer))

    def register(self, regions: Sequence[Region]) -> None:
        """Memory is back; peers are told with the next look at the agent. Idempotent. Raises TransportError."""
        if self._away:
            self._transport.register(regions)
            self._away = False

    def deregister(self) -> None:
        """Memory goes for a while; nothing may be in flight. Idempotent. Raises TransportError."""
        if not self._away:
            self._transport.deregister()
            self._away = True

    def look_at_agent(self) -> None:
        """Tell it where the transport has replaced its agent: what peers know of us holds no more."""
        if not self._away and self._generation != self._transport.generation:
            metadata = self._transport.metadata()
            self._generation = self._transport.generation
            self._counters["agents_replaced"] += 1
            self._happened(AgentReplaced(metadata))

    def close(self) -> None:
        """Destroy the transport: no write of ours reads local memory any more. Writes of peers may still land: the
        kernel copies between processes without asking for the agent of the one that is written to."""
        self._closed = True
        self._transport.close()
        for peer in dict.fromkeys([*self._to_fence, *(write.peer for write in self._posted)]):
            self._posted.drop(peer)
            self._happened(PeerFenced(peer))
        self._to_fence.clear()


def unforeseen(doing: str, error: Exception, peer: str) -> InternalError:
    """What the core is told of a failure that no contract mentions."""
    return InternalError(f"{doing} failed: {error}; the log of this rank has more", peer=peer)

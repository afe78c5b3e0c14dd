"""The connector's half in a worker: one manager, a sender or receiver for each request. Nothing here waits.

What vLLM is told is told exactly once and never early: a receive is reported when its room has ended and no write can
touch its blocks (:meth:`kvbaton.KVManager.take_finished`), a prefill request as soon as nothing reads its blocks any
more (``take_freed``), and not before the scheduler half has said that vLLM waits for it. One exception: with quarantine
a failed receive is reported at once, and :meth:`WorkerHalf.leased` names it until its blocks are free.

**Chunks are held back** until decode has opened the room, or the last one has come. A preemption then costs nothing as
long as nothing was submitted: the chunks are forgotten and computed again. Afterwards they are withdrawn: the step
waits until the writes that are out have read the blocks; what has arrived stays, the rest is sent from other blocks
once it is computed again. A room that the router minted is offered as soon as its request has come, and the scheduler
half hears when decode has opened it. A room that prefill minted is not known to anybody before prefill's answer, so it
is offered in the step that computes the last chunk, before the forward pass: no rank can finish that pass, and let the
answer out, before all have begun it, so none is asked for a room that it does not have yet.

**Layers go ahead of their chunk** where nothing is held back, each as soon as vLLM has computed it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvbaton.engines.port import Fence, RankManager, RankSender, Receiver, Sender
from kvbaton.engines.vllm.orders import Blocks, Chunk, Decline, Drop, Expect, Orders, Receive, Results
from kvbaton.engines.vllm.tally import Tally
from kvbaton.errors import DeclinedError, KVBatonError, LocalProtocolError

if TYPE_CHECKING:
    from kvbaton import Finished, Span

logger = logging.getLogger("vllm.kvbaton")  # vLLM prints what is below its own name

#: How long a step that computes nothing waits for news, in seconds: vLLM would step on without a pause.
IDLE_SECONDS = 0.002
#: How long vLLM waits, at most, for writes that read the blocks of preempted requests; then their rooms are given up.
SETTLE_SECONDS = 1.0
#: Rooms of which prefill is told before vLLM has blocks for them; a longer queue's have their turn.
MAX_EXPECTED = 4_096


@dataclass(slots=True, eq=False)
class Sending:
    """One prefill request. ``awaited``: vLLM waits for its blocks; ``ended``: nothing reads them any more."""

    request: str
    room: int
    held: list[Chunk] = field(default_factory=list)
    sender: RankSender | None = None
    submitted: bool = False
    awaited: bool = False
    ended: bool = False


@dataclass(slots=True, eq=False)
class Receiving:
    """One room of decode. ``order``: None until vLLM has blocks for it; ``told``: vLLM has heard that it failed, its
    blocks are in quarantine. A room that fails before it has blocks is kept until vLLM has some, and fails then."""

    sources: tuple[str, ...]
    receiver: Receiver
    order: Receive | None = None
    given_up: bool = False
    told: bool = False

    @property
    def request(self) -> str:
        """The vLLM request that has the blocks."""
        return self.order.request if self.order is not None else ""


class WorkerHalf:
    """See the module.

    Args:
        manager: this rank's.
        units: the manager's units for vLLM's blocks.
        clock: seconds, monotonic.
        clear: called before blocks are granted, to clear what prefill will not write of them.
        quarantine: report a failed receive before its blocks are free.
    """

    def __init__(
        self,
        manager: RankManager,
        *,
        units: Callable[[Blocks], Span],
        clear: Callable[[Blocks], None] = lambda _: None,
        quarantine: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._manager = manager
        self._clock = clock
        self._units = units
        self._clear = clear
        self._quarantine = quarantine
        self._sends: dict[str, Sending] = {}
        self._unmet: dict[str, Sending] = {}
        self._met: set[str] = set()
        self._receives: dict[int, Receiving] = {}
        self._granted: dict[str, int] = {}  # request → the room that its blocks are granted to
        self._results = Results()
        self._leased: set[str] = set()
        self._leases_changed = False
        self._agreed: set[tuple[str, ...]] = set()
        self._ahead: dict[str, tuple[Span, ...]] = {}  # of the chunks of this step, by request
        self.tally = Tally()

    def preempt(self, orders: Orders) -> None:
        """Before vLLM computes into the blocks of these requests: nothing reads them any more, or only a write of a
        room that has failed, whatever that carries."""
        reading = []
        for request in orders.preempted:
            send = self._sends.get(request)
            if send is None or send.ended:
                continue
            send.held.clear()
            if send.submitted and send.sender is not None and send.sender.withdraw():
                reading.append(send.sender)
        until = self._clock() + SETTLE_SECONDS if reading else 0.0
        while reading := [sender for sender in reading if not sender.settled]:
            left = until - self._clock()
            if left <= 0:
                break
            self._manager.wait(left)
        for sender in reading:
            sender.abort(f"prefill preempted the request, and its blocks were still read after {SETTLE_SECONDS:g} s")

    def begin(self, orders: Orders) -> None:
        """Before the forward pass."""
        for offer in orders.offer:
            self._open(self._sends.setdefault(offer.request, Sending(offer.request, offer.room)))
        for expect in orders.expect:
            self._expect(expect)
        for request, reason in orders.refuse:
            logger.error("request %s receives nothing: %s", request, reason)
            self._failed(request, "refused")
        for receive in orders.receive:
            self._receive(receive)
        for decline in orders.decline:
            self._decline(decline)
        for request in orders.give_up:
            room = self._granted.get(request)
            record = self._receives.get(room) if room is not None else None
            if record is not None:
                record.given_up = True
                record.receiver.abort("the decode request was aborted")
        for drop in orders.drop:
            self._drop(drop)

    @property
    def holding(self) -> bool:
        """Whether chunks of former steps are held back."""
        return any(send.held for send in self._sends.values())

    def sends_ahead(self, orders: Orders) -> bool:
        """Whether layers of this step's chunks may go as they are computed."""
        return any(self._open_to(chunk) is not None for chunk in orders.chunks)

    def layer_done(self, orders: Orders, layer: int, fence: Fence) -> None:
        """Within the forward pass: ``layer`` (its absolute id) of this step's chunks is computed, and in memory once
        ``fence`` is ready. States go with the whole chunk, which :meth:`end` submits."""
        for chunk in orders.chunks:
            sender = self._open_to(chunk)
            if sender is None:
                continue
            spans = self._ahead.get(chunk.request)
            if spans is None:
                spans = tuple(self._units(blocks) for blocks in chunk.blocks if blocks.stop)
                self._ahead[chunk.request] = spans
            if not spans:
                continue
            try:
                self._sends[chunk.request].submitted = True
                sender.submit(spans, layers=(layer, layer + 1), last=False, ready=fence)
            except KVBatonError as error:
                sender.fail(error)

    def _open_to(self, chunk: Chunk) -> Sender | None:
        """The sender of a chunk whose layers may go: decode has opened the room, and has all chunks before."""
        send = self._sends.get(chunk.request)
        if send is None or send.held or send.ended or send.sender is None or not _opened(send.sender):
            return None
        return send.sender

    def end(self, orders: Orders, fence: Fence | None) -> None:
        """After the forward pass; ``fence`` is ready once what it computed is in memory, and may be left out where
        there is nothing to submit."""
        self._ahead.clear()
        for chunk in orders.chunks:
            self._hold(chunk)
        for request in orders.report:
            self._await(request)
        if fence is not None:
            for send in [send for send in self._sends.values() if send.held]:
                self._submit(send, fence)

    def _expect(self, expect: Expect) -> None:
        if expect.room in self._receives or len(self._receives) >= MAX_EXPECTED:
            return
        try:
            self._announce(expect.room, expect.sources, begun=expect.begun)
        except KVBatonError as error:  # said when the room's turn has come
            logger.debug("room %d is not announced to its prefill: %s", expect.room, error)

    def _announce(self, room: int, sources: tuple[str, ...], *, begun: bool) -> Receiving:
        receiver = self._manager.receiver(room, sources, begun=begun, tag=room)
        record = self._receives[room] = Receiving(sources, receiver)
        return record

    def _receive(self, order: Receive) -> None:
        record = self._receives.get(order.room)
        try:
            if record is None:
                record = self._announce(order.room, order.sources, begun=order.begun)
            if record.sources != order.sources:
                raise LocalProtocolError(f"the room is filled from {', '.join(record.sources)}", room=order.room)
            if record.receiver.error is not None:
                raise record.receiver.error
        except KVBatonError as error:
            if record is not None:
                del self._receives[order.room]
                record.receiver.fail(error)
            logger.error("request %s, room %d: %s", order.request, order.room, error)
            self._failed(order.request, error.code)
            return
        record.order, receiver = order, record.receiver
        self._granted[order.request] = order.room
        try:
            for blocks in order.blocks:
                self._clear(blocks)
            receiver.publish([self._units(blocks) for blocks in order.blocks], token_count=order.tokens)
        except KVBatonError as error:
            receiver.fail(error)

    def _decline(self, order: Decline) -> None:
        record = self._receives.pop(order.room, None)
        if record is not None:
            record.receiver.fail(DeclinedError(order.reason, room=order.room))
            return
        try:
            self._manager.decline(order.room, order.sources, order.reason)
        except KVBatonError as error:
            logger.warning("room %d cannot be declined, its prefill frees it in its own time: %s", order.room, error)

    def _failed(self, request: str, code: str) -> None:
        """A request of which no room was opened here."""
        self._results.received.add(request)
        self._results.failed.add(request)
        self.tally.received(code, handoff_seconds=0, exposed_seconds=0, size=0)

    def _hold(self, chunk: Chunk) -> None:
        send = self._sends.get(chunk.request)
        if send is None:
            send = self._sends[chunk.request] = Sending(chunk.request, chunk.room)
        if not send.ended and not (send.sender is not None and send.sender.error is not None):
            send.held.append(chunk)

    def _submit(self, send: Sending, fence: Fence) -> None:
        if send.sender is None or send.ended or not (send.held[-1].last or _opened(send.sender)):
            return
        try:
            for chunk in send.held:
                send.submitted = True
                send.sender.submit([self._units(blocks) for blocks in chunk.blocks], last=chunk.last, ready=fence)
        except KVBatonError as error:
            send.sender.fail(error)
        send.held.clear()

    def _open(self, send: Sending) -> None:
        self._unmet[send.request] = send
        try:
            send.sender = self._manager.sender(send.room, tag=send)
        except KVBatonError as error:
            logger.error("request %s, room %d is not handed over: %s", send.request, send.room, error)
            self.tally.sent(error.code)
            self._sent(send)

    def _await(self, request: str) -> None:
        send = self._sends.get(request)
        if send is None:  # vLLM computed nothing of it here
            self._results.sent.add(request)
            return
        send.awaited = True
        if send.ended:
            self._sent(send)

    def _drop(self, drop: Drop) -> None:
        send = self._sends.get(drop.request)
        if send is None:
            return
        send.held.clear()
        send.awaited = drop.report
        if send.sender is not None and not send.ended:
            send.sender.abort(drop.reason)
        else:
            self._sent(send)
        if not drop.report:
            self._sends.pop(drop.request, None)

    def _sent(self, send: Sending) -> None:
        """Nothing reads the blocks any more; vLLM hears it if it waits for it, now or when it does."""
        send.ended = True
        send.held.clear()
        if send.awaited:
            self._results.sent.add(send.request)
            self._sends.pop(send.request, None)

    def results(self, *, idle: bool = False) -> Results:
        """What vLLM has to hear now."""
        if idle and not self._any_news():
            self._manager.wakeup.wait(IDLE_SECONDS)
        if self._manager.wakeup.is_set():
            self._manager.wakeup.clear()
            self._meet()
        for freed in self._manager.take_freed():
            if freed.role == "source":  # decode may still have to confirm
                self._sent(freed.tag)
        for finished in self._manager.take_finished():
            if finished.role == "source":
                self._count_sent(finished)
            elif finished.tag is not None:
                self._tell_received(finished.tag, finished)
        if self._quarantine:
            self._fail_early()
        results, self._results = self._results, Results()
        return results

    def _meet(self) -> None:
        """Note for which rooms decode has blocks now."""
        for request, send in list(self._unmet.items()):
            if send.ended or (send.sender is not None and (send.sender.error is not None or _opened(send.sender))):
                del self._unmet[request]
                self._met.add(request)

    def _any_news(self) -> bool:
        results = self._results
        return bool(results.sent or results.received or self._manager.wakeup.is_set())

    def _count_sent(self, finished: Finished) -> None:
        error = finished.error
        self.tally.sent(error.code if error is not None else "success")
        if error is not None and not isinstance(error, DeclinedError):
            logger.warning("request %s was not handed over: %s", finished.tag.request, error)

    def _tell_received(self, room: int, finished: Finished) -> None:
        record, error = self._receives.get(room), finished.error
        if record is None or record.order is None:  # vLLM hears of it when the room's turn has come
            return
        del self._receives[room], self._granted[record.request]
        if record.told:
            logger.warning("request %s: no write can touch its blocks any more", record.request)
            self._leased.discard(record.request)
            self._leases_changed = True
            return
        self.tally.received(
            error.code if error is not None else "success",
            handoff_seconds=finished.handoff_seconds,
            exposed_seconds=finished.exposed_seconds,
            size=finished.bytes,
        )
        self._results.received.add(record.request)
        if error is not None:
            logger.log(logging.INFO if record.given_up else logging.ERROR, "request %s: %s", record.request, error)
            self._results.failed.add(record.request)
        elif record.order.sources not in self._agreed:
            self._agreed.add(record.order.sources)
            logger.info("receives from %s", ", ".join(record.order.sources))

    def _fail_early(self) -> None:
        for record in self._receives.values():
            receiver = record.receiver
            if record.order is None or record.told or record.given_up or receiver.error is None or receiver.released:
                continue
            record.told = True
            self._leased.add(record.request)
            self._leases_changed = True
            self._failed(record.request, receiver.error.code)
            logger.error("request %s: %s; its blocks are kept aside", record.request, receiver.error)

    def leased(self) -> frozenset[str] | None:
        """Requests that were reported as failed while a write may still touch their blocks; None: nothing new."""
        if not self._leases_changed and not self._leased:
            return None
        self._leases_changed = False
        return frozenset(self._leased)

    def met(self) -> frozenset[str]:
        """Requests of prefill whose room decode has opened, or that have ended; each is told once."""
        met = frozenset(self._met)
        self._met.clear()
        return met

    @property
    def busy(self) -> bool:
        """Whether any request of vLLM is remembered here."""
        return bool(self._sends or self._receives or self._leased)

    def gauges(self) -> dict[str, int]:
        return {"live_rooms": self._manager.live_rooms, "quarantined_rooms": self._manager.quarantined_rooms}


def _opened(sender: Sender) -> bool:
    from kvbaton import KVPoll

    return sender.poll() in (KVPoll.WaitingForInput, KVPoll.Transferring)


def unit_maker(pages: Iterable[tuple[str, int, int]]) -> Callable[[Blocks], Span]:
    """Turns vLLM's blocks into the layout's units. ``pages``: (pool, tokens of a block, tokens of a unit); a block of
    B tokens may be B/N units of N tokens, neighbours in memory."""
    from kvbaton import Span

    sizes = {pool: (block, unit) for pool, block, unit in pages}

    def units(blocks: Blocks) -> Span:
        block, unit = sizes.get(blocks.pool, (1, 1))
        if block == unit or blocks.stop == 0:
            return Span(blocks.pool, blocks.start, blocks.stop, blocks.ids)
        each, first = block // unit, blocks.start // block
        found = (
            blocks.ids[page // each - first] * each + page % each
            for page in range(blocks.start // unit, -(-blocks.stop // unit))
        )
        return Span(blocks.pool, blocks.start, blocks.stop, tuple(found))

    return units

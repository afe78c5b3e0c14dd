"""A rank that follows: it does what the leader orders, in that order, and reports how its rooms fare.

Rules: it decides nothing and never waits for news but at its pipe; a second thread reports. A failed forward pass or
room is reported, not raised; what it cannot report ends it. When the leader is gone it ends.

This file must not know of HTTP, requests or schedulers.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection

from kvbaton.errors import InternalError, KVBatonError, LocalProtocolError
from kvbaton.manager import KVManager, KVPoll, KVReceiver, KVSender, Span
from kvbaton.serving.engine import orders
from kvbaton.serving.engine.ahead import Ahead
from kvbaton.serving.engine.cache import Extent
from kvbaton.serving.engine.pipe import Pipe
from kvbaton.serving.engine.pool import BlockTable, Pools
from kvbaton.serving.engine.runner import ModelRunner

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _FollowerRoom:
    """A sender or receiver of this rank, what was last reported of it, and what kept it from being made."""

    end: KVSender | KVReceiver | None
    reported: orders.RankStatus | None = None
    error: KVBatonError | None = None

    def status(self, number: int) -> orders.RankStatus:
        end = self.end
        if end is None or self.error is not None:
            leased = end.leased if end is not None else False
            return orders.RankStatus(number, KVPoll.Failed, leased, error=self.error or _UNKNOWN)
        return orders.RankStatus(
            number,
            end.poll(),
            end.leased,
            end.prefix_len if isinstance(end, KVSender) else 0,
            end.bytes,
            end.exposed_seconds,
            end.error,
        )

    @property
    def over(self) -> bool:
        return self.end is None or self.end.released


_UNKNOWN = InternalError("a room could not be opened on this rank")


class Follower:
    """One rank's loop. ``run`` returns when the leader says so or is gone. Without ``manager`` it only computes."""

    def __init__(self, connection: Connection, runner: ModelRunner, pools: Pools, manager: KVManager | None) -> None:
        self._pipe: Pipe[orders.RankOrder] = Pipe(connection, "the leader of this group", orders.RankOrder)
        self._runner = runner
        self._pools = pools
        self._manager = manager
        self._wakeup = manager.wakeup if manager is not None else threading.Event()
        self._sides: dict[int, _FollowerRoom] = {}
        self._stopping = False
        self._reporter = threading.Thread(target=self._report_forever, name="kvbaton-report", daemon=True)

    def run(self) -> None:
        manager = self._manager
        ready = orders.RankReady("", "", "")
        if manager is not None:
            ready = orders.RankReady(manager.instance, manager.address, manager.layout.digest(), manager.layout)
        self._pipe.send(ready)
        self._reporter.start()
        try:
            while True:
                order = self._pipe.recv()
                if order is None:
                    logger.info("the leader of this group has gone")
                    return
                if isinstance(order, orders.Stop):
                    return
                self._do(order)
        finally:
            self._stopping = True
            self._wakeup.set()
            self._reporter.join()
            self._pipe.release()

    def _do(self, order: orders.RankOrder) -> None:
        if isinstance(order, orders.Forward):
            self._compute(order)
        elif isinstance(order, orders.Copy):
            self._copy(order)
        elif isinstance(order, orders.Begin):
            self._begin(order)
        elif isinstance(order, orders.Publish | orders.SubmitChunk | orders.Fail):
            side = self._sides.get(order.side)
            if side is None or side.end is None:
                return
            try:
                self._change(side.end, order)
            except KVBatonError as error:
                side.error = error
                side.end.fail(error)
                self._wakeup.set()

    def _compute(self, order: orders.Forward) -> None:
        extents = [
            Extent(BlockTable(request.pages, request.ring, request.state), request.cached, len(request.tokens))
            for request in order.requests
        ]
        try:
            tokens = [list(request.tokens) for request in order.requests]
            ahead = self._ahead(*order.ahead) if order.ahead is not None else None
            self._runner.forward(tokens, extents, ahead, every=order.every)
        except KVBatonError as error:  # the leader has failed on the same input, or hears from its own collective
            logger.warning("%s", error)

    def _ahead(self, number: int, spans: tuple[Span, ...]) -> Ahead | None:
        """Where this rank's layers of a pass go."""
        side, here = self._sides.get(number), tuple(self._pools.here(spans))
        return Ahead(side.end, here) if here and side is not None and isinstance(side.end, KVSender) else None

    def _copy(self, order: orders.Copy) -> None:
        try:
            self._runner.copy(order.copies)
        except KVBatonError as error:  # as above
            logger.warning("%s", error)

    def _begin(self, order: orders.Begin) -> None:
        manager = self._manager
        try:
            if manager is None:
                raise LocalProtocolError("this rank hands nothing over")
            end: KVSender | KVReceiver = (
                manager.sender(order.room) if order.role == "source" else manager.receiver(order.room, order.sources)
            )
        except KVBatonError as error:
            self._sides[order.side] = _FollowerRoom(None, error=error)
        else:
            self._sides[order.side] = _FollowerRoom(end)
        self._wakeup.set()

    def _change(self, end: KVSender | KVReceiver, order: orders.Publish | orders.SubmitChunk | orders.Fail) -> None:
        if isinstance(order, orders.Fail):
            end.fail(order.error)
        elif isinstance(order, orders.SubmitChunk) and isinstance(end, KVSender):
            for pool, unit, data in order.written:
                self._pools.write_unit(pool, unit, data)
            end.submit(self._pools.here(order.spans), last=order.last, ready=self._runner.fence())
        elif isinstance(order, orders.Publish) and isinstance(end, KVReceiver):
            end.publish(self._pools.here(order.spans), token_count=order.token_count)

    def _report_forever(self) -> None:
        """The second thread: news of rooms as they come."""
        try:
            while not self._stopping:
                self._wakeup.wait()
                self._wakeup.clear()
                for number, side in list(self._sides.items()):
                    over = side.over  # asked first: what is over does not change any more
                    status = side.status(number)
                    if status != side.reported:
                        side.reported = status
                        self._pipe.send(status)
                    if over:
                        self._sides.pop(number, None)
        except InternalError as error:
            logger.info("%s", error)

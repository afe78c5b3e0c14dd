"""A data-parallel rank in its own process: it does what the server orders, and passes on what its engine says.

Rules: what it refuses is an output with the reason. It ends when it is ordered to, when the server is gone, or when its
engine or a rank of its group is lost: without it the server cannot serve.

This file must not know of HTTP, or of the other data-parallel ranks.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

from kvbaton.errors import InternalError, KVBatonError
from kvbaton.serving.engine.orders import (
    EndAll,
    EndRequest,
    HandOn,
    ReplicaAnswer,
    ReplicaOrder,
    ReplicaOutput,
    ReplicaQuery,
    ReplicaReady,
    Stop,
    SubmitRequest,
)
from kvbaton.serving.engine.pipe import Pipe
from kvbaton.serving.engine.request import Output
from kvbaton.serving.server.replica import Replica

#: How often a rank that nobody asks anything looks after its engine.
LOOK_SECONDS = 1.0
logger = logging.getLogger(__name__)


class ReplicaProcess:
    """The loop of one rank; ``run`` returns when it is to end. Raises KVBatonError for what it was lost of."""

    def __init__(self, connection: Connection, replica: Replica) -> None:
        self._pipe: Pipe[ReplicaOrder] = Pipe(connection, "the server", ReplicaOrder)
        self._replica = replica
        self._lost: KVBatonError | None = None
        self._answering = ThreadPoolExecutor(1, "kvbaton-answers")

    def run(self) -> None:
        try:
            self._serve()
        finally:
            self._pipe.release()

    def _serve(self) -> None:
        self._replica.watch(self._lose)
        self._pipe.send(ReplicaReady(tuple(self._replica.routes), tuple(self._replica.layouts)))
        while True:
            broken = self._lost or self._replica.failure
            if broken is not None:
                raise broken.again()
            if not self._pipe.waits(LOOK_SECONDS):
                continue
            order = self._pipe.recv()
            if order is None or isinstance(order, Stop):
                return
            self._do(order)

    def _lose(self, error: KVBatonError) -> None:
        self._lost = error

    def _do(self, order: SubmitRequest | EndRequest | HandOn | EndAll | ReplicaQuery) -> None:
        if isinstance(order, EndRequest):
            self._replica.abort(order.request_id, order.reason)
        elif isinstance(order, HandOn):
            self._replica.hand_on(order.request_ids, order.room)
        elif isinstance(order, EndAll):
            self._replica.end_all(order.error)
        elif isinstance(order, ReplicaQuery):
            self._answering.submit(self._answer, order)
        else:
            request_id = order.request.request_id
            try:
                self._replica.submit(order.request, lambda output: self._send_output(request_id, output))
            except KVBatonError as error:
                self._send_output(request_id, Output(error=error))

    def _answer(self, query: ReplicaQuery) -> None:
        """On a thread of its own: it may wait, and requests must not."""
        try:
            if query.room is not None:
                answer = ReplicaAnswer(query.number, events=tuple(self._replica.timeline(query.room)))
            else:
                answer = ReplicaAnswer(query.number, stats=self._replica.stats(), handoffs=self._replica.handoffs())
        except KVBatonError as error:
            answer = ReplicaAnswer(query.number, error=error)
        self._send(answer)

    def _send_output(self, request_id: str, output: Output) -> None:
        """On the engine's thread, too."""
        self._send(ReplicaOutput(request_id, output))

    def _send(self, report: ReplicaOutput | ReplicaAnswer) -> None:
        try:
            self._pipe.send(report)
        except InternalError as error:  # the loop finds the pipe broken as well
            logger.debug("%s", error)

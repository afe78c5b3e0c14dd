"""The connector's half in vLLM's scheduler: rooms, counts and block ids. No socket, no memory, no thread, no clock.

A request of **prefill** goes through :class:`Prefill`: its chunks leave in the order in which they are computed, each
with the blocks that the table names in that step; when it has finished, its blocks are pinned until the workers report
that nothing reads them. A request of **decode** goes through :class:`Decode`: it is parked once, for what prefill has
and we have not; when it comes back, with success or not, it is like any other.

One room serves one request. The others that name it (siblings of ``n`` above 1, a retry, the aborted twin that vLLM's
API server sends when a call ends without a result) never open it again: siblings wait until the first has arrived and
find its blocks in the prefix cache, whoever comes later computes.

Either leg may have to wait for blocks, here or there (``admission``). The workers hear of a room before: prefill's
offer it, so that decode can open it, decode's say that it is wanted, so that prefill keeps it however long decode's
queue is. An engine of both roles does not: its queue may be what prefill waits for.

vLLM asks :meth:`SchedulerHalf.matched` again and again; it changes nothing. Everything a client sent is judged when the
request arrives. A leg that cannot be used is parked all the same and then refused by the workers, so that vLLM's
``kv_load_failure_policy`` decides what becomes of it, as of every other failure.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kvbaton.engines.vllm.admission import Admission
from kvbaton.engines.vllm.groups import CacheGroups, Table
from kvbaton.engines.vllm.orders import Chunk, Decline, Drop, Expect, Offer, Orders, Receive
from kvbaton.engines.vllm.params import DecodeLeg, answer, decode_leg, mint_room, prefill_leg
from kvbaton.engines.vllm.quarantine import Quarantine
from kvbaton.errors import ConfigError, LayoutError

logger = logging.getLogger("vllm.kvbaton")  # vLLM prints what is below its own name

#: Rooms that are remembered, so that none is opened twice.
MAX_USED_ROOMS = 65_536
#: How vLLM calls the end of a request that has its answer.
COMPLETED = ("FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED")


class Request(Protocol):
    """What is used of vLLM's request."""

    request_id: str
    kv_transfer_params: dict[str, Any] | None
    num_prompt_tokens: int
    num_tokens: int
    num_computed_tokens: int
    status: Any


@dataclass(slots=True)
class Prefill:
    """``sent``: tokens in chunks that have left; ``begun``: some have, be they forgotten since; ``offered``: the room
    is known to the workers."""

    room: int
    tokens: int
    sent: int = 0
    offered: bool = False
    begun: bool = False

    @property
    def complete(self) -> bool:
        return self.sent == self.tokens


@dataclass(slots=True)
class Decode:
    """``leg`` is None where what the client sent cannot be used, ``error`` says why; ``decided``: the room was opened,
    declined or refused; ``parked``: vLLM waits for it."""

    leg: DecodeLeg | None
    error: str = ""
    decided: bool = False
    parked: bool = False


class SchedulerHalf:
    """See the module.

    Args:
        groups: the cache's groups.
        produces, consumes: whether this engine prefills for others, decodes what others prefilled.
        group: the engine's id; ``tp_size``: its ranks.
        admission: which requests may take blocks.
        recomputes_all: whether vLLM will not use any cache for a request (it wants logprobs of the prompt).
        shorten: takes so many tokens off the end of a request's prompt.
    """

    def __init__(
        self,
        groups: CacheGroups,
        *,
        produces: bool,
        consumes: bool,
        group: str,
        tp_size: int = 1,
        admission: Admission | None = None,
        recomputes_all: Callable[[Request], bool] = lambda _: False,
        shorten: Callable[[Request, int], bool] = lambda _request, _tokens: True,
    ) -> None:
        self._groups = groups
        self._produces = produces
        self._consumes = consumes
        self._group = group
        self._tp_size = tp_size
        self._admission = admission if admission is not None else Admission()
        self._recomputes_all = recomputes_all
        self._shorten = shorten
        self._sources: tuple[str, ...] = ()
        self._prefills: dict[str, tuple[Request, Prefill]] = {}
        self._decodes: dict[str, Decode] = {}
        self._used: OrderedDict[int, str | None] = OrderedDict()  # room → the request that waits for it now
        self._rooms: dict[str, int] = {}  # that request → room
        self._orders = Orders()
        self.quarantine = Quarantine()

    def set_sources(self, addresses: Sequence[str]) -> None:
        """The control addresses of all our ranks."""
        self._sources = tuple(addresses)

    def add(self, request: Request) -> None:
        """A request has arrived."""
        params = request.kv_transfer_params
        try:
            prefills = prefill_leg(params)
        except ConfigError as error:
            logger.error("request %s cannot be handed over: %s", request.request_id, error)
            return
        if prefills is not None:
            self._add_prefill(request, prefills.room)
            return
        try:
            leg = decode_leg(params)
            if leg is not None and not self._consumes:
                raise ConfigError("this engine receives nothing: its kv_role is kv_producer")
        except ConfigError as error:
            logger.error("request %s receives nothing: %s", request.request_id, error)
            self._decodes[request.request_id] = Decode(None, error.message)
            return
        if leg is None:
            return
        self._decodes[request.request_id] = Decode(leg)
        if not self._produces:
            if leg.room not in self._used:
                self._orders.expect.append(Expect(room=leg.room, sources=leg.sources, begun=leg.begun))
        elif not leg.begun:
            self._admission.add(request.request_id, request.num_tokens, early=False)

    def _add_prefill(self, request: Request, room: int | None) -> None:
        tokens = self._groups.tokens(request.num_prompt_tokens)
        name = request.request_id
        if not self._produces:
            logger.error("request %s is not handed over: this engine's kv_role is kv_consumer", name)
        elif room is not None and any(prefill.room == room for _, prefill in self._prefills.values()):
            logger.error("request %s is not handed over: room %d is live already", name, room)
        elif self._recomputes_all(request):
            logger.info("request %s is not handed over: decode would compute its prompt again", name)
        elif tokens > 0 and self._shorten(request, request.num_prompt_tokens - tokens):
            prefill = Prefill(room if room is not None else mint_room(), tokens)
            self._prefills[name] = request, prefill
            self._admission.add(name, request.num_prompt_tokens, early=room is not None)
            if room is not None:
                self._offer(name, prefill)

    def matched(self, request: Request, computed: int) -> tuple[int | None, bool]:
        """Tokens beyond ``computed`` that can be received, and whether the request is parked for them; None: ask again
        later."""
        if not self._admission.admits(request.request_id):
            return None, False
        decode = self._decodes.get(request.request_id)
        if decode is None or decode.decided:
            return 0, False
        if decode.leg is not None and decode.leg.room in self._used:
            return (None if self._used[decode.leg.room] is not None else 0), False
        missing = self._groups.tokens(request.num_tokens) - computed
        return (missing, True) if missing > 0 else (0, False)

    def allocated(self, request: Request, tables: Sequence[Table], external: int) -> None:
        """vLLM has blocks for the request, and receives ``external`` tokens into them; 0: none, for any reason."""
        self._admission.hold(request.request_id)
        decode = self._decodes.get(request.request_id)
        if decode is None or decode.decided:
            return
        self._decide(request, decode)
        if not external:
            self._admission.end(request.request_id)
        leg = decode.leg
        if leg is None:
            if external:
                decode.parked = True
                self._orders.refuse.append((request.request_id, decode.error))
            return
        if leg.room in self._used:
            return  # a sibling's; whoever opened it has taken what there is
        tokens = self._groups.tokens(request.num_tokens)
        if not external:
            self._decline(leg, "decode has the whole prompt in its cache")
            return
        decode.parked = True
        try:
            blocks = self._groups.grant(tokens - external, tokens, tables)
        except LayoutError as error:
            self._orders.refuse.append((request.request_id, error.message))
            self._decline(leg, error.message)
            return
        self._use(leg.room, request.request_id)
        self._orders.receive.append(
            Receive(
                request=request.request_id,
                room=leg.room,
                sources=leg.sources,
                tokens=tokens,
                begun=leg.begun,
                blocks=blocks,
            )
        )
        self.quarantine.grant(request.request_id, [block for part in blocks for block in part.ids])

    def _decide(self, request: Request, decode: Decode) -> None:
        decode.decided = True
        if request.kv_transfer_params:  # vLLM's own flag: it asks again after a failure or a preemption
            request.kv_transfer_params["do_remote_prefill"] = False

    def _use(self, room: int, request: str | None) -> None:
        self._used[room] = request
        if request is not None:
            self._rooms[request] = room
        if len(self._used) > MAX_USED_ROOMS:
            oldest = next((old for old, owner in self._used.items() if owner is None), None)
            if oldest is not None:
                del self._used[oldest]

    def _decline(self, leg: DecodeLeg, reason: str) -> None:
        """Nothing is wanted of this room: its prefill may free everything."""
        self._use(leg.room, None)
        self._orders.decline.append(Decline(room=leg.room, sources=leg.sources, reason=reason))

    def step(
        self,
        scheduled: Mapping[str, int],
        preempted: Iterable[str],
        tables: Callable[[str], Sequence[Table] | None],
    ) -> Orders:
        """What the workers do in this step; ``scheduled``: tokens that it computes of each request."""
        for request_id in preempted:
            if request_id in self._prefills:
                self._prefills[request_id][1].sent = 0
                self._admission.give_back(request_id)
                self._orders.preempted.append(request_id)
        for request_id in scheduled:
            if request_id in self._prefills:
                self._chunk(request_id, scheduled[request_id], tables)
        orders, self._orders = self._orders, Orders()
        orders.idle = not any(scheduled.values())
        return orders

    def _chunk(self, request_id: str, computing: int, tables: Callable[[str], Sequence[Table] | None]) -> None:
        request, prefill = self._prefills[request_id]
        if prefill.complete:
            return
        stop = min(request.num_computed_tokens + computing, prefill.tokens)
        last = stop == prefill.tokens
        if not last:
            stop = stop // self._groups.granularity * self._groups.granularity
        if stop <= prefill.sent:
            return
        rows = tables(request_id)
        if rows is None:
            logger.error("request %s was scheduled, but vLLM names no blocks of it", request_id)
            return
        if last:
            self._offer(request_id, prefill)
        blocks = self._groups.chunk(prefill.sent, stop, last=last, tables=rows)
        prefill.sent, prefill.begun = stop, True
        self._orders.chunks.append(Chunk(request=request_id, room=prefill.room, last=last, blocks=blocks))

    def _offer(self, request_id: str, prefill: Prefill) -> None:
        if not prefill.offered:
            prefill.offered = True
            self._orders.offer.append(Offer(request=request_id, room=prefill.room))

    def finished(self, request: Request) -> tuple[bool, dict[str, Any] | None]:
        """A request has ended, well or not. Whether its blocks stay until the workers report it, and the answer's
        ``kv_transfer_params``."""
        request_id = request.request_id
        decode = self._decodes.pop(request_id, None)
        if decode is not None:
            self._admission.end(request_id)
            self._finished_decode(request, decode)
            return False, None
        if request_id not in self._prefills:
            return False, None
        _, prefill = self._prefills.pop(request_id)
        if prefill.complete and request.status.name in COMPLETED:
            self._orders.report.append(request_id)
            return True, answer(
                prefill.room,
                self._sources,
                group=self._group,
                request_id=request_id,
                tp_size=self._tp_size,
            )
        if not prefill.begun:
            self._admission.end(request_id)
        if prefill.begun or prefill.offered:
            reason = f"the prefill request ended as {request.status.name}"
            self._orders.drop.append(Drop(request=request_id, reason=reason, report=prefill.begun))
        return prefill.begun, None

    def _finished_decode(self, request: Request, decode: Decode) -> None:
        if decode.parked:
            self._orders.give_up.append(request.request_id)
        elif not decode.decided and decode.leg is not None and decode.leg.room not in self._used:
            self._decide(request, decode)
            self._decline(decode.leg, f"the decode request ended as {request.status.name}")

    def update(
        self,
        received: Iterable[str],
        failed: Iterable[str],
        leased: frozenset[str] | None,
        *,
        met: Iterable[str] = (),
        sent: Iterable[str] = (),
    ) -> None:
        """What the workers have reported, before vLLM acts on it; see :meth:`Quarantine.update`.

        Args:
            met: requests of prefill whose room decode has opened, on any rank, or that have ended.
            sent: requests of prefill whose blocks nothing reads any more.
        """
        received = tuple(received)
        for request_id in met:
            self._admission.meet(request_id)
        for request_id in (*sent, *received):
            self._admission.end(request_id)
        self.quarantine.update(received, failed, leased)
        for request_id in received:
            decode = self._decodes.get(request_id)
            if decode is not None:
                decode.parked = False
            room = self._rooms.pop(request_id, None)
            if room is not None:
                self._used[room] = None

    @property
    def busy(self) -> bool:
        """Steps must go on although no request is live: orders wait, or blocks are kept aside."""
        orders = self._orders
        return bool(
            orders.receive or orders.decline or orders.give_up or orders.drop or orders.report or len(self.quarantine)
        )

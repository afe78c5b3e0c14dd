"""The prefill scheduler: bootstrap queue, chunked prefill, in-flight queue.

Rules: pages are taken only when the target has granted its own (the sender says WaitingForInput), so a prompt nobody
collects holds none. Each chunk is handed over as soon as it is computed and travels while the next one is computed;
its layers go ahead of it, so that those of the last chunk travel while that is computed.
Pages and slot go back when the sender has ended *and* holds no lease; until then the hand-off is ``draining``.

This file must not know of transports, peers' layouts or text.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field

from kvbaton.engines.port import Manager, Sender
from kvbaton.errors import KVBatonError, LocalProtocolError, TransferFailedError
from kvbaton.manager import KVPoll, Span
from kvbaton.serving.engine import aux_row
from kvbaton.serving.engine.adjustment import adjustment_of
from kvbaton.serving.engine.ahead import Ahead
from kvbaton.serving.engine.draining import Draining
from kvbaton.serving.engine.job import Job, for_peer
from kvbaton.serving.engine.limits import limits_of
from kvbaton.serving.engine.model import LoadedModel
from kvbaton.serving.engine.pool import AUX, BlockTable, Pools
from kvbaton.serving.engine.prompt import PromptRun
from kvbaton.serving.engine.prompt_logprobs import checksum
from kvbaton.serving.engine.request import Output
from kvbaton.serving.engine.runner import ModelRunner
from kvbaton.serving.engine.sampling import Draw, Pick, first_tokens
from kvbaton.serving.engine.scheduler import Role, Scheduler, SchedulerConfig
from kvbaton.serving.engine.seed import seed_of, seed_of_choice
from kvbaton.serving.engine.stats import Stats


@dataclass(slots=True, eq=False)
class _Handoff:
    """One prompt on its way. ``sent`` counts tokens submitted, or held by every target already."""

    job: Job
    room: int
    sender: Sender
    block_table: BlockTable | None = None
    slot: int | None = None
    sent: int = 0
    firsts: list[Pick] = field(default_factory=list)


class Prefill(Role):
    """Queues: ``bootstrap`` waits for targets, ``ready`` for pages; then one computes, some are in flight, draining."""

    def __init__(
        self, model: LoadedModel, pools: Pools, manager: Manager, runner: ModelRunner, config: SchedulerConfig
    ) -> None:
        self._model = model
        self._pools = pools
        self._manager = manager
        self._chunk_tokens = config.chunked_prefill_size
        self._runner = runner
        self._bootstrap: list[_Handoff] = []
        self._ready: list[_Handoff] = []
        self._computing: tuple[_Handoff, PromptRun] | None = None
        self._inflight: list[_Handoff] = []
        self._draining = Draining[_Handoff](self._release)

    def add(self, job: Job) -> None:
        room = job.request.room
        try:
            if room is None:
                raise LocalProtocolError("a prefill request has no room")
            sender = self._manager.sender(room)
        except KVBatonError as error:
            job.fail(error)
            return
        self._bootstrap.append(_Handoff(job, room, sender))

    def end(self, job: Job, error: KVBatonError) -> None:
        handoff = next((handoff for handoff in self._live() if handoff.job is job), None)
        if handoff is not None:
            self._end(handoff, Output(error=error), for_peer(error))

    def step(self) -> bool:
        worked = self._drop_failed()
        worked = self._collect() or worked
        worked = self._admit() or worked
        if self._computing is not None:
            self._compute(*self._computing)
            worked = True
        worked = self._conclude() or worked
        return self._draining.reap() or worked

    def _live(self) -> list[_Handoff]:
        computing = self._computing  # read once: stats() comes from other threads
        now = [computing[0]] if computing is not None else []
        return [*self._bootstrap, *self._ready, *now, *self._inflight]

    def _drop_failed(self) -> bool:
        """End what the other side, a deadline or the network has ended."""
        failed = [handoff for handoff in self._live() if handoff.sender.poll() == KVPoll.Failed]
        for handoff in failed:
            error = handoff.sender.error or TransferFailedError("the transfer failed", room=handoff.room)
            self._end(handoff, Output(error=error), error)
        return bool(failed)

    def _collect(self) -> bool:
        """Move those whose targets have granted pages to the ready queue, in order of arrival."""
        granted = [handoff for handoff in self._bootstrap if handoff.sender.poll() == KVPoll.WaitingForInput]
        for handoff in granted:
            self._bootstrap.remove(handoff)
            self._ready.append(handoff)
        return bool(granted)

    def _admit(self) -> bool:
        if self._computing is not None or not self._ready or not self._pools.slots.available:
            return False
        handoff = self._ready[0]
        request = handoff.job.request
        prompt = request.prompt_tokens
        block_table = self._pools.allocate(len(prompt), recorded=request.recorded_tokens)
        if block_table is None:
            return False
        self._ready.pop(0)
        handoff.job.take_up()
        handoff.block_table = block_table
        handoff.slot = self._pools.take_slot()
        handoff.sent = handoff.sender.prefix_len
        self._computing = (handoff, PromptRun(prompt, block_table, request.sampling.prompt_logprobs))
        return True

    def _compute(self, handoff: _Handoff, run: PromptRun) -> None:
        """One chunk: compute it, hand it over; after the last one, the first token of each choice with it."""
        try:
            spans: tuple[Span, ...] = ()

            def ahead_of(stop: int) -> Ahead | None:
                nonlocal spans
                spans = self._unsent(handoff, run, stop)
                return Ahead(handoff.sender, spans) if spans else None

            start = run.computed
            logits = run.advance(self._runner, self._chunk_tokens, self._pools.page_size, ahead_of)
            self._pools.write_records(run.block_table, start, run.records[start : run.computed])
            if run.finished:
                handoff.firsts = self._first_tokens(handoff, logits)
                spans += (self._write_aux(handoff, run),)
            if spans:
                handoff.sender.submit(spans, last=run.finished, ready=self._runner.fence())
        except KVBatonError as error:
            cause = handoff.sender.error or error
            self._end(handoff, Output(error=cause), cause)
            return
        if run.finished:
            self._computing = None
            self._inflight.append(handoff)

    def _unsent(self, handoff: _Handoff, run: PromptRun, stop: int) -> tuple[Span, ...]:
        """The spans of what is neither sent nor held by the targets up to token ``stop``, if there is any; the states
        are final with the last token."""
        start, handoff.sent = handoff.sent, max(handoff.sent, stop)
        spans = self._pools.spans(run.block_table, start, stop)
        if stop == len(run.tokens):
            spans += self._pools.state_spans(run.block_table)
        return tuple(spans)

    def _first_tokens(self, handoff: _Handoff, logits: object) -> list[Pick]:
        request = handoff.job.request
        sampling, prompt = request.sampling, request.prompt_tokens
        seeds = [seed_of_choice(seed_of(request), index) for index in range(sampling.choices)]
        adjustment = adjustment_of(request, self._model.ends_of(sampling))
        return first_tokens(logits, [Draw(sampling, seed, len(prompt), adjustment) for seed in seeds])

    def _write_aux(self, handoff: _Handoff, run: PromptRun) -> Span:
        assert handoff.slot is not None  # noqa: S101 - taken with the pages
        request = handoff.job.request
        row = aux_row.AuxRow(
            room=handoff.room,
            prompt_digest=aux_row.prompt_digest(request.prompt_tokens),
            prompt_tokens=len(request.prompt_tokens),
            firsts=tuple((first.token, first.logprob) for first in handoff.firsts),
            top=handoff.firsts[0].top,
            seed=seed_of(request),
            records_check=checksum(run.records),
        )
        self._pools.row(handoff.slot)[:] = aux_row.encode(row)
        return Span(AUX, 0, 0, (handoff.slot,))

    def _conclude(self) -> bool:
        """Tell the caller of what has arrived whole."""
        arrived = [h for h in self._inflight if h.sender.released and h.sender.poll() == KVPoll.Success]
        for handoff in arrived:
            self._inflight.remove(handoff)
            self._release(handoff)
            sampling = handoff.job.request.sampling
            for index, first in enumerate(handoff.firsts):
                handoff.job.emit(
                    Output(
                        index=index,
                        tokens=(first.token,),
                        logprobs=(first.logprob,) if sampling.logprobs else (),
                        top_logprobs=(first.top,) if sampling.top_logprobs else (),
                        finish_reason="length",
                    )
                )
        return bool(arrived)

    def _end(self, handoff: _Handoff, last: Output, cause: KVBatonError) -> None:
        """Take ``handoff`` out of whatever queue it is in; its memory follows when nothing can touch it. The other side
        is told the cause."""
        if self._computing is not None and self._computing[0] is handoff:
            self._computing = None
        for queue in (self._bootstrap, self._ready, self._inflight):
            if handoff in queue:
                queue.remove(handoff)
        with suppress(LocalProtocolError):  # a closed manager has ended every room by itself
            handoff.sender.fail(cause)
        self._draining.add(handoff.sender, handoff)
        handoff.job.emit(last)

    def _release(self, handoff: _Handoff) -> None:
        if handoff.block_table is not None:
            self._pools.free(handoff.block_table)
        if handoff.slot is not None:
            self._pools.slots.free([handoff.slot])

    @property
    def busy(self) -> bool:
        return bool(self._bootstrap or self._ready or self._computing or self._inflight or self._draining)

    def stats(self) -> Stats:
        holders = [*self._live(), *self._draining]
        return Stats(
            pages_free=self._pools.pages_free,
            pages_used=self._pools.pages_used,
            pages_leased=sum(h.block_table.count for h in holders if h.block_table is not None and h.sender.leased),
            slots_used=self._pools.slots.used,
            running=int(self._computing is not None),
            queues={
                "bootstrap": len(self._bootstrap),
                "ready": len(self._ready),
                "inflight": len(self._inflight),
                "draining": len(self._draining),
            },
        )


def prefill_scheduler(
    model: LoadedModel,
    pools: Pools,
    manager: Manager,
    config: SchedulerConfig | None = None,
    *,
    runner: ModelRunner | None = None,
) -> Scheduler:
    """A scheduler that computes prompts and hands them over. ``manager`` must know ``pools.layout``; ``runner`` is that
    of a group's leader, None for a rank by itself."""
    config = config or SchedulerConfig()
    limits = limits_of(model, pools, keeps_answer=False, needs_room=True)
    role = Prefill(model, pools, manager, runner or ModelRunner(model, pools), config)
    return Scheduler(role, limits, config, wakeup=manager.wakeup, name="prefill")

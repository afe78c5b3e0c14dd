"""The decode scheduler: preallocation queue, transfer queue, continuous batch.

With a prefix cache a request is granted only the pages that follow what the tree has; its own join the tree once they
have arrived whole. Several answers to one prompt are one hand-off: its cache arrives once, in the first one's units,
and is shared with the others or copied to theirs.

Rules: a request is admitted, in order, when there are pages for its prompt and all of its answer, so that a running
request never runs out; while the pool is full requests wait, they do not fail: each has its receiver from the moment in
which it comes, by which prefill knows that it is queued here and waits as long. Pages that were published go back only
when the receiver has ended *and* holds no lease. Nothing is served from a hand-off whose aux row is not this room's.

This file must not know of transports, peers' layouts or prefill's queues.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count

from kvbaton.engines.port import Manager, Receiver
from kvbaton.errors import KVBatonError, LocalProtocolError, RemoteProtocolError, TransferFailedError
from kvbaton.manager import KVPoll, Span
from kvbaton.serving.engine import aux_row
from kvbaton.serving.engine.batch import ContinuousBatch
from kvbaton.serving.engine.departures import Departures
from kvbaton.serving.engine.draining import Draining
from kvbaton.serving.engine.generation import Generation, Opening, generations
from kvbaton.serving.engine.job import Job, for_peer
from kvbaton.serving.engine.limits import Limits, limits_of
from kvbaton.serving.engine.model import LoadedModel
from kvbaton.serving.engine.pool import AUX, Pools
from kvbaton.serving.engine.prefix import Prefix, PrefixCache
from kvbaton.serving.engine.prompt_logprobs import check_records, prompt_tokens_of
from kvbaton.serving.engine.request import Handoff, Output, PromptToken, Request
from kvbaton.serving.engine.runner import ModelRunner
from kvbaton.serving.engine.sampling import Pick
from kvbaton.serving.engine.scheduler import Role, Scheduler, SchedulerConfig
from kvbaton.serving.engine.sequence_group import SequenceGroup, allocate_group, missing_pages
from kvbaton.serving.engine.stats import Stats


@dataclass(slots=True, eq=False)
class _Expected:
    """One prompt whose cache is to come."""

    job: Job
    room: int
    receiver: Receiver


@dataclass(slots=True, eq=False)
class _Arrival(_Expected):
    """It is expected in the first block table of ``sequences``, its aux row in ``slot``."""

    sequences: SequenceGroup
    slot: int
    prefix: Prefix


class Decode(Role):
    """Queues: ``waiting`` for pages, ``transfer``, ``draining``, the batch."""

    def __init__(
        self,
        model: LoadedModel,
        pools: Pools,
        manager: Manager,
        runner: ModelRunner,
        limits: Limits,
        config: SchedulerConfig,
    ) -> None:
        self._model = model
        self._pools = pools
        self._prefixes = PrefixCache(pools.page_size) if config.prefix_cache and pools.pages is not None else None
        self._held: dict[Job, tuple[SequenceGroup, Prefix]] = {}
        self._manager = manager
        self._limits = limits
        self._runner = runner
        self._batch = ContinuousBatch(runner, self._retire, config.max_batch)
        self._departures = Departures(pools, manager, runner, self._retire)
        self._waiting: deque[_Expected] = deque()
        self._transfers: list[_Arrival] = []
        self._draining = Draining[_Expected](self._release)

    def add(self, job: Job) -> None:
        request = job.request
        try:
            if request.room is None:
                raise LocalProtocolError("a decode request has no room")
            receiver = self._manager.receiver(request.room, request.sources)
        except KVBatonError as error:
            job.fail(error)
            return
        self._waiting.append(_Expected(job, request.room, receiver))

    def end(self, job: Job, error: KVBatonError) -> None:
        arrival = next((arrival for arrival in (*self._waiting, *self._transfers) if arrival.job is job), None)
        if arrival is not None:
            self._end(arrival, Output(error=error), for_peer(error))
            return
        if self._departures.has(job):
            for generation in self._batch.choices_of(job):
                self._batch.drop(generation)
            self._departures.end(job, error)
            return
        self._batch.remove(job, error)

    def hand_on(self, jobs: Sequence[Job], room: int) -> bool:
        choices = [sorted(self._batch.choices_of(job), key=lambda one: one.index) for job in jobs]
        if not all(choices) or any(self._departures.has(job) for job in jobs):
            return False
        rooms = count(room)
        for job, generations_of_job in zip(jobs, choices, strict=True):
            self._departures.expect(job, len(generations_of_job))
            for generation in generations_of_job:
                self._batch.depart(generation, partial(self._departures.add, room=next(rooms)))
        return True

    def step(self) -> bool:
        worked = self._departures.step()
        worked = self._poll_transfers() or worked
        worked = self._draining.reap() or worked
        worked = self._admit() or worked
        return self._batch.step() or worked

    def _admit(self) -> bool:
        """Admit as many as fit, oldest first; who does not fit yet holds up those behind it."""
        admitted = False
        while self._waiting and self._pools.slots.available:
            taken = self._take(self._waiting[0].job.request)
            if taken is None:
                break
            expected = self._waiting.popleft()
            expected.job.take_up()
            self._publish(expected, *taken)
            admitted = True
        return admitted

    def _take(self, request: Request) -> tuple[SequenceGroup, Prefix] | None:
        """Units for all that the request may ever cache; pages of its prefix are shared, others evicted if need be."""
        size = len(request.prompt_tokens), self._limits.cached_tokens(request), request.sampling.choices
        if self._prefixes is None:
            sequences = allocate_group(self._pools, *size, recorded=request.recorded_tokens)
            return None if sequences is None else (sequences, Prefix())
        prefix = self._prefixes.match(request.prompt_tokens)
        missing = missing_pages(self._pools, *size, shared=len(prefix.nodes))
        if 0 < missing <= self._prefixes.evictable and self._pools.pages is not None:
            self._pools.pages.free(self._prefixes.evict(missing))
        sequences = allocate_group(self._pools, *size, shared=prefix.pages, recorded=request.recorded_tokens)
        if sequences is None:
            self._prefixes.release(prefix)
            return None
        self._prefixes.lookups += 1
        self._prefixes.hit_tokens += len(prefix.nodes) * self._pools.page_size
        return sequences, prefix

    def _free(self, sequences: SequenceGroup, prefix: Prefix) -> None:
        """What is in the tree stays there, unlocked; the rest goes back."""
        sequences.free(self._pools, keep=frozenset(prefix.pages))
        if self._prefixes is not None:
            self._prefixes.release(prefix)

    def _publish(self, expected: _Expected, sequences: SequenceGroup, prefix: Prefix) -> None:
        """The units of the prompt and an aux row, to the sources."""
        slot = self._pools.take_slot()
        assert slot is not None  # noqa: S101 - admission saw a free one
        arrival = _Arrival(expected.job, expected.room, expected.receiver, sequences, slot, prefix)
        self._transfers.append(arrival)
        held, count = len(prefix.nodes) * self._pools.page_size, len(expected.job.request.prompt_tokens)
        spans = [*self._pools.wanted(sequences.first, held, count), Span(AUX, 0, 0, (slot,))]
        try:
            arrival.receiver.publish(spans, token_count=count)
        except KVBatonError as error:
            self._end(arrival, Output(error=error), error)

    def _poll_transfers(self) -> bool:
        failed = [one for one in (*self._waiting, *self._transfers) if one.receiver.poll() == KVPoll.Failed]
        for expected in failed:
            error = expected.receiver.error or TransferFailedError("the transfer failed", room=expected.room)
            self._end(expected, Output(error=error), error)
        arrived = [a for a in self._transfers if a.receiver.poll() == KVPoll.Success and a.receiver.released]
        for arrival in arrived:
            self._begin(arrival)
        return bool(failed or arrived)

    def _begin(self, arrival: _Arrival) -> None:
        """Everything is here: check the aux row, serve the first tokens, join the batch."""
        self._transfers.remove(arrival)
        sequences, prompt = arrival.sequences, arrival.job.request.prompt_tokens
        try:
            row = aux_row.decode(self._pools.row(arrival.slot), room=arrival.room, prompt=prompt)
            firsts = self._firsts(row, arrival.job.request)
            prompt_logprobs = self._prompt_logprobs(row, arrival)
            self._runner.copy(sequences.copies(self._pools, len(prompt)))
            choices = generations(arrival.job, self._model, sequences.block_tables, row.seed)
        except KVBatonError as error:
            self._release(arrival)
            arrival.job.fail(error)
            return
        self._pools.slots.free([arrival.slot])
        held = len(arrival.prefix.nodes) * self._pools.page_size
        if self._prefixes is not None:
            self._prefixes.extend(arrival.prefix, prompt, sequences.first.pages)
        self._held[arrival.job] = (sequences, arrival.prefix)
        self._batch.join(
            choices,
            firsts,
            Opening(
                handoff=Handoff(
                    bytes=arrival.receiver.bytes,
                    seconds=arrival.receiver.handoff_seconds,
                    exposed_seconds=arrival.receiver.exposed_seconds,
                ),
                cached_tokens=held,
                prompt_logprobs=prompt_logprobs,
            ),
        )

    def _prompt_logprobs(self, row: aux_row.AuxRow, arrival: _Arrival) -> tuple[PromptToken, ...] | None:
        """What prefill says of the prompt's own tokens. Raises RemoteProtocolError where it is not what was asked."""
        request = arrival.job.request
        if request.sampling.prompt_logprobs is None:
            return None
        records = self._pools.read_records(arrival.sequences.first, len(request.prompt_tokens) - 1)
        check_records(records, row.records_check, self._model.geometry.vocab_size, row.room)
        return prompt_tokens_of(records, request.sampling.prompt_logprobs)

    def _firsts(self, row: aux_row.AuxRow, request: Request) -> list[Pick]:
        """The first token of each choice. Raises RemoteProtocolError where prefill was asked something else."""
        vocabulary, asked = self._model.geometry.vocab_size, request.sampling
        foreign = next((token for token, _ in (*row.firsts, *row.top) if token >= vocabulary), None)
        if foreign is not None:
            raise RemoteProtocolError(f"first token {foreign} is not in the vocabulary", room=row.room)
        wanted = asked.choices, min(asked.top_logprobs, vocabulary)
        if (len(row.firsts), len(row.top)) != wanted:
            raise RemoteProtocolError(
                f"prefill hands over {len(row.firsts)} first tokens and {len(row.top)} alternatives, "
                f"decode was asked for {wanted[0]} and {wanted[1]}; send both the same request",
                room=row.room,
            )
        return [Pick(token, logprob, row.top) for token, logprob in row.firsts]

    def _end(self, expected: _Expected, last: Output, cause: KVBatonError) -> None:
        """Take ``expected`` out of its queue; its memory follows when nothing can touch it. The other side is told the
        cause."""
        if isinstance(expected, _Arrival):
            self._transfers.remove(expected)
        else:
            self._waiting.remove(expected)
        with suppress(LocalProtocolError):  # a closed manager has ended every room by itself
            expected.receiver.fail(cause)
        self._draining.add(expected.receiver, expected)
        expected.job.emit(last)

    def _release(self, expected: _Expected) -> None:
        """What waited has nothing yet."""
        if isinstance(expected, _Arrival):
            self._free(expected.sequences, expected.prefix)
            self._pools.slots.free([expected.slot])

    def _retire(self, generation: Generation) -> None:
        """An answer has ended: what it has cached may serve another."""
        sequences, prefix = self._held[generation.job]
        last = sequences.open == 1
        own = prefix if last else Prefix(list(prefix.nodes))
        # until the last one ends, common pages that are somebody else's in the tree must not come in: nobody locks them
        if self._prefixes is not None and (last or len(prefix.nodes) >= sequences.common):
            self._prefixes.extend(own, generation.cached_tokens, generation.block_table.pages)
        sequences.end(self._pools, generation.block_table, keep=frozenset(own.pages))
        if last:
            del self._held[generation.job]
        if self._prefixes is not None:
            self._prefixes.release(own if last else Prefix(own.nodes[len(prefix.nodes) :]))

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._transfers or self._draining or len(self._batch) or self._departures.count)

    def stats(self) -> Stats:
        holders = [*self._transfers, *(one for one in self._draining if isinstance(one, _Arrival))]
        spare = self._prefixes.evictable if self._prefixes is not None else 0
        return Stats(
            pages_free=self._pools.pages_free + spare,
            pages_used=self._pools.pages_used - spare,
            pages_leased=sum(a.sequences.first.count for a in holders if a.receiver.leased),
            slots_used=self._pools.slots.used,
            running=self._batch.running,
            queues={
                "waiting": len(self._waiting),
                "transfer": len(self._transfers),
                "draining": len(self._draining),
                "ready": len(self._batch) - self._batch.running,
                "departing": self._departures.count,
            },
            prefix_lookups=self._prefixes.lookups if self._prefixes is not None else 0,
            prefix_hit_tokens=self._prefixes.hit_tokens if self._prefixes is not None else 0,
        )


def decode_scheduler(
    model: LoadedModel,
    pools: Pools,
    manager: Manager,
    config: SchedulerConfig | None = None,
    *,
    runner: ModelRunner | None = None,
) -> Scheduler:
    """A scheduler that collects prompts and continues them. ``manager`` must know ``pools.layout``; ``runner`` is that
    of a group's leader, None for a rank by itself."""
    config = config or SchedulerConfig()
    limits = limits_of(model, pools, needs_room=True)
    role = Decode(model, pools, manager, runner or ModelRunner(model, pools), limits, config)
    return Scheduler(role, limits, config, wakeup=manager.wakeup, name="decode")

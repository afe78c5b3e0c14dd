"""Answers on their way to another engine: their cache, the token that nobody has been told of, and its seed.

A decode engine is the source of such a room, as prefill is of others, and the target cannot tell the difference: it is
given a prompt that ends with the answer so far, and a first token.

Rules: an answer departs between two steps, behind the last one whose token was told. Its pages stay until the sender
has ended and holds no lease. A request whose answers have all been collected ends as handed on; one of whose rooms
fails ends with that, and whoever is told of it computes the answer again.

This file must not know of batches, text or routers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from kvbaton.engines.port import Manager, Sender
from kvbaton.errors import KVBatonError, LocalProtocolError, TransferFailedError
from kvbaton.manager import KVPoll, Span
from kvbaton.serving.engine import aux_row
from kvbaton.serving.engine.draining import Draining
from kvbaton.serving.engine.generation import Generation
from kvbaton.serving.engine.job import Job, for_peer
from kvbaton.serving.engine.pool import AUX, Pools
from kvbaton.serving.engine.request import HandedOnError, Output
from kvbaton.serving.engine.runner import ModelRunner
from kvbaton.serving.engine.sampling import Pick


@dataclass(slots=True, eq=False)
class _Departure:
    """One answer in one room; ``untold`` is its next token."""

    generation: Generation
    untold: Pick
    room: int
    sender: Sender
    slot: int | None = None


@dataclass(slots=True, eq=False)
class _Leaving:
    """One request: how many of its answers are still to come out of the batch, and those that are under way."""

    expected: int
    departures: list[_Departure] = field(default_factory=list)


class Departures:
    """All of one engine. ``release`` takes an answer's pages back."""

    def __init__(
        self, pools: Pools, manager: Manager, runner: ModelRunner, release: Callable[[Generation], None]
    ) -> None:
        self._pools = pools
        self._manager = manager
        self._runner = runner
        self._release = release
        self._jobs: dict[Job, _Leaving] = {}
        self._draining = Draining[_Departure](self._free)

    def expect(self, job: Job, answers: int) -> None:
        """So many answers of ``job`` will be added."""
        self._jobs[job] = _Leaving(answers)

    def has(self, job: Job) -> bool:
        return job in self._jobs

    def add(self, generation: Generation, untold: Pick, room: int) -> None:
        """An answer has left the batch."""
        job = generation.job
        leaving = self._jobs.get(job)
        try:
            if leaving is None:
                raise TransferFailedError("another answer of this request could not be handed on", room=room)
            sender = self._manager.sender(room)
        except KVBatonError as error:
            self._release(generation)
            self.end(job, error)
            return
        leaving.departures.append(_Departure(generation, untold, room, sender))
        leaving.expected -= 1
        if not leaving.expected:
            job.emit(Output(departing=True))

    def end(self, job: Job, error: KVBatonError) -> None:
        """Give up what has not arrived."""
        leaving = self._jobs.pop(job, None)
        for departure in leaving.departures if leaving is not None else ():
            with suppress(LocalProtocolError):  # a closed manager has ended every room by itself
                departure.sender.fail(for_peer(error))
            self._draining.add(departure.sender, departure)
        job.fail(error)

    def step(self) -> bool:
        worked = self._draining.reap()
        for job, leaving in list(self._jobs.items()):
            if job.done:  # its step has failed meanwhile
                self.end(job, TransferFailedError("another answer of this request has failed", room=job.request.room))
                continue
            for departure in leaving.departures:
                worked = self._advance(job, departure) or worked
            if job in self._jobs and not leaving.expected and all(map(_arrived, leaving.departures)):
                del self._jobs[job]
                for departure in leaving.departures:
                    self._free(departure)
                job.fail(HandedOnError("the answer goes on at another server"))
                worked = True
        return worked

    def _advance(self, job: Job, departure: _Departure) -> bool:
        poll = departure.sender.poll()
        if poll == KVPoll.Failed and job in self._jobs:
            self.end(job, departure.sender.error or TransferFailedError("the transfer failed", room=departure.room))
            return True
        if poll != KVPoll.WaitingForInput or departure.slot is not None or not self._pools.slots.available:
            return False
        departure.slot = self._pools.take_slot()
        try:
            departure.sender.submit(self._spans(departure), last=True, ready=self._runner.fence())
        except KVBatonError as error:
            self.end(job, departure.sender.error or error)
        return True

    def _spans(self, departure: _Departure) -> list[Span]:
        generation, slot = departure.generation, departure.slot
        assert slot is not None  # noqa: S101 - the caller has just taken it
        self._pools.row(slot)[:] = aux_row.encode(_row_of(departure))
        return [
            *self._pools.spans(generation.block_table, departure.sender.prefix_len, len(generation.tokens)),
            *self._pools.state_spans(generation.block_table),
            Span(AUX, 0, 0, (slot,)),
        ]

    def _free(self, departure: _Departure) -> None:
        self._release(departure.generation)
        if departure.slot is not None:
            self._pools.slots.free([departure.slot])

    @property
    def count(self) -> int:
        """Answers whose pages are held for others."""
        return len(self._draining) + sum(len(leaving.departures) for leaving in list(self._jobs.values()))

    def __repr__(self) -> str:
        return f"<Departures of {len(self._jobs)} requests, {len(self._draining)} draining>"


def _arrived(departure: _Departure) -> bool:
    return departure.sender.poll() == KVPoll.Success and departure.sender.released


def _row_of(departure: _Departure) -> aux_row.AuxRow:
    """What prefill would say of a prompt that is all tokens so far."""
    tokens = departure.generation.tokens
    return aux_row.AuxRow(
        room=departure.room,
        prompt_digest=aux_row.prompt_digest(tokens),
        prompt_tokens=len(tokens),
        firsts=((departure.untold.token, departure.untold.logprob),),
        top=departure.untold.top,
        seed=departure.generation.seed,
    )

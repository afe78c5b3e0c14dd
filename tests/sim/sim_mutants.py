"""Bugs of the field, planted: each a patched table cell, plan rule or lease rule, in the test process only.

A simulator that finds nothing proves little until it is known what it would find. Every class of bug that SGLang's
public issues on disaggregation show, translated to this protocol, is here, with the issue's number where there is one;
``test_mutants.py`` shows that each is found.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import msgspec
from msgspec.structs import replace

from kvbaton import pieces
from kvbaton.handles import KVSender
from kvbaton.layout import NO_LAYER
from kvbaton.plan import pair as plan
from kvbaton.plan.coverage import Coverage, Piece
from kvbaton.protocol import context, peers, receiving, room, rooms, sending, table, target_rooms, transfer, transfers
from kvbaton.protocol.core import Core
from kvbaton.protocol.effects import CancelWrites, KVPoll
from kvbaton.protocol.events import AbortRequested
from kvbaton.protocol.messages import Done, Failed, Open
from kvbaton.protocol.session import Session
from kvbaton.protocol.transfer import On, State
from kvbaton.runtime import posting, staging
from kvbaton.runtime.commands import Commands
from kvbaton.runtime.driver import Driver

Planter = Callable[["Patches"], None]


class Patches(ExitStack):
    """Attributes and table cells that are put back at the end."""

    def set(self, owner: Any, name: str, value: Any) -> None:
        self.callback(setattr, owner, name, owner.__dict__[name])
        setattr(owner, name, value)

    def cell(self, state: State, on: On, handler: Any) -> None:
        rules = table.TABLE[state]
        self.callback(rules.__setitem__, on, rules[on])
        rules[on] = handler


@dataclass(frozen=True)
class Mutant:
    name: str
    what: str
    plant: Planter
    shown_by: int

    @contextmanager
    def planted(self) -> Iterator[None]:
        with Patches() as patches:
            self.plant(patches)
            yield


MUTANTS: list[Mutant] = []


def mutant(what: str, shown_by: int = 0) -> Callable[[Planter], Planter]:
    """Plant a bug. ``shown_by``: a seed to try first, where the search from 0 takes long."""

    def note(plant: Planter) -> Planter:
        MUTANTS.append(Mutant(plant.__name__.replace("_", " "), what, plant, shown_by))
        return plant

    return note


@mutant("the source writes aux only for models that have a state pool (sglang#25698)")
def aux_gated_on_state(patches: Patches) -> None:
    original = sending.post_part

    def post_part(t: Any, index: int, part: Any, chunk: Any) -> None:
        has_state = any(p.id.pool == "state" for p in t.as_source().pair.parts)
        if part.id.pool != "aux" or has_state:
            original(t, index, part, chunk)

    patches.set(sending, "post_part", post_part)


@mutant("the target works out by a rule of its own what will come: no aux without a prefix")
def expectation_re_derived_on_one_side(patches: Patches) -> None:
    original = receiving.delivered

    def delivered(t: Any, now: float, detail: Any) -> None:
        incoming = t.as_target()
        prefixed = any(grant.token_start for grant in incoming.grants)
        incoming.parts = tuple(p for p in incoming.parts if p.part.pool != "aux" or not prefixed)
        original(t, now, detail)

    for state in (State.OPENING, State.OPENED):
        patches.cell(state, On.DONE_ARRIVED, delivered)


@mutant("parts of two writers with the same pool name are taken for one (sglang#22145)")
def completion_keyed_without_the_writer(patches: Patches) -> None:
    original = room.TargetRoom.status

    def status(self: Any) -> Any:
        found = original(self)
        parts = [(t, p.part.pool) for t in self.transfers.values() for p in t.incoming.parts]
        arrived = {pool for t, pool in parts if t.succeeded}
        if found.poll is KVPoll.Transferring and arrived == {pool for _, pool in parts}:
            return replace(found, poll=KVPoll.Success, leased=False)
        return found

    patches.set(room.TargetRoom, "status", status)


@mutant("a write forgets which part it belongs to (sglang#39846)")
def part_id_dropped(patches: Patches) -> None:
    original = sending.post
    patches.set(sending, "post", lambda t, write, place: original(t, replace(write, part=0), place))


@mutant("a proof of delivery that comes after the failure turns it into a success (sglang#30352)")
def failed_resurrected(patches: Patches) -> None:
    original, close = room.TargetRoom.status, receiving.close

    def status(self: Any) -> Any:
        if self.error and self.transfers and all(t.succeeded for t in self.transfers.values()):
            self.error = None
        return original(self)

    def forgive(t: Any, now: float, detail: Any) -> None:
        t.error = None
        close(t, now, detail)

    patches.set(room.TargetRoom, "status", status)
    patches.cell(State.DRAINING, On.DONE_ARRIVED, forgive)


@mutant("the target's pages are free as soon as the room has failed (sglang#24527)")
def pages_freed_at_abort_before_the_drain(patches: Patches) -> None:
    original = transfer.Transfer.leased.fget
    patches.set(
        transfer.Transfer,
        "leased",
        property(lambda self: original(self) and self.state not in (State.DRAINING, State.QUIESCING)),
    )


@mutant("the source's pages are free as soon as the room has failed (sglang#38961)")
def source_pages_freed_before_settle(patches: Patches) -> None:
    original = transfer.Transfer.leased.fget
    patches.set(transfer.Transfer, "leased", property(lambda self: original(self) and self.state is not State.SETTLING))


@mutant("a message is matched by its room, not by the id of the transfer (sglang#17259)", shown_by=294)
def stale_notification_after_room_reuse(patches: Patches) -> None:
    original = transfers.Transfers.find

    def find(self: Any, peer: str, role: Any, key: Any) -> Any:
        same = [t for t in self.live() if (t.peer, t.role, t.key.room) == (peer, role, key.room)]
        return same[-1] if same else original(self, peer, role, key)

    patches.set(transfers.Transfers, "find", find)


@mutant("the target counts proofs of delivery, repeated ones too (sglang#36707)", shown_by=12)
def ack_counted_instead_of_identified(patches: Patches) -> None:
    original, find = room.TargetRoom.status, Core._on_transfer_message
    proofs: WeakKeyDictionary[Any, Counter[Any]] = WeakKeyDictionary()  # by rank, so that each scenario begins anew

    def on_message(self: Any, session: Any, on: On, message: Any) -> None:
        if isinstance(message, Done) and message.parts:
            proofs.setdefault(self._context, Counter())[message.key] += 1
        find(self, session, on, message)

    def status(self: Any) -> Any:
        found = original(self)
        writers = [t for t in self.transfers.values() if t.incoming.parts]
        if found.poll is KVPoll.Transferring:
            counted = proofs[writers[0].context][writers[0].key]
            if counted >= len(writers):
                return replace(found, poll=KVPoll.Success, leased=False)
        return found

    patches.set(Core, "_on_transfer_message", on_message)
    patches.set(room.TargetRoom, "status", status)


@mutant("deadlines are judged before the messages that are here already are read", shown_by=186)
def deadline_checked_before_the_inbox(patches: Patches) -> None:
    def handle(self: Any, event: Any, now: float) -> Any:
        self._context.now = now
        while (due := self._context.timers.pop_due(now)) is not None:
            self._on_timer(*due)
            self._rooms.settle()
        self._handlers[type(event)](event)
        self._rooms.settle()
        return self._context.take_effects()

    patches.set(Core, "handle", handle)


@mutant("a source does not say that its writes need the target's help to land (our own)")
def help_never_asked_for(patches: Patches) -> None:
    patches.cell(State.SENDING, On.WRITE_UNDER_WAY, table.Ignored("planted"))


@mutant("a source that fails does not tell its targets (sglang#36033)")
def failure_not_announced(patches: Patches) -> None:
    original = context.Context.send

    def send(self: Any, t: Any, message: Any) -> None:
        if not isinstance(message, Failed):
            original(self, t, message)

    patches.set(context.Context, "send", send)


@mutant("a room that is open already is opened again by another request (sglang#40125)", shown_by=257)
def duplicate_open_accepted(patches: Patches) -> None:
    original = rooms.Rooms._room_for

    def room_for(self: Any, session: Any, message: Any) -> Any:
        found = self._sources.get(message.key.room)
        return found if found is not None else original(self, session, message)

    patches.set(rooms.Rooms, "_room_for", room_for)


@mutant("another instance that answers at a known address is taken for the old one (sglang#36029)", shown_by=356)
def restart_at_the_same_address_undetected(patches: Patches) -> None:
    def on_answer(self: Any, session: Any, hello: Any) -> None:
        if hello.answers == self._context.instance:
            session.answered(hello, self._context.now)

    patches.set(peers.Peers, "_on_answer", on_answer)


@mutant("every source rank that holds a replica of a head writes it")
def gqa_replica_written_twice(patches: Patches) -> None:
    def overlap(source: Any, target: Any) -> range:
        start = max(source.first, target.first)
        stop = min(source.first + source.width, target.first + target.width)
        return range(start, stop) if stop > start else range(0)

    patches.set(plan, "overlap", overlap)


@mutant("a chunk is taken to begin where the last one ended, whatever token range it names (sglang#30545)")
def chunk_matched_by_position(patches: Patches) -> None:
    original = sending.post_part

    def post_part(t: Any, index: int, part: Any, chunk: Any) -> None:
        outgoing = t.as_source()
        spans = []
        for span in chunk.spans:
            grant = outgoing.grants.get(span.pool)
            covered = outgoing.coverage.get((index, False)) or outgoing.coverage.get((index, True))
            begin = covered._begin if covered else grant.token_start if grant else 0
            start = begin if span.token_stop else 0
            spans.append(msgspec.structs.replace(span, token_start=start))
        original(t, index, part, replace(chunk, spans=tuple(spans)))

    patches.set(sending, "post_part", post_part)


@mutant("what a settled write held of its peer's window is never given back")
def credit_leaked(patches: Patches) -> None:
    patches.set(posting.PostingQueue, "settled", lambda _self, _write: None)


@mutant("the staging slot of a settled write is never given back (sglang#31217)")
def staging_slot_leaked(patches: Patches) -> None:
    patches.set(staging.StagingDesk, "settled", lambda _self, _write: None)


@mutant("an Open that is sent again is taken for a new one")
def retransmission_not_idempotent(patches: Patches) -> None:
    original = Core._on_transfer_message

    def on_message(self: Any, session: Any, on: On, message: Any) -> None:
        if isinstance(message, Open):
            self._rooms.on_open(session, message)
        else:
            original(self, session, on, message)

    patches.set(Core, "_on_transfer_message", on_message)


@mutant("a stopped writer's last bytes, still in the target's socket, are not waited for")
def quiesce_skipped(patches: Patches) -> None:
    original = receiving.close

    def quiesce(t: Any) -> None:
        original(t, 0.0, None)

    patches.set(receiving, "quiesce", quiesce)


@mutant("the source says that it is drained before its writes have settled (sglang#36707)")
def drained_before_settled(patches: Patches) -> None:
    def fail_sending(t: Any, now: float, error: Any) -> None:
        t.error = t.error or error
        t.enter(State.SETTLING)
        sending.drained_here(t, now)

    patches.set(sending, "fail_sending", fail_sending)


@mutant("proof of delivery leaves when the last chunk was posted, not when it has settled (sglang#31239)")
def done_before_settled(patches: Patches) -> None:
    original = sending.conclude_if_settled

    def conclude(t: Any, now: float) -> None:
        outstanding, t.as_source().outstanding = t.as_source().outstanding, set()
        original(t, now)
        if t.state is not State.DELIVERED:
            t.as_source().outstanding = outstanding

    patches.set(sending, "conclude_if_settled", conclude)


@mutant("two chunks of one room that wait for their fences wait for each other (our own, found by seed 36)")
def fenced_chunks_block_each_other(patches: Patches) -> None:
    def release(self: Any) -> Iterator[Any]:
        for number in list(self._fenced):
            if not self._wants_chunks(number):
                del self._fenced[number]
            elif len(self._fenced[number]) == 1:
                yield from self._try(number)

    patches.set(Commands, "release", release)


@mutant("a chunk whose fence raises is dropped, and its room left alone (our own)", 41)
def raised_fence_swallowed(patches: Patches) -> None:
    original = Commands._try

    def try_(self: Any, number: int) -> Iterator[Any]:
        yield from (e for e in original(self, number) if not isinstance(e, AbortRequested))

    patches.set(Commands, "_try", try_)


@mutant("a fence that raises leaves the chunks that were ready in place, to be fed again every turn (our own)", 60)
def raised_fence_feeds_others_again(patches: Patches) -> None:
    original = Commands.release

    def release(self: Any) -> Iterator[Any]:
        before = {number: deque(waiting) for number, waiting in self._fenced.items()}
        events = list(original(self))
        if any(isinstance(event, AbortRequested) for event in events):
            self._fenced = before
        yield from (event for event in events if not isinstance(event, AbortRequested))

    patches.set(Commands, "release", release)


@mutant("sessions with peers that vanished without a refusal are kept for ever (our own)", 2)
def lost_sessions_kept(patches: Patches) -> None:
    original = Session.timer

    def timer(self: Any, name: str, now: float) -> None:
        if name != "forget" or self.role == "source":
            original(self, name, now)

    patches.set(Session, "timer", timer)


@mutant("peers keep the metadata of an agent that was replaced to stop a write (our own)", 135)
def agent_metadata_frozen(patches: Patches) -> None:
    patches.set(peers.Peers, "on_agent_replaced", lambda _self, _event: None)


@mutant("a rank in both roles uses one staging slot for both at once (our own, found by seed 396)")
def staging_slots_not_shared_between_roles(patches: Patches) -> None:
    def init(self: Any, pool: Any) -> None:
        self._taken = {}
        self._pool = _Slots(len(pool))

    patches.set(staging.StagingDesk, "__init__", init)


class _Slots(list[int]):
    """Free slots of nobody else's knowing."""

    def __init__(self, count: int) -> None:
        super().__init__(range(count))

    def take(self) -> int:
        return self.pop()

    def release(self, slots: tuple[int, ...]) -> None:
        self.extend(slots)


@mutant(
    "an Open that was refused is not remembered, and a late copy of it is accepted (our own, found by seed 3012)",
    shown_by=1445,
)
def refused_open_forgotten(patches: Patches) -> None:
    patches.set(transfers.Transfers, "record_tombstone", lambda _self, _session, _key, _error: None)


@mutant("a closed rank hangs up at once, whoever may still write its memory (our own)", 140)
def closed_rank_does_not_wait(patches: Patches) -> None:
    patches.set(Driver, "gone", True)


@mutant("a target that gives a room up before it is open tells nobody (our own)")
def unopened_given_up_in_silence(patches: Patches) -> None:
    patches.set(target_rooms.TargetRooms, "give_up_unopened", lambda _self, _room: None)


@mutant("a source frees its units when the last chunk has been posted, not when it has settled (our own)")
def freed_when_posted(patches: Patches) -> None:
    original = room.SourceRoom.status

    def status(self: Any) -> Any:
        told = original(self)
        sent = [t.outgoing.last_submitted for t in self.transfers.values() if t.outgoing is not None]
        complete = self.opened and all(sent)
        return replace(told, leased=False) if complete and told.poll is KVPoll.Transferring else told

    patches.set(room.SourceRoom, "status", status)


@mutant("a sender counts as free while a chunk that it was given has not been seen by the core (our own)")
def unseen_chunks_not_leased(patches: Patches) -> None:
    patches.set(KVSender, "leased", property(lambda self: self._status.leased))


@mutant("a target that does not know how long a prompt is waits for all that it has units for (our own)", 165)
def most_taken_for_all(patches: Patches) -> None:
    patches.set(receiving, "up_to", lambda grants, _tokens: tuple(grants))


@mutant("a room goes on behind what a withdrawal has only cancelled (our own)", 630)
def cancelled_counts_as_sent(patches: Patches) -> None:
    def withdraw(t: Any, _now: float, _: object) -> None:
        t.context.emit(CancelWrites(frozenset(t.as_source().outstanding)))
        t.as_source().last_submitted = False
        for index, part in enumerate(t.as_source().pair.parts):
            if not part.paged:
                for staged in (False, True):
                    t.as_source().coverage.pop((index, staged), None)

    patches.cell(State.SENDING, On.CHUNKS_WITHDRAWN, withdraw)


@mutant("a withdrawal frees units that posted writes still read (our own)", 630)
def withdrawn_counts_as_settled(patches: Patches) -> None:
    original = KVSender.__dict__["leased"].fget
    patches.set(KVSender, "leased", property(lambda self: original(self) and not self._withdrawn))


@mutant("a chunk that waits for its fence outlives its withdrawal (our own)", 9438)
def fenced_chunk_outlives_withdrawal(patches: Patches) -> None:
    original = Commands.take

    def take(self: Any) -> Iterator[Any]:
        kept = {room: deque(waiting) for room, waiting in self._fenced.items()}
        yield from original(self)
        for number, waiting in kept.items():
            self._fenced.setdefault(number, waiting)

    patches.set(Commands, "take", take)


@mutant("a target that opens late is given chunks that were withdrawn (our own)", 4500)
def withdrawn_chunks_kept(patches: Patches) -> None:
    withdrawn, on_open = rooms.Rooms.on_chunks_withdrawn, rooms.Rooms.on_open
    kept: dict[tuple[int, int], list[Any]] = {}

    def on_chunks_withdrawn(self: Any, event: Any) -> None:
        found = self._sources.get(event.room)
        if found is not None and found.chunks:
            kept[id(self), event.room] = list(found.chunks)
        withdrawn(self, event)

    def open_with_all(self: Any, session: Any, message: Any) -> None:
        found = self._sources.get(message.key.room)
        if found is not None:
            found.chunks[:0] = kept.pop((id(self), message.key.room), [])
        on_open(self, session, message)

    patches.set(rooms.Rooms, "on_chunks_withdrawn", on_chunks_withdrawn)
    patches.set(rooms.Rooms, "on_open", open_with_all)


@mutant("a target is not told that a write needs its help to land (our own)")
def write_under_way_not_announced(patches: Patches) -> None:
    patches.set(transfers.Transfers, "on_write_under_way", lambda _self, _event: None)


@mutant("some layers of a chunk are taken for all of it (our own)", 22)
def layers_taken_for_the_chunk(patches: Patches) -> None:
    original = Coverage.add
    patches.set(Coverage, "add", lambda self, _layers, start, stop, last: original(self, None, start, stop, last=last))


@mutant("layers that lie side by side in a page go with the first of them (our own)", 191)
def stacked_layers_go_with_the_first(patches: Patches) -> None:
    def of_lanes(self: Any, come: Any) -> Any:
        lanes = self._part.lane_layers
        return come[lanes[:, 0]] if not self._whole else original(self, come)

    original = Coverage._of_lanes
    patches.set(Coverage, "_of_lanes", of_lanes)


@mutant("a part that travels through staging goes with the first of its layers (our own)", 144)
def staged_parts_do_not_wait_for_all_layers(patches: Patches) -> None:
    def of_lanes(self: Any, come: Any) -> Any:
        found = original(self, come)
        return found * 0 + come.max() if self._whole else found

    original = Coverage._of_lanes
    patches.set(Coverage, "_of_lanes", of_lanes)


@mutant("a rank takes every silence of a peer for its own (our own)")
def nobody_is_ever_silent(patches: Patches) -> None:
    patches.set(Session, "_stood_still", lambda _self, _now: True)


@mutant("what found no staging slot is not written (our own)")
def behind_the_leased_slots_nothing_is_sent(patches: Patches) -> None:
    original = sending.shares_of
    patches.set(sending, "shares_of", lambda grant, lease: tuple(original(grant, lease))[:1])


@mutant("the target copies out of staging slots what went directly (our own)")
def more_is_scattered_than_was_staged(patches: Patches) -> None:
    def runs(self: Any, blocks: range) -> Any:
        for number, within, run in self.staged.runs(blocks, self.first):
            yield self.slots[number % len(self.slots)], within, run

    patches.set(transfer.Lease, "runs", runs)


@mutant("a whole chunk moves once more what went ahead of it, and counts it once (our own)", 38)
def layers_move_again_with_their_chunk(patches: Patches) -> None:
    original = Coverage.add

    def add(self: Any, layers: Any, start: int, stop: int, *, last: bool) -> Any:
        ahead = self._come is not None and self._part.paged
        begin = int(self._come.min()) if ahead else 0
        made = original(self, layers, start, stop, last=last)
        blocks = self._part.blocks(begin, min(stop, self._stop)) if ahead and layers is None else range(0)
        return [Piece(None, blocks, begin, len(blocks) * self._part.block_bytes)] if blocks else made

    patches.set(Coverage, "add", add)


@mutant("what belongs to no layer goes with whatever layers come first (our own)")
def aux_goes_with_the_first_layers(patches: Patches) -> None:
    original = Coverage.add

    def add(self: Any, layers: Any, start: int, stop: int, *, last: bool) -> Any:
        early = last or NO_LAYER in self._part.layers
        return original(self, layers, start, stop, last=early)

    patches.set(Coverage, "add", add)


@mutant("layers that are joined wait for the data of the first of them only (our own)")
def joined_layers_keep_one_fence(patches: Patches) -> None:
    patches.set(pieces._Held, "ready", lambda self: self.fences[0])


@mutant("layers that are held back are dropped when another chunk comes (our own)", 420)
def held_layers_dropped(patches: Patches) -> None:
    original = pieces.Pieces.add

    def add(self: Any, chunk: Any, ready: Any, now: float, token_seconds: float) -> Any:
        return original(self, chunk, ready, now, token_seconds)[-1:]

    patches.set(pieces.Pieces, "add", add)


@mutant("a source waits for the queue of decode only as long as for a decode that says nothing (our own)", 165)
def queue_measured_by_a_deadline(patches: Patches) -> None:
    patches.set(rooms.Rooms, "on_queued", lambda _self, _session, _queued: None)


@mutant("a room that prefill has begun and lost is waited for, as one that it has not got yet (our own)")
def lost_room_waited_for(patches: Patches) -> None:
    original = rooms.Rooms._room_for
    patches.set(rooms.Rooms, "_room_for", lambda self, session, message: original(self, session, unsaid(message)))

    def unsaid(message: Any) -> Any:
        return replace(message, begun=False)


@mutant("a rank that gets a request after decode was refused its room waits for decode (our own)")
def late_rank_not_told(patches: Patches) -> None:
    original = rooms.Rooms._remember

    def remember(self: Any, failures: Any, number: int, unmet: Any) -> None:
        if unmet.error.code != "transfer_failed":
            original(self, failures, number, unmet)

    patches.set(rooms.Rooms, "_remember", remember)

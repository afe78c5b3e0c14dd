"""What a transfer does at its source: post writes, prove that they settled, repeat the outcome; or settle and fail.

Handlers of the table: ``(transfer, now, detail)``. See ``transfer`` for the states.

What is subtle here is when a source may say what, because the target frees or uses pages on its word:

- ``Done`` says that every byte of every part is in the target's memory. It leaves only when the last chunk has been cut
  into writes, each part has reached the end of its grant, and *no write is outstanding*. Posting is not settling, and
  counting is not identity: outstanding writes are a set of ids, and the parts in ``Done`` are those that were promised.
- ``Failed{drained}``, ``Drained`` and ``Forgotten`` say that nothing of this transfer will ever touch the target again.
  They bind the future: the transfer never posts afterwards, and a copy of its ``Open`` that arrives later finds a
  tombstone.
- ``fenced`` beside them says that we had to cut the target off to be sure. Bytes that had left our memory may still be
  in the target's own transport, which it must drive empty before it frees (QUIESCING).

How a failing source gets there: writes that are not posted yet are cancelled (a cancelled write settles), the posted
ones are waited for (SETTLING) for ``settle_seconds``, and then the peer is fenced. A broken write does not settle: it
may have put bytes on the wire, so it stays outstanding until the fence. Fencing one peer for one transfer ends the
writes of all transfers to that peer; each of them hears of it by PEER_FENCED.

Chunks and grants do not line up. A chunk is what prefill computed, of all layers or of some; a grant is what decode
wants, from the prefix that it holds on. A part's coverage says what of a chunk is new (see ``coverage``): in each layer
a chunk must begin at or before the first token that is still to come, ends inside a page only if it is the last, and
what lies before the grant is skipped without being read. Slots hold what is final with the prompt: the state of a layer
goes with that layer of the last tokens, aux rows with the last chunk.

An engine that needs its units back withdraws its chunks (a preemption). What is not posted is cancelled, and the
coverage goes back to before each write that is out: whether that one is cancelled or lands does not matter, as the same
bytes may land again. The target hears nothing of it: its units are granted until the room ends.
Slots, which go with the last chunk, are sent anew.

A write is at most ``write_bytes`` and ``write_entries`` large, so that a long part can be cancelled halfway and never
blocks the driver for long; staged parts are cut at the target's slots instead.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvbaton.errors import (
    DisconnectedError,
    ExpiredError,
    InternalError,
    KVBatonError,
    LayoutError,
    LocalProtocolError,
    TransferFailedError,
    from_code,
)
from kvbaton.plan.coverage import Coverage
from kvbaton.plan.pair import PartPlan
from kvbaton.protocol.effects import CancelWrites, FencePeer, PostWrite, StagedRun
from kvbaton.protocol.events import Chunk, WriteId
from kvbaton.protocol.grants import parts_of, up_to
from kvbaton.protocol.messages import MAX_SECONDS, Abort, Close, Done, Drained, Failed, Grant, Opened, clip
from kvbaton.protocol.transfer import Lease, Outgoing, Place, State, Transfer, describe, expect

NO_ENTRIES = np.empty(0, dtype=np.int32)


def acknowledge(t: Transfer, _now: float, _: object) -> None:
    t.context.send(t, Opened(sender=t.context.instance, receiver=t.peer, key=t.key, moving=t.as_source().moving))


def write_under_way(t: Transfer, now: float, _: object) -> None:
    """The target, which does nothing for rooms that only wait, may have to help this one's bytes to land."""
    t.as_source().moving = True
    if t.context.timers.get(t, "retry") is None:
        ask_for_help(t, now, None)


def ask_for_help(t: Transfer, now: float, _: object) -> None:
    """Again and again while something is under way: the message may be lost, and nothing answers it but the bytes."""
    if t.as_source().outstanding:
        acknowledge(t, now, None)
        t.retry_later(now)


def send_chunk(t: Transfer, now: float, detail: object) -> None:
    chunk = expect(detail, Chunk)
    outgoing = t.as_source()
    if t.state is State.WAITING:
        t.enter(State.SENDING)
    t.set_deadline(now, t.context.settings.waiting_timeout)
    try:
        for index, part in enumerate(outgoing.pair.parts):
            post_part(t, index, part, chunk)
        if chunk.last:
            check_complete(t, chunk)
    except (LayoutError, LocalProtocolError) as error:
        fail_sending(t, now, error)
        return
    if chunk.last:
        outgoing.last_submitted, outgoing.last_submitted_at = True, now
    conclude_if_settled(t, now)


def post_part(t: Transfer, index: int, part: PartPlan, chunk: Chunk) -> None:
    """Post what this chunk brings of one part. Tokens outside the grant are the target's already."""
    outgoing = t.as_source()
    grant = outgoing.grants.get(part.id.pool)
    span = next((span for span in chunk.spans if span.pool == part.id.pool), None)
    if grant is None or span is None:
        return
    if not part.paged and not chunk.last:
        check_final(t, part, chunk)
    for lease, start, stop in shares_of(grant, outgoing.leases.get(part.id)):
        share = (index, lease is not None)
        coverage = outgoing.coverage.get(share)
        if coverage is None:
            coverage = outgoing.coverage[share] = Coverage(part, start, stop, whole=lease is not None)
        for piece in coverage.add(chunk.layers, span.token_start, span.token_stop, last=chunk.last):
            if lease is None:
                post_direct(t, Place(share, piece), part, span, grant)
            else:
                post_staged(t, Place(share, piece), lease, span)


def shares_of(grant: Grant, lease: Lease | None) -> Iterator[tuple[Lease | None, int, int]]:
    """(lease, first token, last token + 1) of what goes through staging, and of what goes directly."""
    start, stop = grant.token_start, grant.token_stop
    if lease is not None:
        held = min(stop, lease.token_stop)
        yield lease, start, held
        if held == stop:
            return
        start = held
    yield None, start, stop


def check_final(t: Transfer, part: PartPlan, chunk: Chunk) -> None:
    """A slot's content changes with every token, so that before the last ones there is nothing to send."""
    outgoing = t.as_source()
    if chunk.layers is None or outgoing.at_most or 0 < chunk.token_stop < outgoing.token_count:
        raise LocalProtocolError(
            f"pool {part.id.pool!r}: a slot was submitted with the {chunk}; submit it with the last chunk, or its "
            "layers with those of the last tokens",
            room=t.key.room,
        )


def post_direct(t: Transfer, place: Place, part: PartPlan, span: Grant, grant: Grant) -> None:
    """From our pages into the target's, one entry for each lane and block."""
    (index, _), piece = place.share, place.piece
    source, target = part.entries(
        piece.blocks,
        np.asarray(span.units, dtype=np.int64),
        span.token_start // part.source.unit_rows if part.paged else 0,
        np.asarray(grant.units, dtype=np.int64),
        grant.token_start // part.target.unit_rows if part.paged else 0,
        piece.lanes,
    )
    size, settings = piece.bytes, t.context.settings
    count = min(len(source), max(-(-size // settings.write_bytes), -(-len(source) // settings.write_entries)))
    if count == 1:
        post(t, PostWrite(t.context.mint_write(t), t.peer, index, source, target, size), place)
        return
    for s_entries, t_entries in zip(np.array_split(source, count), np.array_split(target, count), strict=True):
        post(t, PostWrite(t.context.mint_write(t), t.peer, index, s_entries, t_entries, size // count), place)


def post_staged(t: Transfer, place: Place, lease: Lease, span: Grant) -> None:
    """Gathered, one run for each slot of the target's staging memory."""
    (index, _), part = place.share, lease.staged.part
    first_page = span.token_start // part.source.unit_rows if part.paged else 0
    units = np.asarray(span.units, dtype=np.int64)
    for slot, within, run in lease.runs(place.piece.blocks):
        entries = part.source_blocks(run, units, first_page)
        staged = StagedRun(lease.staged, slot, within, len(run))
        size = len(run) * part.block_bytes
        post(t, PostWrite(t.context.mint_write(t), t.peer, index, entries, NO_ENTRIES, size, staged), place)


def post(t: Transfer, write: PostWrite, place: Place) -> None:
    t.as_source().outstanding[write.write] = place
    t.context.emit(write)


def shorten(outgoing: Outgoing, token_count: int) -> None:
    """The prompt has so many tokens: the target granted units for at most as many as it may have."""
    outgoing.token_count = token_count
    outgoing.parts = parts_of(outgoing.pair, up_to(outgoing.grants.values(), token_count))


def check_complete(t: Transfer, chunk: Chunk) -> None:
    outgoing = t.as_source()
    paged = any(span.token_stop for span in chunk.spans)
    if paged and outgoing.at_most and chunk.token_stop <= outgoing.token_count:
        shorten(outgoing, chunk.token_stop)
    if paged and chunk.token_stop != outgoing.token_count:
        raise LocalProtocolError(
            f"the last chunk ends at token {chunk.token_stop}, the decode rank expects {outgoing.token_count}: "
            "both sides must see the same prompt",
            room=t.key.room,
        )
    missing = set(outgoing.parts).difference(outgoing.posted)
    if missing:
        raise LocalProtocolError(
            f"the last chunk was submitted but these parts are not complete: {describe(tuple(missing))}",
            room=t.key.room,
        )


def withdraw_chunks(t: Transfer, now: float, _: object) -> None:
    outgoing = t.as_source()
    t.context.emit(CancelWrites(frozenset(outgoing.outstanding)))
    for share, coverage in outgoing.coverage.items():
        coverage.withdraw(place.piece for place in outgoing.outstanding.values() if place.share == share)
    outgoing.last_submitted = False
    t.set_deadline(now, t.context.settings.waiting_timeout)


def write_settled(t: Transfer, now: float, detail: object) -> None:
    t.as_source().outstanding.pop(WriteId(expect(detail, int)), None)
    if t.state is State.SENDING:
        t.set_deadline(now, t.context.settings.waiting_timeout)
        conclude_if_settled(t, now)
    elif not t.as_source().outstanding:
        drained_here(t, now)


def conclude_if_settled(t: Transfer, now: float) -> None:
    outgoing = t.as_source()
    if outgoing.last_submitted and not outgoing.outstanding:
        outgoing.exposed_seconds = max(0.0, now - outgoing.last_submitted_at)
        t.enter(State.DELIVERED)
        t.retry_pause = t.context.settings.retry_seconds
        t.set_deadline(now, t.context.settings.announce_seconds)
        send_done(t, now, None)


def send_done(t: Transfer, now: float, _: object) -> None:
    outgoing = t.as_source()
    t.context.send(
        t,
        Done(
            sender=t.context.instance,
            receiver=t.peer,
            key=t.key,
            parts=outgoing.parts,
            token_count=outgoing.token_count,
            exposed_seconds=min(outgoing.exposed_seconds, MAX_SECONDS),
        ),
    )
    t.retry_later(now)


def write_broken(t: Transfer, now: float, detail: object) -> None:
    """The write stays outstanding: it may have put bytes on the wire. Only cutting the peer off settles it."""
    cause = expect(detail, KVBatonError)
    t.context.emit(FencePeer(t.peer))
    if t.state is State.SENDING:
        fail_sending(
            t,
            now,
            DisconnectedError(
                f"the connection to the decode rank broke, send the request again: {cause.message}",
                peer=t.peer,
                room=t.key.room,
            ),
        )


def give_up_source(t: Transfer, now: float, detail: object) -> None:
    fail_sending(t, now, expect(detail, KVBatonError))


def expire_source(t: Transfer, now: float, _: object) -> None:
    if t.as_source().outstanding:
        waited_for = "the writes made no progress"
    else:
        waited_for = "no chunk was submitted" if t.state is State.WAITING else "no further chunk was submitted"
    seconds = t.context.settings.waiting_timeout
    fail_sending(t, now, ExpiredError(f"{waited_for} for {seconds:g} s", peer=t.peer, room=t.key.room))


def fail_sending(t: Transfer, now: float, error: KVBatonError) -> None:
    """Fail, tell the target at once, and wait for our own writes before saying that we are drained."""
    t.error = t.error or error
    outgoing = t.as_source()
    t.enter(State.SETTLING)
    if not outgoing.outstanding:
        drained_here(t, now)
        return
    t.context.emit(CancelWrites(frozenset(outgoing.outstanding)))
    t.set_deadline(now, t.context.settings.settle_seconds)
    send_failed(t, now, None)


def target_aborted(t: Transfer, now: float, detail: object) -> None:
    abort = expect(detail, Abort)
    t.as_source().abort_arrived = True
    fail_sending(t, now, from_code(abort.code, abort.reason, peer=t.peer, room=t.key.room))


def note_abort(t: Transfer, _now: float, _: object) -> None:
    t.as_source().abort_arrived = True


def cut_off(t: Transfer, _now: float, _: object) -> None:
    t.context.emit(FencePeer(t.peer))


def fenced(t: Transfer, now: float, _: object) -> None:
    outgoing = t.as_source()
    outgoing.fenced = outgoing.fenced or bool(outgoing.outstanding)
    outgoing.outstanding.clear()
    t.error = t.error or DisconnectedError(
        "the connection to the decode rank broke, send the request again", peer=t.peer, room=t.key.room
    )
    if t.state is not State.SETTLING:
        t.enter(State.SETTLING)
    drained_here(t, now)


def drained_here(t: Transfer, now: float) -> None:
    """Nothing of ours is in flight any more: say so, in answer to an abort or of our own accord."""
    if t.as_source().abort_arrived:
        t.enter(State.CLOSED)
        send_drained(t, now, None)
        return
    t.enter(State.FAILING)
    t.set_deadline(now, t.context.settings.announce_seconds)
    send_failed(t, now, None)


def send_failed(t: Transfer, now: float, _: object) -> None:
    error = t.error or InternalError("failing without a cause")
    t.context.send(
        t,
        Failed(
            sender=t.context.instance,
            receiver=t.peer,
            key=t.key,
            code=error.code,
            reason=clip(error.message),
            drained=t.state is not State.SETTLING,
            fenced=t.as_source().fenced,
        ),
    )
    t.retry_later(now)


def send_drained(t: Transfer, _now: float, _: object) -> None:
    t.context.send(t, Drained(sender=t.context.instance, receiver=t.peer, key=t.key, fenced=t.as_source().fenced))


def abort_delivered(t: Transfer, now: float, detail: object) -> None:
    abort = expect(detail, Abort)
    t.error = from_code(abort.code, abort.reason, peer=t.peer, room=t.key.room)
    finish(t, now, None)
    send_drained(t, now, None)


def abort_failing(t: Transfer, now: float, _: object) -> None:
    finish(t, now, None)
    send_drained(t, now, None)


def closed_by_target(t: Transfer, now: float, detail: object) -> None:
    if not expect(detail, Close).success:
        t.error = t.error or TransferFailedError(
            "the decode rank rejected what was delivered", peer=t.peer, room=t.key.room
        )
    finish(t, now, None)


def closed_early(t: Transfer, now: float, _: object) -> None:
    """A target closes only what has ended for it: it has failed, and its Abort is still to come or was lost."""
    t.as_source().abort_arrived = True
    fail_sending(t, now, TransferFailedError("the decode rank closed the room", peer=t.peer, room=t.key.room))


def never_confirmed(t: Transfer, now: float, _: object) -> None:
    seconds = t.context.settings.announce_seconds
    t.error = ExpiredError(
        f"the decode rank did not confirm the delivery within {seconds:g} s", peer=t.peer, room=t.key.room
    )
    finish(t, now, None)


def lose_target(t: Transfer, now: float, detail: object) -> None:
    """The target is silent: our writes must not outlive the room, so cut it off if any are out."""
    t.error = t.error or expect(detail, KVBatonError)
    if t.as_source().outstanding:
        fail_sending(t, now, t.error)
        t.context.emit(FencePeer(t.peer))
    else:
        finish(t, now, None)


def finish(t: Transfer, _now: float, _: object) -> None:
    t.enter(State.CLOSED)


def answer_late_open(t: Transfer, now: float, _: object) -> None:
    """A late copy of an Open, or a Query, of a transfer that has ended: say how, so that the target does not wait."""
    if t.error is not None:
        send_failed(t, now, None)
    else:
        send_done(t, now, None)
    t.context.cancel_timers(t)

"""What a transfer does at its target: open, wait for the proof of delivery, close; or drain.

Handlers of the table: ``(transfer, now, detail)``. See ``transfer`` for the states.
"""

from __future__ import annotations

import numpy as np

from kvbaton.errors import (
    ExpiredError,
    InternalError,
    KVBatonError,
    RemoteProtocolError,
    TransferFailedError,
    from_code,
)
from kvbaton.protocol.effects import Quiesce, Scatter
from kvbaton.protocol.grants import parts_of, up_to
from kvbaton.protocol.messages import Abort, Close, Done, Drained, Failed, Open, Opened, Query, StagingGrant, clip
from kvbaton.protocol.transfer import State, Transfer, describe, expect

#: Longest pause between two queries, as a share of the time that a room may wait without progress.
QUERY_SHARE = 0.125


def send_open(t: Transfer, now: float, _: object = None) -> None:
    incoming = t.as_target()
    message = Open(
        sender=t.context.instance,
        receiver=t.peer,
        key=t.key,
        token_count=incoming.prompt.token_count,
        grants=incoming.grants,
        parts=incoming.parts,
        ttl_seconds=t.context.settings.waiting_timeout,
        staging=tuple(StagingGrant(part, lease.slots) for part, lease in incoming.leases.items()),
        begun=incoming.begun,
        at_most=incoming.at_most,
    )
    t.context.send(t, message)
    t.retry_later(now)


def opened(t: Transfer, now: float, detail: object) -> None:
    note_moving(t, now, detail)
    t.enter(State.OPENED)
    t.set_deadline(now, t.context.settings.waiting_timeout)
    t.retry_pause = t.context.settings.retry_most_seconds
    ask_later(t, now)


def note_moving(t: Transfer, _now: float, detail: object) -> None:
    t.as_target().moving |= expect(detail, Opened).moving


def query(t: Transfer, now: float, _: object) -> None:
    """Prefill may take long, and many rooms wait for it: the longer one has waited, the less often it asks."""
    settings = t.context.settings
    t.context.send(t, Query(sender=t.context.instance, receiver=t.peer, key=t.key))
    t.retry_pause = min(2 * t.retry_pause, max(settings.retry_most_seconds, QUERY_SHARE * settings.waiting_timeout))
    ask_later(t, now)


def ask_later(t: Transfer, now: float) -> None:
    """Rooms that were opened together do not ask together: thousands may wait."""
    t.context.ask_later(t, now, t.retry_pause * (1 + t.key.id % 16 / 16))


def delivered(t: Transfer, now: float, detail: object) -> None:
    done = expect(detail, Done)
    incoming = t.as_target()
    incoming.exposed_seconds = done.exposed_seconds
    prompt = incoming.prompt
    if incoming.at_most and incoming.pair is not None and done.token_count <= prompt.token_count:
        incoming.grants = up_to(incoming.grants, done.token_count)
        incoming.parts = parts_of(incoming.pair, incoming.grants)
        incoming.bytes = sum(part.bytes for part in incoming.parts)
    if prompt.at_most and done.token_count < prompt.token_count:  # the first source to say it; the others must agree
        prompt.token_count = done.token_count
    prompt.at_most = False
    if frozenset(done.parts) != frozenset(incoming.parts) or done.token_count != prompt.token_count:
        t.error = RemoteProtocolError(
            f"the source wrote {describe(done.parts)} for {done.token_count} tokens, the manifest says "
            f"{describe(incoming.parts)} for {prompt.token_count}",
            peer=t.peer,
            room=t.key.room,
        )
    else:
        scatter(t)
    close(t, now, detail)


def scatter(t: Transfer) -> None:
    """What came by way of staging goes to its pages before anybody hears of the success."""
    incoming = t.as_target()
    grants = {grant.pool: grant for grant in incoming.grants}
    for part_id, lease in incoming.leases.items():
        part, grant = lease.staged.part, grants[part_id.pool]
        first_page = grant.token_start // part.target.unit_rows if part.paged else 0
        units = np.asarray(grant.units, dtype=np.int64)
        blocks = part.blocks(grant.token_start, grant.token_stop)
        for slot, _, run in lease.runs(blocks):
            entries = part.target_blocks(run, units, first_page)
            t.context.emit(Scatter(t.key.room, lease.staged, slot, len(run), entries))


def close(t: Transfer, _now: float, _: object) -> None:
    """The source has proven that it is finished with our memory: nothing is owed but the acknowledgement."""
    t.enter(State.CLOSED)
    acknowledge_outcome(t, _now, None)


def acknowledge_outcome(t: Transfer, _now: float, _: object) -> None:
    t.context.send(t, Close(sender=t.context.instance, receiver=t.peer, key=t.key, success=t.error is None))


def source_failed(t: Transfer, now: float, detail: object) -> None:
    failed = expect(detail, Failed)
    if t.error is None:
        t.error = from_code(failed.code, failed.reason, peer=t.peer, room=t.key.room)
    if failed.drained and failed.fenced:
        quiesce(t)
    elif failed.drained:
        close(t, now, detail)
    elif t.state is not State.DRAINING:
        drain(t, now)


def give_up_opened(t: Transfer, now: float, detail: object) -> None:
    t.error = expect(detail, KVBatonError)
    drain(t, now)


def expire_opened(t: Transfer, now: float, _: object) -> None:
    waited_for = "acknowledge the room" if t.state is State.OPENING else "deliver"
    t.error = ExpiredError(
        f"the prefill rank did not {waited_for} within {t.context.settings.waiting_timeout:g} s",
        peer=t.peer,
        room=t.key.room,
    )
    drain(t, now)


def drain(t: Transfer, now: float) -> None:
    """Bytes may be under way without our having been told, where the two do not hear each other: help them to land."""
    t.as_target().moving = bool(t.as_target().parts)
    t.enter(State.DRAINING)
    t.retry_pause = t.context.settings.retry_seconds
    if not t.as_target().parts:
        t.set_deadline(now, t.context.settings.announce_seconds)
    elif t.context.settings.quarantine_seconds is not None:
        t.set_deadline(now, t.context.settings.quarantine_seconds)
    send_abort(t, now, None)


def send_abort(t: Transfer, now: float, _: object) -> None:
    error = t.error or InternalError("draining without a cause")
    t.context.send(
        t,
        Abort(sender=t.context.instance, receiver=t.peer, key=t.key, code=error.code, reason=clip(error.message)),
    )
    t.retry_later(now)


def lose_source(t: Transfer, now: float, detail: object) -> None:
    t.error = expect(detail, KVBatonError)
    drain(t, now)


def drained(t: Transfer, _now: float, detail: object) -> None:
    if expect(detail, Drained).fenced:
        quiesce(t)
    else:
        t.enter(State.CLOSED)


def quiesce(t: Transfer) -> None:
    """The source can write no more, but was stopped by force: flush what is left on our side of the wire."""
    t.enter(State.QUIESCING)
    t.context.emit(Quiesce(t.peer))


def quiesced(t: Transfer, now: float, _: object) -> None:
    close(t, now, None)


def forgotten(t: Transfer, _now: float, _: object) -> None:
    t.error = t.error or TransferFailedError(
        "the prefill rank does not know this room any more", peer=t.peer, room=t.key.room
    )
    t.enter(State.CLOSED)


def source_gone(t: Transfer, _now: float, detail: object) -> None:
    t.error = t.error or expect(detail, KVBatonError)
    quiesce(t)


def release_by_policy(t: Transfer, _now: float, _: object) -> None:
    """Only set where a policy allows it, or where this rank holds no unit that the peer could write."""
    t.quarantined = bool(t.as_target().parts)
    t.enter(State.CLOSED)

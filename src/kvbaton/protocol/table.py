"""The transition table of a transfer: every state, every event; nothing else decides what a transfer does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvbaton.errors import InternalError, RemoteProtocolError
from kvbaton.protocol import receiving, sending
from kvbaton.protocol.transfer import On, State, Transfer


@dataclass(frozen=True, slots=True)
class Ignored:
    """The event changes nothing here, for a reason."""

    reason: str


@dataclass(frozen=True, slots=True)
class Illegal:
    """No correct peer (for messages) and no correct core (for local events) brings this about."""

    reason: str


Handler = Callable[[Transfer, float, object], None]

_TO_SOURCE = Illegal("this message goes from a target to a source")
_TO_TARGET = Illegal("this message goes from a source to a target")
_NO_WRITES = Illegal("a target posts no writes")
_NO_CHUNKS = Illegal("a target submits no chunks")
_NOTHING_OUT = Illegal("no write of this transfer is out; of a fenced one no report is passed on")
_ALL_THERE = Ignored("everything is delivered; what was withdrawn is submitted again for other targets")
_STALE = Ignored("a late copy of a message that was acted on")
_NO_TIMER = Illegal("no such timer is set in this state")
_ENDED = Ignored("the transfer has ended")
_ENDED_ALONE = Illegal("only live transfers hear of their peer")
_TARGET_NEVER: dict[On, Handler | Ignored | Illegal] = {
    On.OPEN_ARRIVED: _TO_SOURCE,
    On.CLOSE_ARRIVED: _TO_SOURCE,
    On.ABORT_ARRIVED: _TO_SOURCE,
    On.QUERY_ARRIVED: _TO_SOURCE,
    On.CHUNK_SUBMITTED: _NO_CHUNKS,
    On.CHUNKS_WITHDRAWN: _NO_CHUNKS,
    On.WRITE_UNDER_WAY: _NO_WRITES,
    On.WRITE_SETTLED: _NO_WRITES,
    On.WRITE_BROKEN: _NO_WRITES,
    On.PEER_FENCED: Illegal("a fence is for those that write to the peer; it says nothing of its writes towards us"),
    On.PEER_QUIESCED: Ignored("asked for another transfer with the same peer"),
}
_SOURCE_NEVER: dict[On, Handler | Ignored | Illegal] = {
    On.OPENED_ARRIVED: _TO_TARGET,
    On.DONE_ARRIVED: _TO_TARGET,
    On.FAILED_ARRIVED: _TO_TARGET,
    On.DRAINED_ARRIVED: _TO_TARGET,
    On.FORGOTTEN_ARRIVED: _TO_TARGET,
    On.PEER_QUIESCED: Ignored("asked for a transfer in the other direction"),
}

#: Every (state, event): a handler, a reason to ignore it, or why it cannot be.
TABLE: dict[State, dict[On, Handler | Ignored | Illegal]] = {
    State.OPENING: {
        **_TARGET_NEVER,
        On.OPENED_ARRIVED: receiving.opened,
        On.DONE_ARRIVED: receiving.delivered,
        On.FAILED_ARRIVED: receiving.source_failed,
        On.DRAINED_ARRIVED: Illegal("drained answers an abort, and none was sent"),
        On.FORGOTTEN_ARRIVED: Illegal("forgotten answers a query, and none was sent"),
        On.GIVEN_UP: receiving.give_up_opened,
        On.DEADLINE_REACHED: receiving.expire_opened,
        On.RETRY_DUE: receiving.send_open,
        On.PEER_LOST: receiving.lose_source,
        On.PEER_GONE: receiving.source_gone,
    },
    State.OPENED: {
        **_TARGET_NEVER,
        On.OPENED_ARRIVED: receiving.note_moving,
        On.DONE_ARRIVED: receiving.delivered,
        On.FAILED_ARRIVED: receiving.source_failed,
        On.DRAINED_ARRIVED: Illegal("drained answers an abort, and none was sent"),
        On.FORGOTTEN_ARRIVED: receiving.forgotten,
        On.GIVEN_UP: receiving.give_up_opened,
        On.DEADLINE_REACHED: receiving.expire_opened,
        On.RETRY_DUE: receiving.query,
        On.PEER_LOST: receiving.lose_source,
        On.PEER_GONE: receiving.source_gone,
    },
    State.DRAINING: {
        **_TARGET_NEVER,
        On.OPENED_ARRIVED: receiving.note_moving,
        On.DONE_ARRIVED: receiving.close,
        On.FAILED_ARRIVED: receiving.source_failed,
        On.DRAINED_ARRIVED: receiving.drained,
        On.FORGOTTEN_ARRIVED: receiving.forgotten,
        On.GIVEN_UP: Ignored("given up already"),
        On.DEADLINE_REACHED: receiving.release_by_policy,
        On.RETRY_DUE: receiving.send_abort,
        On.PEER_LOST: Ignored("losing a source proves nothing about its writes"),
        On.PEER_GONE: receiving.source_gone,
    },
    State.QUIESCING: {
        **_TARGET_NEVER,
        On.OPENED_ARRIVED: _STALE,
        On.DONE_ARRIVED: Illegal("a source that was stopped by force had not delivered"),
        On.FAILED_ARRIVED: Ignored("acknowledged once quiesced; repeated until then"),
        On.DRAINED_ARRIVED: _STALE,
        On.FORGOTTEN_ARRIVED: _STALE,
        On.GIVEN_UP: Ignored("given up already"),
        On.DEADLINE_REACHED: _NO_TIMER,
        On.RETRY_DUE: _NO_TIMER,
        On.PEER_LOST: Ignored("its writes have ended"),
        On.PEER_GONE: Ignored("its writes have ended"),
        On.PEER_QUIESCED: receiving.quiesced,
    },
    State.WAITING: {
        **_SOURCE_NEVER,
        On.OPEN_ARRIVED: sending.acknowledge,
        On.CLOSE_ARRIVED: sending.closed_early,
        On.ABORT_ARRIVED: sending.target_aborted,
        On.QUERY_ARRIVED: sending.acknowledge,
        On.CHUNK_SUBMITTED: sending.send_chunk,
        On.CHUNKS_WITHDRAWN: Ignored("no chunk has been handed to this transfer"),
        On.WRITE_UNDER_WAY: _NOTHING_OUT,
        On.WRITE_SETTLED: _NOTHING_OUT,
        On.WRITE_BROKEN: _NOTHING_OUT,
        On.GIVEN_UP: sending.give_up_source,
        On.DEADLINE_REACHED: sending.expire_source,
        On.RETRY_DUE: _NO_TIMER,
        On.PEER_LOST: sending.lose_target,
        On.PEER_GONE: sending.lose_target,
        On.PEER_FENCED: sending.fenced,
    },
    State.SENDING: {
        **_SOURCE_NEVER,
        On.OPEN_ARRIVED: sending.acknowledge,
        On.CLOSE_ARRIVED: sending.closed_early,
        On.ABORT_ARRIVED: sending.target_aborted,
        On.QUERY_ARRIVED: sending.acknowledge,
        On.CHUNK_SUBMITTED: sending.send_chunk,
        On.CHUNKS_WITHDRAWN: sending.withdraw_chunks,
        On.WRITE_UNDER_WAY: sending.write_under_way,
        On.WRITE_SETTLED: sending.write_settled,
        On.WRITE_BROKEN: sending.write_broken,
        On.GIVEN_UP: sending.give_up_source,
        On.DEADLINE_REACHED: sending.expire_source,
        On.RETRY_DUE: sending.ask_for_help,
        On.PEER_LOST: sending.lose_target,
        On.PEER_GONE: sending.lose_target,
        On.PEER_FENCED: sending.fenced,
    },
    State.DELIVERED: {
        **_SOURCE_NEVER,
        On.OPEN_ARRIVED: sending.send_done,
        On.CLOSE_ARRIVED: sending.closed_by_target,
        On.ABORT_ARRIVED: sending.abort_delivered,
        On.QUERY_ARRIVED: sending.send_done,
        On.CHUNK_SUBMITTED: _ALL_THERE,
        On.CHUNKS_WITHDRAWN: _ALL_THERE,
        On.WRITE_UNDER_WAY: _NOTHING_OUT,
        On.WRITE_SETTLED: _NOTHING_OUT,
        On.WRITE_BROKEN: _NOTHING_OUT,
        On.GIVEN_UP: Ignored("everything is delivered; the outcome is the target's"),
        On.DEADLINE_REACHED: sending.never_confirmed,
        On.RETRY_DUE: sending.send_done,
        On.PEER_LOST: sending.lose_target,
        On.PEER_GONE: sending.lose_target,
        On.PEER_FENCED: Ignored("nothing of this transfer was in flight"),
    },
    State.SETTLING: {
        **_SOURCE_NEVER,
        On.OPEN_ARRIVED: sending.send_failed,
        On.CLOSE_ARRIVED: sending.note_abort,
        On.ABORT_ARRIVED: sending.note_abort,
        On.QUERY_ARRIVED: sending.send_failed,
        On.CHUNK_SUBMITTED: Ignored("the engine has not seen the failure yet"),
        On.CHUNKS_WITHDRAWN: Ignored("the engine has not seen the failure yet"),
        On.WRITE_UNDER_WAY: sending.write_under_way,
        On.WRITE_SETTLED: sending.write_settled,
        On.WRITE_BROKEN: sending.write_broken,
        On.GIVEN_UP: Ignored("failed already"),
        On.DEADLINE_REACHED: sending.cut_off,
        On.RETRY_DUE: sending.send_failed,
        On.PEER_LOST: sending.cut_off,
        On.PEER_GONE: Ignored("whoever has gone is fenced with its session"),
        On.PEER_FENCED: sending.fenced,
    },
    State.FAILING: {
        **_SOURCE_NEVER,
        On.OPEN_ARRIVED: sending.send_failed,
        On.CLOSE_ARRIVED: sending.finish,
        On.ABORT_ARRIVED: sending.abort_failing,
        On.QUERY_ARRIVED: sending.send_failed,
        On.CHUNK_SUBMITTED: Ignored("the engine has not seen the failure yet"),
        On.CHUNKS_WITHDRAWN: Ignored("the engine has not seen the failure yet"),
        On.WRITE_UNDER_WAY: _NOTHING_OUT,
        On.WRITE_SETTLED: _NOTHING_OUT,
        On.WRITE_BROKEN: _NOTHING_OUT,
        On.GIVEN_UP: Ignored("failed already"),
        On.DEADLINE_REACHED: sending.finish,
        On.RETRY_DUE: sending.send_failed,
        On.PEER_LOST: sending.finish,
        On.PEER_GONE: sending.finish,
        On.PEER_FENCED: Ignored("drained already"),
    },
    State.CLOSED: {
        On.OPEN_ARRIVED: sending.answer_late_open,
        On.OPENED_ARRIVED: receiving.acknowledge_outcome,
        On.DONE_ARRIVED: receiving.acknowledge_outcome,
        On.CLOSE_ARRIVED: _STALE,
        On.FAILED_ARRIVED: receiving.acknowledge_outcome,
        On.ABORT_ARRIVED: sending.send_drained,
        On.DRAINED_ARRIVED: _STALE,
        On.QUERY_ARRIVED: sending.answer_late_open,
        On.FORGOTTEN_ARRIVED: _STALE,
        On.CHUNK_SUBMITTED: _ALL_THERE,
        On.CHUNKS_WITHDRAWN: _ALL_THERE,
        On.WRITE_UNDER_WAY: _NOTHING_OUT,
        On.WRITE_SETTLED: _NOTHING_OUT,
        On.WRITE_BROKEN: _NOTHING_OUT,
        On.GIVEN_UP: _ENDED,
        On.DEADLINE_REACHED: _NO_TIMER,
        On.RETRY_DUE: _NO_TIMER,
        On.PEER_LOST: _ENDED_ALONE,
        On.PEER_GONE: _ENDED_ALONE,
        On.PEER_FENCED: _ENDED_ALONE,
        On.PEER_QUIESCED: _ENDED_ALONE,
    },
}


def begin(transfer: Transfer, now: float) -> None:
    """First act of a new transfer: the target opens, or gives up what it has not opened; the source acknowledges."""
    transfer.set_deadline(now, transfer.context.settings.waiting_timeout)
    if transfer.state is State.OPENING and transfer.error is not None:
        receiving.drain(transfer, now)
    elif transfer.state is State.OPENING:
        receiving.send_open(transfer, now)
    else:
        sending.acknowledge(transfer, now, None)


def step(transfer: Transfer, on: On, now: float, detail: object = None) -> None:
    """Apply one event. Raises RemoteProtocolError for a message that no correct peer sends now."""
    rule = TABLE[transfer.state][on]
    if isinstance(rule, Ignored):
        return
    if isinstance(rule, Illegal):
        what = f"{on.value} while {transfer.state.value}: {rule.reason}"
        error = RemoteProtocolError if on.is_message else InternalError
        raise error(what, peer=transfer.peer, room=transfer.key.room)
    rule(transfer, now, detail)

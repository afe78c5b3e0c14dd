"""Transfers end to end: who learns what, when, and that no page is free while it may be written.

Every scene runs real cores on both ends; the world checks the invariants after every step.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from functools import partial

import pytest

from kvbaton.errors import AbortedError, DisconnectedError, KVBatonError
from kvbaton.protocol.effects import CancelWrites, KVPoll, Report
from kvbaton.protocol.events import (
    AbortRequested,
    Chunk,
    ChunkSubmitted,
    GrantsPublished,
    SenderOpened,
    WriteBroken,
    WriteId,
    WriteSettled,
    WriteUnderWay,
)
from kvbaton.protocol.messages import (
    Abort,
    AnyMessage,
    Close,
    Done,
    Drained,
    Failed,
    Forgotten,
    Grant,
    Open,
    Opened,
    PartBytes,
    Query,
    Role,
)
from kvbaton.protocol.settings import Settings
from kvbaton.protocol.transfer import State
from kvbaton.testing.rank import Rank
from lab.docs.protocol import derive
from unit.protocol.scene import PAIR, QUICK, SHAPES, Fault, Scene, Shape, dropping, holding

STEPS = {(a, b) for edge in derive() for a, b in zip(edge.path, edge.path[1:], strict=False)}
LONG = 3 * (QUICK.waiting_timeout + QUICK.bootstrap_timeout)


# ---- scripts: what the engines do -----------------------------------------------------------------------------------


def deliver(scene: Scene) -> None:
    scene.open_senders()
    scene.open_receivers()
    scene.publish()
    scene.drive(LONG)


def target_aborts(scene: Scene) -> None:
    """The decode engine gives up while the first chunk is on the wire; the writes land late."""
    scene.open_senders()
    scene.open_receivers()
    scene.publish()
    scene.drive(1.0)
    scene.abort("target")
    scene.world.run(until=scene.world.now + 1.0)
    for rank in scene.sources:
        rank.release_writes()
    scene.world.run(until=scene.world.now + LONG)


def source_aborts(scene: Scene) -> None:
    scene.open_senders()
    scene.open_receivers()
    scene.publish()
    scene.drive(1.0)
    scene.abort("source")
    scene.world.run(until=scene.world.now + 1.0)
    for rank in scene.sources:
        rank.release_writes()
    scene.world.run(until=scene.world.now + LONG)


def writes_break(scene: Scene) -> None:
    scene.open_senders()
    scene.open_receivers()
    scene.publish()
    scene.drive(1.0)
    for rank in scene.sources:
        rank.break_writes(landed=rank is scene.source)
    scene.world.run(until=scene.world.now + LONG)


SCRIPTS: dict[str, Callable[[Scene], None]] = {
    "deliver": deliver,
    "target aborts": target_aborts,
    "source aborts": source_aborts,
    "writes break": writes_break,
}


def run_script(script: str, shape: str, fault: Fault | None = None) -> Scene:
    scene = Scene(SHAPES[shape] if script == "deliver" else holding(SHAPES[shape]))
    if fault is not None:
        scene.world.network = fault
    SCRIPTS[script](scene)
    expect_known_steps(scene)
    return scene


def expect_known_steps(scene: Scene) -> None:
    """Every change of state in the stories is one that the diagram in docs/protocol.md shows."""
    entered = re.compile(r"^(\S+ with \S+) (\w+)(?:: .*)?$")
    for rank in scene.ranks:
        last: dict[str, State] = {}
        for line in rank.core.trace_and_state(scene.room):
            match = entered.match(line.text)
            if match:
                state = State(match[2])
                if match[1] in last:
                    assert (last[match[1]], state) in STEPS, (line, scene.explain())
                last[match[1]] = state


def messages(script: str, shape: str) -> int:
    """How many messages a run without faults sends before the heartbeats begin to matter."""
    scene = run_script(script, shape)
    return next((i for i, (at, *_) in enumerate(scene.world.trace) if at >= 5.0), len(scene.world.trace))


CASES = [
    pytest.param(script, shape, Fault(kind, index), id=f"{script}-{shape}-{kind}-{index}")
    for script in SCRIPTS
    for shape in SHAPES
    if script == "deliver" or shape in ("1→1", "2→1", "1→2", "bystander")
    for kind in ("lost", "doubled", "delayed")
    for index in range(messages(script, shape))
]


@pytest.mark.parametrize(("script", "shape", "fault"), CASES)
def test_any_one_message_may_be_lost_doubled_or_late(script: str, shape: str, fault: Fault) -> None:
    scene = run_script(script, shape, Fault(fault.kind, fault.index))
    if script == "deliver":
        scene.expect_success()
    else:
        scene.expect_failed()


# ---- the happy path -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_arrive(shape: str) -> None:
    scene = run_script("deliver", shape)
    scene.expect_success()
    assert scene.world.now < 2.0
    assert not any(rank.core.counters["messages_forbidden"] for rank in scene.ranks)


def test_waiting_for_input_only_after_every_target_has_opened() -> None:
    scene = Scene(SHAPES["1→2"])
    scene.open_senders()
    scene.open_receivers()
    scene.world.run()
    for rank, poll in zip(scene.targets, (KVPoll.Bootstrapping, KVPoll.WaitingForInput), strict=True):
        rank.do(GrantsPublished(scene.room, scene.grants(rank), scene.shape.tokens))
        scene.world.run()
        assert scene.status("source").poll is poll
    scene.submit_all()
    scene.expect_success()


def test_a_chunk_that_comes_before_the_open_is_sent_when_it_comes() -> None:
    scene = Scene()
    scene.open_senders()
    scene.submit_all()
    scene.open_receivers()
    scene.publish()
    scene.world.run()
    scene.expect_success()


def test_a_bystander_is_told_and_concludes() -> None:
    scene = Scene(SHAPES["bystander"])
    scene.start()
    bystander = scene.sources[1]
    assert bystander.status("source", scene.room).poll is KVPoll.WaitingForInput
    scene.submit_all()
    assert bystander.status("source", scene.room).poll is KVPoll.Success
    assert bystander.status("source", scene.room).bytes == 0
    scene.expect_success()


def test_a_full_prefix_hit_moves_the_aux_row_alone() -> None:
    scene = run_script("deliver", "hit")
    scene.expect_success()
    done = next(message for _, _, _, message in scene.world.trace if isinstance(message, Done))
    assert [part.part.pool for part in done.parts] == ["aux"]
    assert scene.status("target").bytes == 8


def test_a_prefix_is_told_to_the_source_and_not_sent() -> None:
    scene = Scene(SHAPES["prefix"])
    scene.start()
    assert scene.status("source").prefix_len == 8
    scene.submit_all()
    scene.expect_success()
    full = run_script("deliver", "1→1")
    assert scene.status("target").bytes < full.status("target").bytes


def test_no_prefix_is_told_before_a_target_has_opened() -> None:
    scene = Scene(SHAPES["prefix"])
    scene.open_senders()
    assert scene.status("source").prefix_len == 0


def test_chunks_may_begin_at_the_prefix() -> None:
    scene = Scene(Shape(prefix=8))
    scene.start()
    units = scene.source_units()
    scene.source.do(
        ChunkSubmitted(scene.room, Chunk(spans=(Grant("kv", 8, 22, tuple(units[2:])), slot(scene)), last=True))
    )
    scene.world.run()
    scene.expect_success()


def slot(scene: Scene) -> Grant:
    return Grant("aux", 0, 0, (scene.room % 3,))


def test_rooms_do_not_mix() -> None:
    scene = Scene(Shape(tokens=10, chunks=(10,)))
    for room in (1, 2, 3):
        scene.open_senders(room)
        scene.open_receivers(room)
    for room in (3, 1, 2):
        scene.publish(room)
    scene.world.run()
    expected = {}
    for room in (2, 3, 1):
        scene.submit(0, room)
        scene.world.run()
        expected[room] = scene.status("target", room).poll
        scene.expect_bytes(room)
    assert set(expected.values()) == {KVPoll.Success}


def test_writes_are_cut_into_pieces_within_the_settings() -> None:
    settings = Settings(write_bytes=64, write_entries=3)
    scene = Scene(holding(PAIR), settings=settings)
    scene.start()
    scene.submit_all()
    assert len(scene.source.held) > 4
    assert all(write.bytes <= 64 and len(write.source_entries) <= 3 for write in scene.source.held)
    scene.source.release_writes()
    scene.world.run()
    scene.expect_success()


@pytest.mark.parametrize(("bound", "writes"), [({"write_bytes": 64}, 13), ({"write_entries": 3}, 9), ({}, 3)])
def test_a_write_says_how_many_bytes_it_moves(bound: dict[str, int], writes: int) -> None:
    """Each chunk holds 12 entries of 32 bytes; the aux row goes with the last one."""
    scene = Scene(holding(PAIR), settings=Settings(**bound))  # type: ignore[arg-type]
    scene.start()
    scene.submit_all()
    assert len(scene.source.held) == writes
    parts = scene.source.pairs["i-d0"].parts
    for write in scene.source.held:
        assert write.bytes == parts[write.part].source.table.lengths(write.source_entries).sum()
    assert scene.status("source").bytes == sum(write.bytes for write in scene.source.held)
    assert scene.status("target").bytes == scene.status("source").bytes


def test_the_exposed_time_is_from_the_last_chunk_to_its_last_write_at_the_slowest_source() -> None:
    scene = Scene(holding(SHAPES["2→1"]))
    scene.start()
    scene.submit(0)
    scene.world.run(until=1.0)
    scene.submit(1)
    for rank, at in zip(scene.sources, (1.5, 3.0), strict=True):
        scene.world.run(until=at)
        rank.release_writes()
    scene.world.run()
    assert [rank.status("source", scene.room).exposed_seconds for rank in scene.sources] == [0.5, 2.0]
    assert scene.status("target").exposed_seconds == 2.0


def test_the_source_is_free_before_the_target_confirms() -> None:
    """Every write has settled: nothing reads the source's units any more, whatever becomes of Done."""
    scene = Scene()
    scene.start()
    scene.world.network = dropping(Done)
    scene.submit(0)
    assert scene.status("source").leased
    scene.submit(1)
    scene.world.run()
    assert scene.status("source").poll is KVPoll.Transferring
    assert not scene.status("source").leased
    assert scene.status("target").leased


def test_a_chunk_is_leased_from_its_submission_on_even_if_no_target_has_opened_yet() -> None:
    scene = Scene()
    scene.open_senders()
    assert not scene.status("source").leased
    for chunk in range(len(scene.shape.chunks)):
        scene.submit(chunk)
        assert scene.status("source").poll is KVPoll.Bootstrapping
        assert scene.status("source").leased


def test_an_open_is_repeated_ever_more_slowly_up_to_a_bound() -> None:
    scene = Scene()
    scene.world.network = dropping(Opened)
    scene.start()
    scene.world.run(until=20.0)
    opens = [at for at, _, _, m in scene.world.trace if isinstance(m, Open)]
    assert opens == [0.0, 0.5, 1.5, 3.5, 7.5, 12.5, 17.5]


def test_silence_is_asked_about() -> None:
    scene = Scene()
    scene.start()
    scene.world.network = lambda _from, _to, message: 0 if isinstance(message, Done) and scene.world.now < 4.9 else 1
    scene.submit_all()
    scene.world.run(until=6.0)
    before = next(i for i, (*_, m) in enumerate(scene.world.trace) if isinstance(m, Query))
    first = QUICK.retry_most_seconds
    assert first <= scene.world.trace[before][0] < 2 * first
    scene.expect_success()


def test_silence_is_asked_about_again_until_there_is_an_answer() -> None:
    scene = Scene()
    scene.world.network = dropping(Query)
    scene.start()
    scene.world.run(until=20.0)
    asked = [at for at, *_, m in scene.world.trace if isinstance(m, Query)]
    assert len(asked) >= 3
    assert all(5.0 <= later - earlier < 10.0 for earlier, later in itertools.pairwise([0.0, *asked]))


# ---- abort by the target --------------------------------------------------------------------------------------------

PHASES = ("bootstrapping", "waiting", "one chunk", "all chunks", "delivered")


def bring_to(scene: Scene, phase: str) -> None:
    """All writes are held (but for ``delivered``), so what was posted may still touch memory."""
    scene.open_senders()
    scene.open_receivers()
    scene.world.run()
    if phase == "bootstrapping":
        return
    scene.publish()
    scene.world.run()
    if phase == "waiting":
        return
    scene.submit(0)
    if phase != "one chunk":
        scene.submit(1)
    if phase == "delivered":
        scene.world.network = dropping(Done)
        for rank in scene.sources:
            rank.release_writes()
    scene.world.run()


@pytest.mark.parametrize("phase", PHASES)
def test_an_abort_by_the_target_ends_leases_only_after_drained(phase: str) -> None:
    scene = Scene(holding(PAIR))
    bring_to(scene, phase)
    held = bool(scene.source.held)
    scene.abort("target")
    assert scene.status("target").poll is KVPoll.Failed  # at once
    assert scene.status("target").leased == (phase != "bootstrapping")
    scene.world.run(until=scene.world.now + QUICK.settle_seconds - 1.0)
    assert scene.status("target").leased == held, scene.explain()
    assert scene.status("source").leased == held, scene.explain()
    scene.world.network = lambda _from, _to, _message: 1
    scene.source.release_writes()
    scene.world.run(until=scene.world.now + LONG)
    scene.expect_failed()
    for side in ("source", "target"):
        if phase != "bootstrapping" or side == "target":
            assert scene.status(side).error.code == "aborted", scene.explain()  # type: ignore[arg-type, union-attr]


@pytest.mark.parametrize("phase", PHASES)
def test_writes_that_never_settle_are_cut_off(phase: str) -> None:
    scene = Scene(holding(PAIR))
    bring_to(scene, phase)
    scene.abort("target")
    scene.world.run(until=scene.world.now + LONG)
    assert not scene.source.held
    scene.expect_failed()


def test_a_target_that_falls_silent_while_we_settle_is_cut_off_at_once() -> None:
    scene = Scene(holding(PAIR), settings=Settings(settle_seconds=1_000.0, announce_seconds=15.0))
    bring_to(scene, "all chunks")
    scene.abort("source")
    scene.world.network = lambda _from, _to, _message: 0
    scene.world.run(until=scene.world.now + QUICK.silence_seconds + QUICK.heartbeat_interval)
    assert not scene.source.held
    assert not scene.status("source").leased
    scene.world.network = lambda _from, _to, _message: 1
    scene.world.run(until=scene.world.now + LONG)
    scene.expect_failed()


def test_drained_follows_the_last_write_and_not_the_abort() -> None:
    scene = Scene(holding(PAIR))
    bring_to(scene, "all chunks")
    scene.abort("target")
    scene.world.run(until=1.0)
    assert not any(isinstance(m, Drained) for *_, m in scene.world.trace)
    held, scene.source.held = scene.source.held, []
    for write in held:
        assert scene.status("target").leased
        assert not any(isinstance(m, Drained) for *_, m in scene.world.trace)
        scene.world.land(scene.source, write)
        scene.source.do(WriteSettled(write.write))
        scene.world.run()
    assert any(isinstance(m, Drained) for *_, m in scene.world.trace)
    assert not scene.status("target").leased


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("forced", [False, True])
def test_a_source_that_has_drained_frees_the_target_which_first_flushes_what_was_cut_off(
    side: Role, forced: bool
) -> None:
    """By its answer to an abort, or of its own accord."""
    scene = Scene(holding(PAIR))
    bring_to(scene, "one chunk")
    scene.target.hold_quiesce = True
    scene.world.network = dropping(Abort) if side == "source" else scene.world.network
    scene.abort(side)
    if forced:
        scene.world.run(until=QUICK.settle_seconds)
    else:
        scene.world.run()
        scene.source.release_writes()
        scene.world.run()
    said = [m for *_, m in scene.world.trace if isinstance(m, Drained) or (isinstance(m, Failed) and m.drained)]
    assert [(type(m), m.fenced) for m in said] == [(Drained if side == "target" else Failed, forced)]
    assert scene.status("target").leased == forced
    scene.target.release_quiesced()
    scene.world.run()
    scene.expect_failed()


def test_a_target_that_drains_is_freed_by_a_source_that_has_forgotten_the_room() -> None:
    """The answer to a question that it asked before it gave up; its Abort is not heard."""
    scene = Scene()
    scene.start()
    scene.world.network = dropping(Abort)
    scene.abort("target")
    assert scene.status("target").leased
    forget(scene)
    assert not scene.status("target").leased
    assert scene.status("target").error.code == "aborted"  # type: ignore[union-attr]


def test_a_room_that_its_source_has_forgotten_has_failed() -> None:
    scene = Scene()
    scene.start()
    forget(scene)
    assert scene.status("target").poll is KVPoll.Failed
    assert not scene.status("target").leased
    assert "does not know this room any more" in str(scene.status("target").error)


def forget(scene: Scene) -> None:
    """The source says that it does not know the transfer."""
    key = next(m.key for *_, m in scene.world.trace if isinstance(m, Open))
    forgotten = Forgotten(sender=scene.source.core.instance, receiver=scene.target.core.instance, key=key)
    scene.world.inject(scene.source, scene.target, forgotten)


@pytest.mark.parametrize("state", [State.WAITING, State.DELIVERED, State.FAILING, State.CLOSED])
def test_an_abort_while_no_write_is_out_is_answered_with_drained_at_once_and_ends_the_room(state: State) -> None:
    scene = Scene()
    scene.start()
    key = next(m.key for *_, m in scene.world.trace if isinstance(m, Open))
    scene.world.network = dropping(*{State.DELIVERED: (Done,), State.FAILING: (Failed,)}.get(state, ()))
    if state in (State.DELIVERED, State.CLOSED):
        scene.submit_all()
    elif state is State.FAILING:
        scene.abort("source")
    abort = Abort(
        sender=scene.target.core.instance, receiver=scene.source.core.instance, key=key, code="aborted", reason=""
    )
    assert answers(scene, scene.target, scene.source, abort) == [Drained]
    assert scene.source.core.counters[f"{state.value}:Abort"] == 1
    assert scene.source.core.live_rooms == 0


def test_an_abort_that_comes_while_the_source_settles_is_answered_by_drained_and_ends_the_room() -> None:
    """The target has proof with that: no failure is left to be told again until it closes."""
    scene = Scene(holding(PAIR))
    bring_to(scene, "one chunk")
    scene.abort("source")
    scene.world.run()
    assert scene.source.core.counters["settling:Abort"] == 1
    since = len(scene.world.trace)
    scene.source.release_writes()
    assert scene.source.core.live_rooms == 0
    scene.world.run()
    assert [type(m) for *_, m in scene.world.trace[since:]] == [Drained]
    scene.expect_failed()


# ---- abort by the source, broken writes -----------------------------------------------------------------------------


@pytest.mark.parametrize("phase", PHASES[1:-1])
def test_an_abort_by_the_source_reaches_the_target_at_once(phase: str) -> None:
    scene = Scene(holding(PAIR))
    bring_to(scene, phase)
    scene.abort("source", "evicted")
    scene.world.run()
    status = scene.status("target")
    assert status.poll is KVPoll.Failed
    assert isinstance(status.error, AbortedError)
    assert status.error.message == "evicted"
    assert status.leased == bool(scene.source.held)
    scene.source.release_writes()
    scene.world.run(until=LONG)
    scene.expect_failed()


def test_an_abort_after_the_delivery_leaves_the_outcome_to_the_target() -> None:
    scene = Scene(holding(PAIR))
    bring_to(scene, "delivered")
    scene.abort("source")
    scene.world.network = lambda _from, _to, _message: 1
    scene.world.run(until=LONG)
    assert scene.status("target").poll is KVPoll.Success
    assert scene.status("source").poll is KVPoll.Failed
    scene.expect_over()


def test_a_source_that_fails_cancels_its_writes_that_wait_in_its_own_queue() -> None:
    scene = Scene(holding(PAIR))
    bring_to(scene, "all chunks")
    aborted = AbortRequested(scene.room, "source", AbortedError("evicted"))
    effects = scene.source.core.handle(aborted, scene.world.now)
    cancelled = [effect.writes for effect in effects if isinstance(effect, CancelWrites)]
    assert cancelled == [{write.write for write in scene.source.held}]


def test_a_failure_is_told_again_while_the_writes_settle() -> None:
    scene = Scene(holding(PAIR))
    bring_to(scene, "one chunk")
    scene.world.network = dropping(Failed)
    scene.abort("source")
    scene.world.run(until=QUICK.settle_seconds - 0.1)
    told = [(at, m.drained) for at, *_, m in scene.world.trace if isinstance(m, Failed)]
    assert told == [(0.0, False), (0.5, False), (1.5, False), (3.5, False)]


def test_a_failure_is_told_again_ever_more_slowly_until_the_target_has_confirmed_it() -> None:
    scene = Scene()
    scene.start()
    scene.world.network = dropping(Close)
    scene.abort("source")
    scene.world.run(until=5.0)
    scene.world.network = lambda _from, _to, _message: 1
    scene.world.run(until=QUICK.announce_seconds - 1.0)
    assert [at for at, *_, m in scene.world.trace if isinstance(m, Failed)] == [0.0, 0.5, 1.5, 3.5, 7.5]
    scene.expect_failed()


def test_a_failure_is_no_longer_announced_to_a_target_that_is_lost() -> None:
    scene = Scene(settings=Settings(announce_seconds=1_000.0))
    scene.start()
    scene.world.network = lambda _from, _to, _message: 0
    scene.abort("source")
    assert scene.source.core.live_rooms == 1
    scene.world.run(until=QUICK.silence_seconds + QUICK.heartbeat_interval)
    assert scene.source.core.live_rooms == 0


def test_every_write_that_settles_gives_the_others_their_time_again() -> None:
    scene = Scene(holding(PAIR))
    bring_to(scene, "all chunks")
    scene.world.network = dropping(Abort)  # the target counts from the acknowledgement, and must not be heard first
    settled_at = QUICK.waiting_timeout - 1.0
    scene.world.run(until=settled_at)
    write = scene.source.held.pop()
    scene.world.land(scene.source, write)
    scene.source.do(WriteSettled(write.write))
    scene.world.run(until=settled_at + QUICK.waiting_timeout - 0.1)
    assert scene.status("source").poll is KVPoll.Transferring
    scene.world.run(until=settled_at + QUICK.waiting_timeout)
    assert "the writes made no progress for 30 s" in str(scene.status("source").error)


@pytest.mark.parametrize("landed", [False, True])
@pytest.mark.parametrize("phase", ["one chunk", "all chunks"])
def test_a_broken_write_fails_both_sides_and_cuts_the_peer_off(phase: str, landed: bool) -> None:
    scene = Scene(holding(PAIR))
    bring_to(scene, phase)
    scene.source.break_writes(landed=landed)
    scene.world.run(until=scene.world.now + 1.0)
    scene.expect_failed()
    assert scene.status("source").error.code == scene.status("target").error.code == "disconnected"  # type: ignore[union-attr]


def test_a_broken_write_fails_its_room_at_once_with_the_cause_and_frees_nothing_before_the_fence() -> None:
    scene = Scene(holding(PAIR))
    bring_to(scene, "one chunk")
    broken = WriteBroken(scene.source.held[0].write, DisconnectedError("the wire broke"))
    effects = scene.source.core.handle(broken, scene.world.now)
    (status,) = [effect.status for effect in effects if isinstance(effect, Report)]
    assert status.poll is KVPoll.Failed
    assert "the wire broke" in str(status.error)
    assert status.leased


def test_a_write_that_breaks_while_the_source_settles_is_cut_off_at_once() -> None:
    scene = Scene(holding(PAIR))
    bring_to(scene, "one chunk")
    scene.abort("source")
    scene.world.run()
    scene.source.break_writes(landed=False)
    assert scene.status("source").leased
    scene.world.run()
    scene.expect_failed()


def test_a_room_that_waits_for_input_fails_at_once_when_its_peer_is_fenced_for_another_room() -> None:
    scene = Scene(holding(PAIR))
    bring_to(scene, "one chunk")
    other = scene.room + 1
    scene.open_senders(other)
    scene.open_receivers(other)
    scene.publish(other)
    scene.world.run()
    assert scene.status("source", other).poll is KVPoll.WaitingForInput
    scene.source.break_writes(landed=False)
    scene.world.run()
    scene.expect_failed(other)
    for side in ("source", "target"):
        assert scene.status(side, other).error.code == "disconnected"  # type: ignore[union-attr]


def test_one_broken_write_among_others_leaves_none_in_flight() -> None:
    scene = Scene(holding(PAIR))
    bring_to(scene, "all chunks")
    first = scene.source.held.pop(0)
    kept = list(scene.source.held)
    scene.source.do(WriteBroken(first.write, DisconnectedError("the wire broke")))
    scene.world.run(until=1.0)
    scene.expect_failed()
    for write in (first, *kept):  # reports that come after the fence
        scene.source.do(WriteSettled(write.write))
        scene.source.do(WriteBroken(write.write, DisconnectedError("late")))
    scene.source.do(WriteSettled(WriteId(999)))
    scene.expect_failed()


def asking_first(_from: Rank, _to: Rank, message: AnyMessage, asked: list[AnyMessage]) -> int:
    """A network that loses every Opened until somebody has asked."""
    asked += [message] if isinstance(message, Query) else []
    return 1 if asked or not isinstance(message, Opened) else 0


@pytest.mark.parametrize("asks", [False, True], ids=["the source says it again", "the target asks"])
def test_a_target_learns_that_a_write_needs_its_help_even_where_the_first_message_is_lost(asks: bool) -> None:
    """A room that has waited for long asks seldom, and must not stand still until then."""
    scene = Scene(holding(PAIR))
    scene.start()
    assert scene.target.core.receiving
    assert not scene.target.core.moving
    scene.submit_all()
    scene.world.network = partial(asking_first, asked=[]) if asks else dropping(Opened)
    for write in scene.source.held:
        scene.source.do(WriteUnderWay(write.write))
    scene.world.run()
    assert not scene.target.core.moving
    if not asks:
        scene.world.network = dropping(Query)
    scene.world.run(until=2 * QUICK.retry_most_seconds if asks else QUICK.retry_seconds)
    assert scene.target.core.moving
    scene.source.release_writes()
    scene.world.run()
    scene.expect_success()
    assert not scene.target.core.moving


def test_a_peer_that_was_cut_off_can_be_written_to_again() -> None:
    scene = Scene(holding(PAIR))
    bring_to(scene, "all chunks")
    scene.source.break_writes(landed=False)
    scene.world.run(until=1.0)
    scene.source.hold_writes = False
    scene.room = 8
    scene.start()
    scene.world.run(until=3.0)
    scene.submit_all()
    scene.expect_success()


# ---- processes that die, are replaced, or fall silent ---------------------------------------------------------------


@pytest.mark.parametrize("shape", ["1→1", "2→1", "1→2"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_source_that_dies_is_proof(phase: str, shape: str) -> None:
    scene = Scene(holding(SHAPES[shape]))
    bring_to(scene, phase)
    scene.world.network = lambda _from, _to, _message: 1
    scene.world.kill(scene.source)
    for rank in scene.targets:
        status = rank.status("target", scene.room)
        assert status.poll is KVPoll.Failed, scene.explain()
        assert status.error is not None
        assert status.error.code == "peer_lost"
    for rank in scene.sources:
        rank.release_writes()
    scene.world.run(until=LONG)
    scene.expect_failed()


@pytest.mark.parametrize("phase", PHASES)
def test_a_source_replaced_at_its_address_is_proof(phase: str) -> None:
    scene = Scene(holding(PAIR))
    bring_to(scene, phase)
    scene.world.network = lambda _from, _to, _message: 1
    successor = scene.world.replace(scene.source, "q0")
    assert scene.status("target").poll is KVPoll.Failed, scene.explain()
    assert scene.status("target").error.code == "peer_lost"  # type: ignore[union-attr]
    assert not scene.status("target").leased
    scene.sources = [successor]
    scene.room = 8
    scene.start()
    scene.submit_all()
    scene.expect_success()


@pytest.mark.parametrize("phase", PHASES)
def test_a_target_that_dies_is_lost_and_cut_off(phase: str) -> None:
    scene = Scene(holding(PAIR))
    bring_to(scene, phase)
    scene.world.kill(scene.target)
    scene.world.run(until=scene.world.now + LONG)
    assert not scene.source.held
    scene.expect_failed()


@pytest.mark.parametrize("phase", PHASES[1:])
def test_a_silent_target_is_lost_then_fenced(phase: str) -> None:
    scene = Scene(holding(PAIR))
    bring_to(scene, phase)
    scene.world.network = lambda _from, _to, _message: 0
    silent_at = scene.world.now
    scene.world.run(until=silent_at + QUICK.silence_seconds - 0.1)
    assert scene.status("source").poll is not KVPoll.Failed
    scene.world.run(until=silent_at + QUICK.silence_seconds + QUICK.heartbeat_interval)
    assert scene.status("source").poll is KVPoll.Failed
    assert scene.status("source").error.code == "peer_lost"  # type: ignore[union-attr]
    assert not scene.status("source").leased
    assert scene.status("target").poll is KVPoll.Failed
    assert scene.status("target").leased  # silence proves nothing about the source's writes
    scene.world.network = lambda _from, _to, _message: 1
    scene.world.run(until=scene.world.now + LONG)
    scene.expect_failed()


@pytest.mark.parametrize("phase", PHASES[1:])
def test_no_time_frees_pages_while_the_network_is_down(phase: str) -> None:
    scene = Scene(holding(PAIR))
    bring_to(scene, phase)
    scene.world.network = lambda _from, _to, _message: 0
    scene.world.run(until=2_000.0)
    assert scene.status("target").poll is KVPoll.Failed
    assert scene.status("target").leased
    assert scene.target.core.quarantined == 1
    scene.world.network = lambda _from, _to, _message: 1
    scene.world.run(until=scene.world.now + 60.0)
    assert scene.target.core.quarantined == 0
    scene.expect_failed()


def test_a_policy_may_free_pages_by_time_and_is_counted() -> None:
    settings = Settings(waiting_timeout=30.0, quarantine_seconds=40.0)
    scene = Scene(settings=settings)
    scene.start()
    scene.world.network = lambda _from, _to, _message: 0
    scene.world.run(until=QUICK.silence_seconds + 39.0)
    assert scene.status("target").leased
    assert scene.target.core.counters["leases_released_by_policy"] == 0
    scene.world.run(until=QUICK.silence_seconds + 50.0)
    assert not scene.status("target").leased
    assert scene.target.core.counters["leases_released_by_policy"] == 1
    scene.expect_over()


def test_a_bystander_that_says_nothing_holds_no_lease_and_ends_by_itself() -> None:
    scene = Scene(SHAPES["bystander"])
    scene.start()
    scene.world.network = dropping(Drained, Failed)
    scene.abort("target")
    scene.world.run()
    assert scene.status("target").leased
    scene.world.network = lambda sender, _to, _message: 0 if sender.name == "p1" else 1
    scene.world.run(until=10.0)
    assert not scene.status("target").leased
    scene.world.run(until=LONG)
    assert scene.target.core.counters["leases_released_by_policy"] == 0
    assert scene.target.core.live_rooms == 0


# ---- what a source may get wrong ------------------------------------------------------------------------------------


def expect_source_fails(scene: Scene, code: str, pattern: str) -> None:
    scene.world.run(until=scene.world.now + 1.0)
    scene.expect_failed()
    for side in ("source", "target"):
        error = scene.status(side).error  # type: ignore[arg-type]
        assert isinstance(error, KVBatonError)
        assert error.code == code, repr(error)
        assert re.search(pattern, error.message), error.message


def test_done_that_is_not_the_manifest_fails_both_sides() -> None:
    scene = Scene()
    scene.start()

    def forge(_from: Rank, _to: Rank, message: AnyMessage) -> int | list[AnyMessage]:
        if isinstance(message, Done):
            parts = tuple(PartBytes(part.part, part.bytes - 1) for part in message.parts)
            return [
                Done(sender=message.sender, receiver=message.receiver, key=message.key, parts=parts, token_count=22)
            ]
        return 1

    scene.world.network = forge
    scene.submit_all()
    scene.expect_failed()
    assert scene.status("target").error.code == "protocol"  # type: ignore[union-attr]
    assert "the manifest says" in scene.status("target").error.message  # type: ignore[union-attr]
    assert scene.status("source").error.code == "transfer_failed"  # type: ignore[union-attr]


def test_done_for_another_token_count_fails_both_sides() -> None:
    scene = Scene()
    scene.start()

    def forge(_from: Rank, _to: Rank, message: AnyMessage) -> int | list[AnyMessage]:
        if isinstance(message, Done):
            return [
                Done(
                    sender=message.sender,
                    receiver=message.receiver,
                    key=message.key,
                    parts=message.parts,
                    token_count=21,
                )
            ]
        return 1

    scene.world.network = forge
    scene.submit_all()
    scene.expect_failed()
    assert "for 21 tokens" in scene.status("target").error.message  # type: ignore[union-attr]


def test_prompts_of_different_length_fail_both_sides() -> None:
    scene = Scene()
    scene.start()
    spans = (Grant("kv", 0, 21, tuple(scene.source_units())), slot(scene))
    scene.source.do(ChunkSubmitted(scene.room, Chunk(spans=spans, last=True)))
    expect_source_fails(scene, "misuse", r"ends at token 21, the decode rank expects 22")


def test_a_gap_between_chunks_fails_both_sides() -> None:
    scene = Scene()
    scene.start()
    scene.submit(0)
    units = scene.source_units()
    scene.source.do(
        ChunkSubmitted(scene.room, Chunk(spans=(Grant("kv", 16, 22, tuple(units[4:])), slot(scene)), last=True))
    )
    expect_source_fails(scene, "misuse", r"chunk starts at token 16 but 12 is next")


def test_a_chunk_that_does_not_end_on_a_page_fails_both_sides() -> None:
    scene = Scene()
    scene.start()
    units = scene.source_units()
    scene.source.do(ChunkSubmitted(scene.room, Chunk(spans=(Grant("kv", 0, 10, tuple(units[:3])),), last=False)))
    scene.source.do(
        ChunkSubmitted(scene.room, Chunk(spans=(Grant("kv", 10, 22, tuple(units[2:])), slot(scene)), last=True))
    )
    expect_source_fails(scene, "layout", r"token 10 is no multiple of 4")


@pytest.mark.parametrize("size", [8, 1])
def test_a_last_chunk_without_the_aux_row_fails_both_sides(size: int) -> None:
    scene = Scene(Shape(aux_bytes=size))
    scene.start()
    spans = (Grant("kv", 0, 22, tuple(scene.source_units())),)
    scene.source.do(ChunkSubmitted(scene.room, Chunk(spans=spans, last=True)))
    expect_source_fails(scene, "misuse", rf"not complete: aux items 0..0 \({size} B\)")


def test_a_wrong_chunk_among_writes_in_flight_drains_first() -> None:
    scene = Scene(holding(PAIR))
    scene.start()
    scene.submit(0)
    units = scene.source_units()
    scene.source.do(ChunkSubmitted(scene.room, Chunk(spans=(Grant("kv", 16, 22, tuple(units[4:])),), last=True)))
    scene.world.run(until=1.0)
    assert scene.status("target").poll is KVPoll.Failed
    assert scene.status("target").leased
    scene.submit(1)  # the engine has not seen the failure yet
    scene.source.release_writes()
    expect_source_fails(scene, "misuse", "chunk starts at token 16")


def test_tokens_outside_the_grant_are_the_targets_already() -> None:
    scene = Scene(Shape(tokens=22, prefix=12, chunks=(8, 12, 22)))
    scene.start()
    scene.submit_all()
    scene.expect_success()


# ---- late and foreign messages --------------------------------------------------------------------------------------


def ended() -> Scene:
    scene = Scene()
    scene.start()
    scene.submit_all()
    scene.expect_success()
    return scene


@pytest.mark.parametrize("kind", [Open, Close, Abort, Query, Opened, Done, Failed, Drained])
def test_a_transfer_that_succeeded_stays_so_whatever_comes_late(kind: type) -> None:
    scene = ended()
    key = next(m.key for *_, m in scene.world.trace if isinstance(m, Open))
    late = {type(m): (sender, to, m) for _, sender, to, m in scene.world.trace}
    p, d = scene.source.core.instance, scene.target.core.instance
    late.setdefault(Abort, ("d0", "p0", Abort(sender=d, receiver=p, key=key, code="aborted", reason="late")))
    late.setdefault(Query, ("d0", "p0", Query(sender=d, receiver=p, key=key)))
    late.setdefault(Failed, ("p0", "d0", Failed(sender=p, receiver=d, key=key, code="x", reason="", drained=True)))
    late.setdefault(Drained, ("p0", "d0", Drained(sender=p, receiver=d, key=key)))
    sender, to, message = late[kind]
    for _ in range(2):
        scene.world.inject(scene.world.ranks[sender], scene.world.ranks[to], message)
    scene.expect_success()


def test_a_query_after_the_end_is_answered_with_the_outcome() -> None:
    scene = ended()
    key = next(m.key for *_, m in scene.world.trace if isinstance(m, Open))
    before = len(scene.world.trace)
    query = Query(sender=scene.target.core.instance, receiver=scene.source.core.instance, key=key)
    scene.world.inject(scene.target, scene.source, query)
    assert [type(m) for *_, m in scene.world.trace[before:]] == [Done, Close]


def answers(scene: Scene, sender: Rank, receiver: Rank, message: AnyMessage) -> list[type]:
    """What the receiver of a message says at once."""
    since = len(scene.world.trace)
    scene.world.inject(sender, receiver, message)
    return [type(m) for _, name, _, m in scene.world.trace[since:] if name == receiver.name and m is not message][:1]


@pytest.mark.parametrize("state", [State.DELIVERED, State.SETTLING, State.FAILING])
@pytest.mark.parametrize("asking", [Open, Query])
def test_a_target_that_asks_is_told_the_outcome_at_once_and_does_not_wait_for_the_next_repetition(
    state: State, asking: type
) -> None:
    scene = Scene(holding(PAIR) if state is State.SETTLING else PAIR)
    scene.start()
    key, opening = next((m.key, m) for *_, m in scene.world.trace if isinstance(m, Open))
    scene.world.network = dropping(Close, Failed, Done, Drained)
    if state is State.DELIVERED:
        scene.submit_all()
    else:
        if state is State.SETTLING:
            scene.submit_all()
        scene.abort("source")
    message = opening
    if asking is Query:
        message = Query(sender=scene.target.core.instance, receiver=scene.source.core.instance, key=key)
    wanted = Done if state is State.DELIVERED else Failed
    assert answers(scene, scene.target, scene.source, message) == [wanted]
    assert scene.source.core.counters[f"{state.value}:{asking.__name__}"] == 1


@pytest.mark.parametrize(("state", "phase"), [(State.WAITING, "waiting"), (State.SENDING, "one chunk")])
@pytest.mark.parametrize("asking", [Open, Query])
def test_a_target_that_asks_for_a_room_that_runs_is_told_again_that_it_is_open(
    state: State, phase: str, asking: type
) -> None:
    scene = Scene(holding(PAIR))
    bring_to(scene, phase)
    opening = next(m for *_, m in scene.world.trace if isinstance(m, Open))
    query = Query(sender=opening.sender, receiver=opening.receiver, key=opening.key)
    message = opening if asking is Open else query
    assert answers(scene, scene.target, scene.source, message) == [Opened]
    assert scene.source.core.counters[f"{state.value}:{asking.__name__}"] == 1


def failed() -> Scene:
    scene = Scene()
    scene.start()
    scene.abort("source")
    scene.world.run()
    scene.expect_failed()
    return scene


@pytest.mark.parametrize(("kind", "end"), [(Opened, ended), (Done, ended), (Failed, failed)])
def test_a_source_that_speaks_after_the_end_is_told_so_at_once(kind: type, end: Callable[[], Scene]) -> None:
    scene = end()
    late = next(m for *_, m in scene.world.trace if isinstance(m, kind))
    assert answers(scene, scene.source, scene.target, late) == [Close]


def test_messages_that_go_the_wrong_way_are_counted_and_change_nothing() -> None:
    scene = Scene()
    scene.start()
    key = next(m.key for *_, m in scene.world.trace if isinstance(m, Open))
    p, d = scene.source.core.instance, scene.target.core.instance
    for sender, receiver, message in (
        (
            scene.source,
            scene.target,
            Open(sender=p, receiver=d, key=key, token_count=1, grants=(), parts=(), ttl_seconds=1),
        ),
        (scene.source, scene.target, Abort(sender=p, receiver=d, key=key, code="x", reason="")),
        (scene.target, scene.source, Done(sender=d, receiver=p, key=key, parts=(), token_count=1)),
        (scene.target, scene.source, Drained(sender=d, receiver=p, key=key)),
    ):
        scene.world.inject(sender, receiver, message)
    assert scene.source.core.counters["messages_forbidden"] == 2
    assert scene.target.core.counters["messages_forbidden"] == 2
    assert "forbidden: " in "".join(line.text for line in scene.target.core.trace_and_state(scene.room))
    scene.submit_all()
    scene.expect_success()


def test_drained_without_an_abort_is_forbidden() -> None:
    scene = Scene()
    scene.start()
    key = next(m.key for *_, m in scene.world.trace if isinstance(m, Open))
    drained = Drained(sender=scene.source.core.instance, receiver=scene.target.core.instance, key=key)
    scene.world.inject(scene.source, scene.target, drained)
    assert scene.target.core.counters["messages_forbidden"] == 1
    assert scene.status("target").leased


def test_a_close_before_the_end_fails_the_source() -> None:
    scene = Scene(holding(PAIR))
    bring_to(scene, "one chunk")
    key = next(m.key for *_, m in scene.world.trace if isinstance(m, Open))
    close = Close(sender=scene.target.core.instance, receiver=scene.source.core.instance, key=key, success=False)
    scene.world.inject(scene.target, scene.source, close)
    assert scene.status("source").poll is KVPoll.Failed
    scene.source.release_writes()
    scene.world.run(until=LONG)
    scene.expect_over()


def test_a_second_sender_event_for_a_live_room_changes_nothing() -> None:
    scene = Scene()
    scene.start()
    scene.world.perform(scene.source, scene.source.core.handle(SenderOpened(scene.room), scene.world.now))
    scene.submit_all()
    scene.expect_success()


def test_an_abort_of_a_room_that_ended_or_never_was_does_nothing() -> None:
    scene = ended()
    scene.abort("target")
    scene.abort("source")
    scene.target.do(AbortRequested(99, "target", AbortedError("nothing")))
    scene.expect_success()

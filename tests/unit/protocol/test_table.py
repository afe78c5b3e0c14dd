"""The table is total, its end is an end, and nothing waits without a deadline or an owner."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise

import pytest

from kvbaton.errors import DisconnectedError, InternalError, RemoteProtocolError
from kvbaton.plan.pair import PairPlan
from kvbaton.protocol.effects import Effect, KVPoll
from kvbaton.protocol.events import PeerFenced, ShutdownRequested, WriteBroken, WriteId, WriteSettled
from kvbaton.protocol.messages import (
    Abort,
    AnyMessage,
    Close,
    Done,
    Drained,
    Failed,
    Forgotten,
    Goodbye,
    Open,
    Opened,
    Ping,
    Pong,
    Query,
    TransferKey,
)
from kvbaton.protocol.settings import Settings
from kvbaton.protocol.table import TABLE, Ignored, Illegal, step
from kvbaton.protocol.transfer import Incoming, On, Outgoing, Prompt, State, Transfer
from lab.docs.protocol import derive
from unit.protocol.scene import ENDED, PAIR, QUICK, Scene, dropping, holding

CELLS = [(state, on) for state in State for on in On]


@pytest.mark.parametrize(("state", "on"), CELLS, ids=[f"{s.value}:{o.value}" for s, o in CELLS])
def test_every_cell_is_a_handler_or_has_a_reason(state: State, on: On) -> None:
    rule = TABLE[state][on]
    if isinstance(rule, Ignored | Illegal):
        assert rule.reason.strip(), (state, on)
    else:
        assert callable(rule)


def test_the_table_has_no_other_cells() -> None:
    assert set(TABLE) == set(State)
    assert all(set(rules) == set(On) for rules in TABLE.values())


def test_illegal_messages_are_the_peers_fault_and_illegal_events_ours() -> None:
    transfer = Transfer(TransferKey(1, 2), "peer", _Mute(), incoming=Incoming(prompt=Prompt(token_count=1)))
    with pytest.raises(RemoteProtocolError, match=r"Open while opening: this message goes from a target to a source"):
        step(transfer, On.OPEN_ARRIVED, 0.0)
    with pytest.raises(InternalError, match="write settled while opening"):
        step(transfer, On.WRITE_SETTLED, 0.0)
    assert transfer.state is State.OPENING


def test_an_end_that_a_transfer_does_not_have_is_our_own_bug() -> None:
    target = Transfer(TransferKey(1, 2), "peer", _Mute(), incoming=Incoming(prompt=Prompt(token_count=1)))
    nothing = Outgoing(pair=PairPlan(parts=(), digest=""), grants={}, parts=(), token_count=1)
    source = Transfer(TransferKey(1, 2), "peer", _Mute(), outgoing=nothing)
    with pytest.raises(InternalError, match="is no source"):
        target.as_source()
    with pytest.raises(InternalError, match="is no target"):
        source.as_target()


class _Mute:
    """A wire that carries nothing."""

    instance = "us"
    settings = Settings()

    def send(self, transfer: Transfer, message: AnyMessage) -> None: ...
    def emit(self, effect: Effect) -> None: ...
    def mint_write(self, transfer: Transfer) -> WriteId:  # noqa: ARG002 - the protocol's name
        return WriteId(1)

    def set_timer(self, transfer: Transfer, name: str, when: float) -> None: ...
    def cancel_timers(self, transfer: Transfer) -> None: ...
    def tell(self, room: int, text: str) -> None: ...


def opening(scene: Scene) -> None:
    scene.world.network = dropping(Opened)
    scene.start()


def opened(scene: Scene) -> None:
    scene.start()


def draining(scene: Scene) -> None:
    scene.start()
    scene.submit(0)
    scene.world.network = dropping(Abort)
    scene.abort("target")
    scene.world.run()


def sending(scene: Scene) -> None:
    scene.start()
    scene.submit(0)
    scene.world.run()


def delivered(scene: Scene) -> None:
    scene.world.network = dropping(Done)
    scene.start()
    scene.submit_all()
    scene.source.release_writes()
    scene.world.run()


def settling(scene: Scene) -> None:
    scene.start()
    scene.submit(0)
    scene.world.network = dropping(Failed)
    scene.abort("source")
    scene.world.run()


def failing(scene: Scene) -> None:
    scene.start()
    scene.world.network = dropping(Close)
    scene.abort("source")
    scene.world.run()


#: State → how to bring a transfer there, and at which rank it is then.
PATHS: dict[State, tuple[str, Callable[[Scene], None]]] = {
    State.OPENING: ("d0", opening),
    State.OPENED: ("d0", opened),
    State.DRAINING: ("d0", draining),
    State.WAITING: ("p0", opened),
    State.SENDING: ("p0", sending),
    State.DELIVERED: ("p0", delivered),
    State.SETTLING: ("p0", settling),
    State.FAILING: ("p0", failing),
}


@pytest.mark.parametrize("state", PATHS, ids=lambda s: s.value)
def test_every_live_state_has_a_deadline_or_an_owner(state: State) -> None:
    """The world checks the invariants after every step; here also that the state was reached and is left again."""
    scene = Scene(holding(PAIR))
    name, path = PATHS[state]
    path(scene)
    rank = scene.world.ranks[name]
    peer = scene.target if name == "p0" else scene.source
    waits_for = rank.core.trace_and_state(scene.room)[-1].text
    assert waits_for.endswith(f"transfers: {peer.core.instance} is {state.value}"), waits_for
    rank.core.check_invariants()
    assert rank.core.next_deadline() is not None
    scene.world.network = lambda _from, _to, _message: 1
    scene.world.run(until=scene.world.now + 4 * QUICK.waiting_timeout)
    scene.source.release_writes()
    scene.world.run(until=scene.world.now + 4 * QUICK.waiting_timeout)
    scene.expect_over()


@pytest.mark.parametrize("state", PATHS, ids=lambda s: s.value)
def test_a_state_survives_a_peer_that_dies(state: State) -> None:
    scene = Scene(holding(PAIR))
    name, path = PATHS[state]
    path(scene)
    scene.world.kill(scene.target if name == "p0" else scene.source)
    scene.world.run(until=scene.world.now + 4 * QUICK.waiting_timeout)
    scene.expect_over()


def test_every_live_state_is_driven() -> None:
    assert set(PATHS) | {State.QUIESCING} == set(State) - {State.CLOSED}


@pytest.mark.parametrize("how", ["dies", "fences"])
def test_quiescing_holds_the_lease_until_the_transport_is_flushed(how: str) -> None:
    """Its owner is the target's own transport: no peer and no time ends it."""
    scene = Scene(holding(PAIR))
    sending(scene)
    scene.target.hold_quiesce = True
    if how == "dies":
        scene.world.kill(scene.source)
    else:
        scene.source.held.clear()
        scene.source.do(PeerFenced(scene.target.core.instance))
        scene.world.run()
    assert scene.status("target").poll is KVPoll.Failed
    scene.world.run(until=scene.world.now + 1_000.0)
    assert scene.status("target").leased
    assert scene.target.quiescing == [scene.source.core.instance] if how == "dies" else scene.target.quiescing
    scene.target.release_quiesced()
    scene.target.hold_quiesce = False
    scene.world.run()
    assert not scene.status("target").leased
    scene.expect_over()


def test_nothing_leaves_closed() -> None:
    """Handlers of CLOSED answer late messages; none of them enters a state."""
    assert {edge.path for edge in derive() if edge.before is State.CLOSED} == {(State.CLOSED,)}


def test_a_source_says_that_it_has_drained_only_after_it_has_settled() -> None:
    steps = {step for edge in derive() for step in pairwise(edge.path)}
    assert {before for before, after in steps if after is State.FAILING} == {State.SETTLING}


def test_draining_ends_only_by_word_or_proof() -> None:
    scene = Scene(holding(PAIR))
    draining(scene)
    scene.world.network = dropping(Drained)
    scene.world.run(until=scene.world.now + 86_400.0 / 8)
    assert scene.status("target").leased


# ---- every event in every live state, through the cores -------------------------------------------------------------


def say(kind: type, **fields: object) -> Callable[[Scene], None]:
    """A message of the transfer arrives, whether or not its sender would send it now."""

    def inject(scene: Scene) -> None:
        opened = next(m for *_, m in scene.world.trace if isinstance(m, Open))
        to_source = kind in (Open, Close, Abort, Query)
        sender, receiver = (scene.target, scene.source) if to_source else (scene.source, scene.target)
        head = {"sender": sender.core.instance, "receiver": receiver.core.instance, "key": opened.key}
        whole = {name: getattr(opened, name) for name in ("token_count", "grants", "parts", "ttl_seconds")}
        names = kind.__struct_fields__  # type: ignore[attr-defined]
        scene.world.inject(sender, receiver, kind(**head, **{k: v for k, v in (whole | fields).items() if k in names}))

    return inject


def let_time_pass(scene: Scene) -> None:
    """Deadlines pass while both ranks are alive and only heartbeats get through."""
    scene.world.network = lambda _from, _to, message: int(isinstance(message, Ping | Pong))
    scene.world.run(until=scene.world.now + 100.0)


def fall_silent(scene: Scene) -> None:
    scene.world.network = lambda _from, _to, _message: 0
    scene.world.run(until=scene.world.now + 20.0)


def fence(scene: Scene) -> None:
    """Another room's write broke: the driver has cut the peer off."""
    scene.source.held.clear()
    scene.source.do(PeerFenced(scene.target.core.instance))
    scene.target.do(PeerFenced(scene.source.core.instance))


def report_writes(scene: Scene) -> None:
    """Writes that nobody knows of, and every one that is out, settle and then break as well."""
    held, scene.source.held = scene.source.held, []
    for write in (*(write.write for write in held), WriteId(999)):
        scene.source.do(WriteSettled(write))
        scene.source.do(WriteBroken(write, DisconnectedError("late")))


STIMULI: dict[str, Callable[[Scene], None]] = {
    "Open": say(Open),
    "Opened": say(Opened),
    "Done": say(Done),
    "Done of other parts": say(Done, parts=()),
    "Close": say(Close, success=False),
    "Close, success": say(Close, success=True),
    "Failed": say(Failed, code="aborted", reason="r", drained=False),
    "Failed, drained": say(Failed, code="aborted", reason="r", drained=True),
    "Failed, unknown code": say(Failed, code="from the future", reason="r", drained=True),
    "Abort": say(Abort, code="aborted", reason="r"),
    "Drained": say(Drained),
    "Query": say(Query),
    "Forgotten": say(Forgotten),
    "target gives up": lambda scene: scene.abort("target"),
    "source gives up": lambda scene: scene.abort("source"),
    "deadline": let_time_pass,
    "silence": fall_silent,
    "source dies": lambda scene: scene.world.kill(scene.source),
    "source says goodbye": lambda scene: scene.world.inject(
        scene.source, scene.target, Goodbye(sender=scene.source.core.instance, receiver=scene.target.core.instance)
    ),
    "target says goodbye": lambda scene: scene.world.inject(
        scene.target, scene.source, Goodbye(sender=scene.target.core.instance, receiver=scene.source.core.instance)
    ),
    "fence": fence,
    "write reports": report_writes,
    "shutdown of the source": lambda scene: scene.source.do(ShutdownRequested("restart")),
    "shutdown of the target": lambda scene: scene.target.do(ShutdownRequested("restart")),
}
#: The source is WAITING in each: test_bugs_found.py has a test of what must happen then.
ELSEWHERE = {(State.WAITING, "fence"), (State.OPENED, "fence"), (State.OPENING, "fence")}


@pytest.mark.parametrize(
    ("state", "stimulus"),
    [
        pytest.param(state, stimulus, id=f"{state.value}-{stimulus}")
        for state in PATHS
        for stimulus in STIMULI
        if (state, stimulus) not in ELSEWHERE
    ],
)
def test_whatever_happens_in_whatever_state_both_ends_come_to_an_end(state: State, stimulus: str) -> None:
    scene = Scene(holding(PAIR))
    PATHS[state][1](scene)
    scene.world.checking = False  # some of these peers lie about their writes
    STIMULI[stimulus](scene)
    for rank in scene.ranks:
        rank.core.check_invariants()
    scene.world.network = lambda _from, _to, _message: 1
    scene.world.run(until=scene.world.now + 4 * QUICK.waiting_timeout)
    scene.source.release_writes()
    scene.world.run(until=scene.world.now + 4 * QUICK.waiting_timeout)
    scene.expect_over()
    for rank in scene.ranks:
        for status in rank.statuses.values() if rank.alive else ():
            assert status.poll in ENDED, scene.explain()
            assert status.error is None or status.error.code != "internal", scene.explain()


INERT = [(s, o) for s, o in CELLS if isinstance(TABLE[s][o], Ignored | Illegal)]


@pytest.mark.parametrize(("state", "on"), INERT, ids=[f"{s.value}:{o.value}" for s, o in INERT])
def test_what_is_ignored_or_illegal_changes_nothing(state: State, on: On) -> None:
    rule = TABLE[state][on]
    transfer = Transfer(TransferKey(1, 2), "peer", _Mute(), incoming=Incoming(prompt=Prompt(token_count=1)))
    transfer.state = state
    if isinstance(rule, Ignored):
        step(transfer, on, 0.0)
    elif isinstance(rule, Illegal):
        error = RemoteProtocolError if on.is_message else InternalError
        with pytest.raises(error, match=re.escape(f"{on.value} while {state.value}: {rule.reason}")):
            step(transfer, on, 0.0)
    assert transfer.state is state
    assert transfer.error is None

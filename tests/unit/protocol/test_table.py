"""The table is total, its end is an end, and nothing waits without a deadline or an owner."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from protocol_diagram import derive

from kvbaton.errors import InternalError, RemoteProtocolError
from kvbaton.messages import Abort, AnyMessage, Close, Done, Drained, Failed, Opened, TransferKey
from kvbaton.protocol.effects import Effect
from kvbaton.protocol.events import WriteId
from kvbaton.protocol.settings import Settings
from kvbaton.protocol.table import TABLE, Ignored, Illegal, step
from kvbaton.protocol.transfer import Incoming, On, State, Transfer
from unit.protocol.scene import PAIR, QUICK, Scene, dropping, holding

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
    transfer = Transfer(TransferKey(1, 2), "peer", _Mute(), incoming=Incoming(grants=(), parts=(), token_count=1))
    with pytest.raises(RemoteProtocolError, match=r"Open while opening: this message goes from a target to a source"):
        step(transfer, On.OPEN_ARRIVED, 0.0)
    with pytest.raises(InternalError, match="write settled while opening"):
        step(transfer, On.WRITE_SETTLED, 0.0)
    assert transfer.state is State.OPENING


class _Mute:
    """A wire that carries nothing."""

    instance = "us"
    settings = Settings()

    def send(self, transfer: Transfer, message: AnyMessage) -> None: ...
    def emit(self, effect: Effect) -> None: ...
    def mint_write(self, transfer: Transfer) -> WriteId:
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
    waits_for = rank.core.story(scene.room)[-1].text
    assert waits_for.endswith(f"transfers: {peer.core.instance} is {state.value}"), waits_for
    rank.core.check_invariants()
    assert rank.core.next_deadline() is not None
    scene.world.network = lambda _from, _to, _message: 1
    scene.world.run(until=scene.world.now + 4 * QUICK.transfer_seconds)
    scene.source.release_writes()
    scene.world.run(until=scene.world.now + 4 * QUICK.transfer_seconds)
    scene.expect_over()


@pytest.mark.parametrize("state", PATHS, ids=lambda s: s.value)
def test_a_state_survives_a_peer_that_dies(state: State) -> None:
    scene = Scene(holding(PAIR))
    name, path = PATHS[state]
    path(scene)
    scene.world.kill(scene.target if name == "p0" else scene.source)
    scene.world.run(until=scene.world.now + 4 * QUICK.transfer_seconds)
    scene.expect_over()


def test_every_live_state_is_driven() -> None:
    assert set(PATHS) == set(State) - {State.CLOSED}


def test_nothing_leaves_closed() -> None:
    """Handlers of CLOSED answer late messages; none of them enters a state. """
    assert {edge.path for edge in derive() if edge.before is State.CLOSED} == {(State.CLOSED,)}


def test_draining_ends_only_by_word_or_proof() -> None:
    scene = Scene(holding(PAIR))
    draining(scene)
    scene.world.network = dropping(Drained)
    scene.world.run(until=scene.world.now + 86_400.0 / 8)
    assert scene.status("target").leased

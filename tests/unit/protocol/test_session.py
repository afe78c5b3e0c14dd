"""Sessions: greeting, verdict on both sides, heartbeat, loss, replacement, proof of death."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from kvbaton.control.base import LinkId
from kvbaton.errors import IncompatibleError, KVBatonError, TransportError
from kvbaton.layout import CacheLayout
from kvbaton.protocol.effects import CloseLink, Dial, FencePeer, KVPoll, PreparePeer, Send
from kvbaton.protocol.events import (
    AgentReplaced,
    Dialed,
    GrantsPublished,
    LinkRefused,
    LinkUp,
    MessageArrived,
    PeerFenced,
    PeerPrepared,
    PeerUnprepared,
    ReceiverOpened,
    SenderOpened,
    TimePassed,
)
from kvbaton.protocol.messages import AnyMessage, Goodbye, Hello, Ping, Pong, UnknownPeer, Verdict, encode
from kvbaton.protocol.settings import Settings
from kvbaton.testing.rank import Rank
from kvbaton.testing.world import World
from unit.protocol.scene import PAIR, QUICK, Scene, Shape, add_group, dropping, layouts


def states(rank: Rank) -> list[str]:
    return [state for _, _, state in rank.core.sessions()]


def pair(shape: Shape = PAIR, **target: str) -> tuple[World, Rank, Rank]:
    """A source and a target that have not met."""
    world = World(QUICK)
    return world, add_group(world, shape, side="source")[0], add_group(world, shape, side="target", **target)[0]


def meet(world: World, source: Rank, target: Rank, room: int = 1) -> None:
    target.do(ReceiverOpened(room, (source.address,)))
    world.run()


def error_of(rank: Rank, room: int = 1) -> KVBatonError:
    error = rank.status("target", room).error
    assert error is not None
    return error


def test_both_sides_agree_before_any_room_opens() -> None:
    world, source, target = pair()
    meet(world, source, target)
    assert states(source) == states(target) == ["ready"]
    kinds = [type(message) for *_, message in world.trace]
    assert kinds == [Hello, Hello, Verdict, Verdict]
    digests = {m.plan_digest for *_, m in world.trace if isinstance(m, Verdict)}
    assert len(digests) == 1


def test_nobody_is_dialled_twice_and_one_session_serves_all_rooms() -> None:
    world, source, target = pair()
    for room in (1, 2, 3):
        target.do(ReceiverOpened(room, (source.address,)))
    world.run()
    meet(world, source, target, 4)
    assert len(target.core.sessions()) == 1
    assert sum(isinstance(m, Hello) for *_, m in world.trace) == 2


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("copies", [0, 2])
def test_a_greeting_survives_loss_and_doubling(index: int, copies: int) -> None:
    world, source, target = pair()
    seen: list[AnyMessage] = []

    def network(_from: Rank, _to: Rank, message: AnyMessage) -> int:
        seen.append(message)
        return copies if len(seen) == index + 1 else 1

    world.network = network
    meet(world, source, target)
    world.run(until=5.0)
    assert states(source) == states(target) == ["ready"], world.describe()


def test_greetings_are_repeated_ever_more_slowly() -> None:
    world, source, target = pair()
    world.network = lambda _from, _to, _message: 0
    meet(world, source, target)
    world.run(until=9.9)
    assert [at for at, *_ in world.trace] == [0.0, 0.5, 1.5, 3.5, 7.5]


def test_a_greeting_begins_anew_after_a_loss() -> None:
    world, source, target = pair()
    meet(world, source, target)
    world.run(until=1.0)
    world.network = lambda _from, _to, _message: 0
    target.do(LinkUp(target.link_to(source)))
    world.run(until=10.9)
    assert [at for at, _, _, m in world.trace if isinstance(m, Hello)] == [0.0, 0.0, 1.0, 1.5, 2.5, 4.5, 8.5]


def test_a_target_that_waits_for_a_verdict_greets_again_until_its_deadline() -> None:
    world, source, target = pair()
    world.network = dropping(Verdict)
    meet(world, source, target)
    assert states(target) == ["judging"]
    world.run(until=QUICK.handshake_timeout - 0.1)
    hellos = [at for at, sender, _, m in world.trace if isinstance(m, Hello) and sender == "d0"]
    assert hellos == [0.0, 1.0, 2.0, 4.0, 8.0]
    assert target.status("target", 1).poll is KVPoll.Bootstrapping
    world.run(until=QUICK.handshake_timeout)
    assert "no answer within 10 s to the handshake" in error_of(target).message


def greeted_at(world: World, source: Rank, target: Rank, at: float) -> None:
    """The target greets at that time; the source's driver does not come to an end of its preparations."""
    world.now = at
    source.core.handle(MessageArrived(LinkId(99), encode(target.core.identity.hello(hello_sequence=1))), at)
    assert states(source) == ["preparing"]


@pytest.mark.parametrize("again", ["first", "after a loss", "after a fence", "reached for after a fence"])
def test_a_source_that_cannot_prepare_in_time_loses_the_peer(again: str) -> None:
    world, source, target = pair()
    greeted_at(world, source, target, 3.0)
    if again == "after a loss":
        world.run(until=20.0)
        assert states(source) == ["lost"]
    elif again != "first":
        world.now = 20.0
        source.core.handle(PeerPrepared("i-d0"), 20.0)
        source.core.handle(PeerFenced("i-d0"), 20.0)
    if again in ("after a loss", "reached for after a fence"):
        source.core.handle(MessageArrived(LinkId(99), encode(Pong(sender="i-d0", receiver="i-p0"))), 20.0)
    begun = 3.0 if again == "first" else 20.0
    assert states(source) == ["preparing"]
    world.run(until=begun + QUICK.handshake_timeout - 0.1)
    assert states(source) == ["preparing"]
    world.run(until=begun + QUICK.handshake_timeout)
    assert states(source) == ["lost"]


@pytest.mark.parametrize("why", ["lost", "refused"])
def test_a_source_forgets_the_lost_and_the_refused_after_a_while(why: str) -> None:
    world, source, target = pair(dtype="f2" if why == "refused" else "u1")
    meet(world, source, target)
    world.network = lambda _from, _to, _message: 0
    since = QUICK.silence_seconds if why == "lost" else 0.0
    world.run(until=since + QUICK.announce_seconds - 0.1)
    assert states(source) == [why]
    world.run(until=since + QUICK.announce_seconds)
    assert states(source) == []


def test_rooms_that_a_forgotten_peer_leaves_behind_fail_with_what_it_refused_for() -> None:
    scene = Scene()
    scene.start()
    d, p = scene.target.core.instance, scene.source.core.instance
    verdict = Verdict(sender=d, receiver=p, compatible=False, code="transport", reason="no memory is left")
    scene.world.inject(scene.target, scene.source, verdict)
    assert states(scene.source) == ["refused"]
    scene.world.network = lambda _from, _to, _message: 0
    scene.world.run(until=QUICK.announce_seconds)
    assert states(scene.source) == []
    assert "no memory is left" in str(scene.status("source").error)


def test_the_first_loss_is_the_cause() -> None:
    """A new process takes the place of one that is lost already: nothing new happens to the old one."""
    world, source, target = pair()
    meet(world, source, target)
    world.network = lambda _from, _to, _message: 0
    world.run(until=QUICK.silence_seconds + 5.0)
    world.network = lambda _from, _to, _message: 1
    target.alive = False
    meet(world, source, world.add("d1", target.layout, group="d"))
    assert sorted(states(source)) == ["lost", "ready"]
    world.run(until=QUICK.silence_seconds + QUICK.announce_seconds)
    assert states(source) == ["ready"], "the time until it is forgotten counts from the loss"


def test_a_greeting_names_who_answered_last_at_its_address_as_far_as_remembered() -> None:
    world = World(Settings(sessions=1))
    target = add_group(world, PAIR, side="target")[0]
    sources = [add_group(world, PAIR, side="source", name=name)[0] for name in ("x", "y")]
    for source in sources:
        meet(world, source, target)
        world.kill(source)
    assert target.core.sizes()["instances_at_addresses"] == 1
    latest = sources[-1]
    since = len(world.trace)
    meet(world, world.add("again", latest.layout, address=latest.address), target)
    assert next(m.receiver for *_, m in world.trace[since:] if isinstance(m, Hello)) == latest.core.instance


# ---- verdicts -------------------------------------------------------------------------------------------------------

DIFFERENT: dict[str, tuple[Callable[[], tuple[CacheLayout, CacheLayout]], str, str, str]] = {
    "model": (lambda: (one("source", model="a"), one("target", model="b")), "model", "a", "b"),
    "dtype": (lambda: (one("source", dtype="f2"), one("target", dtype="e4m3")), "kv.dtype", "f2", "e4m3"),
    "heads": (
        lambda: (one("source", Shape(heads=4)), one("target", Shape(heads=8))),
        "kv.0.k.items",
        "4",
        "8",
    ),
}


def one(side: str, shape: Shape = PAIR, **fields: str) -> CacheLayout:
    return layouts(shape, side=side, **fields)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("what", DIFFERENT)
def test_an_incompatible_pair_is_told_to_both_mirrored(what: str) -> None:
    make, field, ours, theirs = DIFFERENT[what]
    world = World(QUICK)
    s_layout, t_layout = make()
    source, target = world.add("p0", s_layout), world.add("d0", t_layout)
    meet(world, source, target)
    assert states(source) == states(target) == ["refused"]
    error = error_of(target)
    assert isinstance(error, IncompatibleError)
    assert (error.field, error.ours, error.theirs) == (field, theirs, ours)
    said = {m.sender: m for *_, m in world.trace if isinstance(m, Verdict)}
    assert (said["i-p0"].field, said["i-p0"].ours, said["i-p0"].theirs) == (field, ours, theirs)
    assert (said["i-d0"].field, said["i-d0"].ours, said["i-d0"].theirs) == (field, theirs, ours)
    assert not said["i-p0"].compatible
    assert not said["i-d0"].compatible
    assert said["i-p0"].reason == said["i-d0"].reason == error.message


def test_a_refusal_names_the_peer() -> None:
    world, source, target = pair(dtype="f2")
    meet(world, source, target)
    assert error_of(target).peer == "i-p0 at world://p0"


def test_a_refused_peer_that_speaks_once_another_process_has_its_place_stays_refused() -> None:
    """There is no plan by which its memory could be reached."""
    world, source, target = pair(dtype="f2")
    meet(world, source, target)
    successor = world.add("d1", layouts(PAIR, side="target")[0], group="d")
    meet(world, source, successor)
    assert sorted(states(source)) == ["lost", "ready"]
    world.inject(target, source, Ping(sender="i-d0", receiver="i-p0"))
    world.run()
    assert sorted(states(source)) == ["lost", "ready"]


def test_a_refused_peer_is_refused_at_once_the_next_time() -> None:
    world, source, target = pair(dtype="f2")
    meet(world, source, target)
    sent = len(world.trace)
    meet(world, source, target, 2)
    assert target.status("target", 2).poll is KVPoll.Failed
    assert len(world.trace) == sent


def altered(**fields: object) -> Callable[[Rank, Rank, AnyMessage], int | list[AnyMessage]]:
    """A network that changes the Hello of the source."""

    def network(sender: Rank, _to: Rank, message: AnyMessage) -> int | list[AnyMessage]:
        if isinstance(message, Hello) and sender.name == "p0":
            return [msgspec.structs.replace(message, **fields)]
        return 1

    return network


@pytest.mark.parametrize(("field", "value"), [("version", 2), ("transport", "pigeon")])
def test_another_version_or_transport_is_refused_by_name(field: str, value: object) -> None:
    world, source, target = pair()
    world.network = altered(**{field: value})
    meet(world, source, target)
    error = error_of(target)
    assert isinstance(error, IncompatibleError)
    assert error.field == field
    assert error.theirs == str(value)
    assert states(source) == states(target) == ["refused"]


def test_a_source_of_another_version_says_so_to_its_target() -> None:
    world, source, target = pair()
    world.network = lambda sender, _to, message: (
        [msgspec.structs.replace(message, version=9)] if isinstance(message, Hello) and sender.name == "d0" else 1
    )
    meet(world, source, target)
    error = error_of(target)
    assert isinstance(error, IncompatibleError)
    assert (error.field, error.ours, error.theirs) == ("version", "9", "1")


def test_a_layout_that_contradicts_itself_is_refused() -> None:
    world, source, target = pair()
    bad = msgspec.structs.replace(target.layout, regions=())
    world.network = lambda sender, _to, message: (
        [msgspec.structs.replace(message, layout=bad)] if isinstance(message, Hello) and sender.name == "d0" else 1
    )
    meet(world, source, target)
    assert error_of(target).code == "layout"
    assert states(source) == ["refused"]


def test_different_plans_from_the_same_layouts_are_refused_on_both_sides() -> None:
    world, source, target = pair()
    world.network = lambda sender, _to, message: (
        [msgspec.structs.replace(message, plan_digest="00")]
        if isinstance(message, Verdict) and sender.name == "p0"
        else 1
    )
    meet(world, source, target)
    error = error_of(target)
    assert isinstance(error, IncompatibleError)
    assert error.field == "plan_digest"
    assert states(source) == states(target) == ["refused"]


def test_memory_that_cannot_be_reached_is_refused_with_the_reason() -> None:
    world, source, target = pair()
    prepare = []
    original = world.perform

    target.do(ReceiverOpened(1, (source.address,)))
    world.kill(target)  # so that the world cannot find it when it prepares
    assert original == world.perform
    hello = target.core.identity.hello()
    effects = source.core.handle(
        MessageArrived(source.links and next(iter(source.links)), msgspec.msgpack.encode(hello)), 0.0
    )
    prepare = [effect for effect in effects if isinstance(effect, PreparePeer)]
    assert [effect.peer for effect in prepare] == ["i-d0"]
    source.do(PeerUnprepared("i-d0", TransportError("no route")))
    assert states(source) == ["refused"]
    refused = [m for *_, m in world.trace if isinstance(m, Verdict)]
    assert not refused  # nobody is there to hear it
    source.do(PeerUnprepared("i-d0", TransportError("again")))
    source.do(PeerPrepared("i-d0"))
    source.do(PeerPrepared("nobody"))
    assert states(source) == ["refused"]


def test_what_could_not_be_reached_once_is_tried_again_for_the_next_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by `python -m lab chaos` (prefill out of file descriptors): a refusal whose cause passes was for ever."""
    world, source, target = pair()
    there = world.by_instance
    monkeypatch.setattr(world, "by_instance", lambda _instance: None)
    meet(world, source, target)
    assert states(source) == states(target) == ["refused"]
    assert "cannot reach the decode rank's memory" in error_of(target).message
    meet(world, source, target, room=2)
    assert states(source) == states(target) == ["refused"], "the cause is still there"
    assert isinstance(error_of(target, 2), TransportError)
    monkeypatch.setattr(world, "by_instance", there)
    meet(world, source, target, room=3)
    assert states(source) == states(target) == ["ready"]
    assert target.status("target", 3).error is None


def test_a_peer_that_was_cut_off_is_reached_for_again_only_when_it_gives_a_sign_of_life() -> None:
    """Found by `python -m lab soak`: reaching for the memory of a dead peer costs a descriptor each time, and
    so each death within a write left one behind."""
    world, source, target = pair()
    meet(world, source, target)
    peer = target.core.instance
    link = next(iter(source.links))
    effects = source.core.handle(PeerFenced(peer), world.now)
    assert not [effect for effect in effects if isinstance(effect, PreparePeer)]
    asked = [msgspec.msgpack.decode(effect.payload)["type"] for effect in effects if isinstance(effect, Send)]
    assert asked == ["ping"]
    assert states(source) == ["preparing"]
    pong = msgspec.msgpack.encode(Pong(sender=peer, receiver=source.core.instance))
    effects = source.core.handle(MessageArrived(link, pong), world.now)
    assert [effect.peer for effect in effects if isinstance(effect, PreparePeer)] == [peer]
    effects = source.core.handle(MessageArrived(link, pong), world.now)
    assert not [effect for effect in effects if isinstance(effect, PreparePeer)], "once is enough"
    source.do(PeerPrepared(peer))
    assert states(source) == ["ready"]


def test_a_replaced_agent_is_announced_and_reached_anew() -> None:
    """NIXL can stop a write only by destroying its agent: what peers knew of this rank's memory holds no more."""
    world, source, target = pair()
    meet(world, source, target)
    target.do(AgentReplaced(b"another agent"))
    world.run()
    assert states(source) == states(target) == ["ready"]
    (session,) = source.core._peers.all()
    assert session.hello is not None
    assert session.hello.agent_metadata == b"another agent"
    hellos = [m for _, sender, _, m in world.trace if isinstance(m, Hello) and sender == "d0"]
    world.inject(target, source, hellos[0])
    assert session.hello.agent_metadata == b"another agent", "an old Hello that comes late changes nothing"
    assert states(source) == ["ready"]


# ---- life and loss --------------------------------------------------------------------------------------------------


def test_both_sides_ping_and_neither_is_lost() -> None:
    world, source, target = pair()
    meet(world, source, target)
    world.run(until=100.0)
    assert states(source) == states(target) == ["ready"]
    for name in ("p0", "d0"):
        assert sum(isinstance(m, Ping) and sender == name for _, sender, _, m in world.trace) == 20
        assert sum(isinstance(m, Pong) and sender == name for _, sender, _, m in world.trace) == 20


def test_peers_that_vanish_without_a_refusal_are_forgotten_once_nothing_needs_them() -> None:
    """As in pod churn: addresses that swallow everything. Their sessions and links were kept for ever, with a message
    a minute each, until no new prefill could be reached."""
    _, _, target = pair()
    core, now = target.core, 0.0
    links: dict[str, LinkId] = {}
    for number in range(200):
        address = f"tcp://10.0.0.{number}:1"
        for effect in core.handle(ReceiverOpened(number, (address,)), now):
            if isinstance(effect, Dial):
                links[address] = LinkId(number)
                core.handle(Dialed(address, links[address]), now)
    closed, sent_in_last_hour = set(), 0
    while (deadline := core.next_deadline()) is not None and deadline < 24 * 3600:
        now = max(now, deadline)
        for effect in core.handle(TimePassed(), now):
            if isinstance(effect, CloseLink):
                closed.add(effect.link)
            sent_in_last_hour += isinstance(effect, Send) and now > 23 * 3600
    assert core.sessions() == []
    assert closed == set(links.values())
    assert sent_in_last_hour == 0
    assert core.sizes()["timers"] == 0


def test_one_missed_heartbeat_is_no_loss_and_two_are() -> None:
    world, source, target = pair()
    meet(world, source, target)
    world.network = lambda _from, _to, _message: 0
    world.run(until=9.9)
    assert states(source) == states(target) == ["ready"]
    world.run(until=10.0)
    assert states(source) == states(target) == ["lost"]


@pytest.mark.parametrize("alive", [True, False])
def test_ranks_of_a_machine_that_was_paused_ask_before_they_take_each_other_for_dead(alive: bool) -> None:
    world, source, target = pair()
    meet(world, source, target)
    world.run(until=6.0)
    world.now = 100.0  # nobody has run meanwhile
    world.network = lambda _from, _to, _message: int(alive)
    world.run(until=100.5)
    assert states(source) == states(target) == ["ready"]
    world.run(until=111.0)
    assert states(source) == states(target) == ["ready" if alive else "lost"]


def test_a_lost_source_hears_of_rooms_that_were_given_up_once_it_speaks_again() -> None:
    """Otherwise it holds their pages until its own deadline, minutes later."""
    world, source, target = pair()
    meet(world, source, target)
    source.do(SenderOpened(7))
    world.network = lambda _from, _to, _message: 0
    world.run(until=11.0)
    target.do(ReceiverOpened(7, (source.address,)))
    assert error_of(target, 7).code == "peer_lost"
    world.network = lambda _from, _to, _message: 1
    world.run(until=20.0)
    error = source.status("source", 7).error
    assert error is not None
    assert error.code == "peer_lost"
    assert target.core.live_rooms == source.core.live_rooms == 0


def test_any_message_is_a_sign_of_life() -> None:
    world, source, target = pair()
    meet(world, source, target)
    world.network = dropping(Ping, Pong)
    for second in range(1, 80):
        world.run(until=float(second))
        world.inject(source, target, Pong(sender="i-p0", receiver="i-d0"))
    assert states(target) == ["ready"]
    assert states(source) == [], "the silent one was lost, and forgotten in the end"


def test_a_lost_peer_that_speaks_again_is_greeted_and_prepared_again() -> None:
    world, source, target = pair()
    meet(world, source, target)
    world.network = lambda _from, _to, _message: 0
    world.run(until=12.0)
    assert states(source) == states(target) == ["lost"]
    world.network = lambda _from, _to, _message: 1
    world.run(until=20.0)
    assert states(source) == states(target) == ["ready"], world.describe()


def test_a_lost_peer_fails_new_rooms_at_once() -> None:
    world, source, target = pair()
    meet(world, source, target)
    world.run(until=6.0)
    world.network = lambda _from, _to, _message: 0
    world.run(until=16.0)
    meet(world, source, target, 2)
    assert error_of(target, 2).code == "peer_lost"
    assert error_of(target, 2).message.startswith("no sign of life for 10.0 s")


def test_a_source_forgets_a_target_that_stays_away_and_a_target_no_source_that_may_write_to_it() -> None:
    scene = Scene()
    scene.start()
    scene.world.network = lambda _from, _to, _message: 0
    scene.world.run(until=1_000.0)
    assert scene.status("target").leased
    assert scene.source.core.sessions() == []
    assert states(scene.target) == ["lost"]
    scene.world.network = lambda _from, _to, _message: 1
    scene.world.run(until=1_060.0)  # ping → UnknownPeer → Hello
    assert not scene.status("target").leased
    assert any(isinstance(m, UnknownPeer) for *_, m in scene.world.trace)


def test_both_forget_who_stays_away_and_meet_again_for_the_next_room() -> None:
    world, source, target = pair()
    meet(world, source, target)
    world.network = lambda _from, _to, _message: 0
    world.run(until=10.0 + 2 * QUICK.announce_seconds + 1.0)
    assert source.core.sessions() == target.core.sessions() == []
    assert not target.links
    world.network = lambda _from, _to, _message: 1
    meet(world, source, target, room=2)
    assert states(source) == states(target) == ["ready"], world.describe()


def test_an_address_where_nobody_listens_fails_the_room_at_once_and_is_dialled_again() -> None:
    world = World(QUICK)
    target = add_group(world, PAIR, side="target")[0]
    target.do(ReceiverOpened(1, ("world://p0",)))
    world.run()
    assert error_of(target).code == "peer_lost"
    told = str(error_of(target))
    for part in (
        "nobody listens at world://p0",
        "send the request again",
        "[room 1]",
        "[while Bootstrapping]",
        "[peer ",
    ):
        assert part in told, "an error names cause, remedy, room, phase and peer"
    assert target.core.sessions() == []
    source = add_group(world, PAIR, side="source")[0]
    meet(world, source, target, 2)
    assert states(target) == ["ready"]


def test_goodbye_ends_the_session_on_the_other_side() -> None:
    world, source, target = pair()
    meet(world, source, target)
    world.perform(source, source.core.farewell("maintenance"))
    world.run()
    assert target.core.sessions() == []
    assert error_of(target).message == "the peer has closed: maintenance"
    assert [m.reason for *_, m in world.trace if isinstance(m, Goodbye)] == ["maintenance"]


def test_a_target_that_has_closed_is_fenced_and_a_source_is_not_for_nobody_writes_to_it() -> None:
    world, source, target = pair()
    meet(world, source, target)
    fenced = {}
    for rank, peer in ((source, target), (target, source)):
        goodbye = Goodbye(sender=peer.core.instance, receiver=rank.core.instance)
        effects = rank.core.handle(MessageArrived(rank.link_to(peer), encode(goodbye)), world.now)
        fenced[rank.name] = [effect.peer for effect in effects if isinstance(effect, FencePeer)]
    assert fenced == {"p0": ["i-d0"], "d0": []}


@pytest.mark.parametrize("how", ["dies", "closes"])
def test_the_link_to_a_source_that_is_gone_is_closed(how: str) -> None:
    world, source, target = pair()
    meet(world, source, target)
    assert len(target.links) == 1
    if how == "dies":
        world.kill(source)
    else:
        world.perform(source, source.core.farewell("maintenance"))
        world.run()
    assert target.links == {}


def test_another_instance_at_the_same_address_is_another_session() -> None:
    world, source, target = pair()
    meet(world, source, target)
    successor = world.replace(source, "q0")
    assert [(peer.split()[0], state) for peer, _, state in target.core.sessions()] == [("i-q0", "ready")]
    assert states(successor) == ["ready"]
    assert "replaced by i-q0" in error_of(target).message


def test_a_link_that_comes_up_again_to_the_same_instance_changes_nothing() -> None:
    scene = Scene()
    scene.start()
    scene.world.reconnect(scene.target, scene.source.address)
    assert states(scene.source) == states(scene.target) == ["ready"]
    scene.submit_all()
    scene.expect_success()


def test_a_new_target_process_takes_the_place_of_the_old_one_in_its_group() -> None:
    world, source, target = pair()
    meet(world, source, target)
    target.alive = False
    again = world.add("d1", target.layout, group="d")
    meet(world, source, again)
    assert sorted(states(source)) == ["lost", "ready"]


def test_link_events_of_unknown_links_and_roles_change_nothing() -> None:
    world, source, target = pair()
    meet(world, source, target)
    for rank in (source, target):
        rank.do(LinkUp(999))  # type: ignore[arg-type]
        rank.do(LinkRefused(999))  # type: ignore[arg-type]
    source.do(LinkUp(source.link_to(target)))
    source.do(LinkRefused(source.link_to(target)))
    assert states(source) == states(target) == ["ready"]


# ---- strangers ------------------------------------------------------------------------------------------------------


def test_a_message_for_another_instance_is_answered_with_stranger_and_greeted_again() -> None:
    world, source, target = pair()
    meet(world, source, target)
    world.inject(target, source, Ping(sender="i-d0", receiver="i-gone"))
    assert source.core.counters["messages_from_strangers"] == 1
    kinds = [type(m) for *_, m in world.trace[4:]]
    assert kinds == [UnknownPeer, Hello, Hello, Verdict, Verdict]
    assert states(source) == states(target) == ["ready"]


def test_a_message_from_another_instance_is_never_acted_on() -> None:
    world, source, target = pair()
    meet(world, source, target)
    world.inject(source, target, Goodbye(sender="i-forged", receiver="i-d0"))
    assert states(target) == ["ready"]
    assert target.core.counters["messages_from_strangers"] == 1


def test_an_answer_to_another_instance_is_never_acted_on() -> None:
    world, source, target = pair()
    meet(world, source, target)
    world.inject(source, target, source.core.identity.hello(answers="i-other"))
    world.inject(target, source, target.core.identity.hello(answers="i-other"))
    assert states(target) == states(source) == ["ready"]
    assert target.core.counters["messages_from_strangers"] == 1


def test_a_stranger_for_another_instance_is_not_believed() -> None:
    world, source, target = pair()
    meet(world, source, target)
    sent = len(world.trace)
    world.inject(source, target, UnknownPeer(sender="i-p0", receiver="i-other"))
    world.inject(target, source, UnknownPeer(sender="i-d0", receiver="i-p0"))
    assert len(world.trace) == sent


def test_more_sessions_than_the_bound_are_refused_and_counted() -> None:
    world = World(Settings(sessions=1))
    source = add_group(world, PAIR, side="source")[0]
    for name in ("x", "y"):
        meet(world, source, add_group(world, PAIR, side="target", name=name)[0])
    assert states(source) == ["ready"]
    assert source.core.counters["sessions_refused"] == 1


def test_sources_of_two_groups_or_half_a_group_are_refused() -> None:
    world = World(QUICK)
    half = add_group(world, Shape(source_tp=2), side="source", name="a")
    other = add_group(world, PAIR, side="source", name="b")
    target = add_group(world, PAIR, side="target")[0]
    grants = Scene().grants(target)
    for room, sources in ((1, (half[0].address,)), (2, (half[0].address, other[0].address))):
        target.do(ReceiverOpened(room, sources))
        target.do(GrantsPublished(room, grants, 22))
        world.run()
        error = error_of(target, room)
        assert isinstance(error, IncompatibleError)
        assert error.field == "sources"

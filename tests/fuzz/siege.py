"""A source and a target that do honest work while liars talk to both; what must hold, whoever chooses the lies.

The choices come from a :class:`random.Random`, so that Hypothesis (which shrinks them) and a coverage-guided fuzzer
(which makes them of its bytes) play the same game. Lies are structurally valid messages of every type and bytes that
are none. A liar is a peer that passed the door: it has links of its own, greets under names of its own, and repeats
what others said. It guesses neither the room numbers (63 random bits) nor forges the greeting of a living instance.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
from unit.protocol.scene import Scene

from kvbaton.control.base import LinkId
from kvbaton.layout import Axis, CacheLayout, Coordinates
from kvbaton.plan.pair import PartId
from kvbaton.protocol.effects import KVPoll
from kvbaton.protocol.events import GrantsPublished, MessageArrived, ReceiverOpened
from kvbaton.protocol.grants import parts_of
from kvbaton.protocol.messages import (
    PROTOCOL_VERSION,
    Abort,
    AnyMessage,
    Close,
    Done,
    Drained,
    Failed,
    Forgotten,
    Goodbye,
    Grant,
    Hello,
    Open,
    Opened,
    PartBytes,
    Ping,
    Pong,
    Query,
    TransferKey,
    UnknownPeer,
    Verdict,
    encode,
)
from kvbaton.protocol.settings import Settings
from kvbaton.testing.rank import Rank

SMALL = Settings(
    handshake_timeout=4.0,
    bootstrap_timeout=20.0,
    waiting_timeout=30.0,
    announce_seconds=15.0,
    settle_seconds=5.0,
    rooms=48,
    rooms_per_peer=12,
    units_per_peer=200,
    sessions=16,
    tombstones=64,
    tombstones_per_peer=24,
)
LINKS = [LinkId(9_000 + number) for number in range(40)]
NAMES = [f"i-liar{number}" for number in range(6)]
EVIL = "world://evil"
CHUNK_PAUSE_SECONDS = 0.05
#: Longest virtual time until everything that liars began has ended.
FORGETTING_SECONDS = 300.0
INTEGERS = (0, 1, 2, 3, 5, 12, 22, 255, 4096, (1 << 31) - 1, 1 << 31, (1 << 62), (1 << 63) - 1)


@dataclass(eq=False)
class Ghost:
    """A liar as the world sees it: reachable, and whatever is said or written to it disappears."""

    name: str
    address: str = ""
    alive: bool = True
    links: dict[LinkId, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        instance = f"i-{self.name}"
        self.core = SimpleNamespace(instance=instance, next_deadline=lambda: None, receiving=True)

    def do(self, _event: object) -> None:
        """It hears nothing."""

    def view(self, _address: int, length: int) -> np.ndarray:
        return np.zeros(min(length, 1 << 20), dtype=np.uint8)


class Siege:
    """See the module. Every method checks the invariants of both cores on its way (the world does)."""

    def __init__(self) -> None:
        self.scene = Scene(settings=SMALL)
        self.world = self.scene.world
        for name in NAMES:
            ghost: Any = Ghost(name.removeprefix("i-"))
            self.world.ranks[ghost.name] = ghost
        evil: Any = Ghost("evil", EVIL)
        self.world.ranks["evil"] = evil
        self.recorded: list[bytes] = []
        self.room = 100
        self.served = 0

    # ---- honest work

    def serve_a_room(self, random: Random) -> None:
        """One room from beginning to end, lies between all of its steps; it must succeed, with the right bytes."""
        scene = self.scene
        self.room += 1
        scene.room = room = self.room
        scene._submitted.clear()
        for rank in scene.targets:
            for buffer in rank.memory.values():
                buffer[:] = 0
        steps = (
            lambda: scene.open_senders(room),
            lambda: scene.open_receivers(room),
            lambda: scene.publish(room),
            lambda: self.pass_time(CHUNK_PAUSE_SECONDS),
            lambda: scene.submit(0, room),
            lambda: self.pass_time(CHUNK_PAUSE_SECONDS),
            lambda: scene.submit(1, room),
        )
        for step in steps:
            self.lie(random, random.randint(0, 3))
            step()
            self.world.run()
        self._record()
        for side in ("source", "target"):
            status = scene.status(side, room)
            assert status.poll is KVPoll.Success, scene.explain(room)
        scene.expect_bytes(room)
        self.served += 1

    def ask_the_liar(self, random: Random) -> None:
        """The target expects a room from a liar."""
        self.room += 1
        target = self.scene.target
        target.do(ReceiverOpened(self.room, (EVIL,)))
        self.world.run()
        if random.randint(0, 3):
            target.do(GrantsPublished(self.room, self.scene.grants(target, self.room), self.scene.shape.tokens))
        self.world.run()

    def pass_time(self, seconds: float) -> None:
        self.world.run(until=self.world.now + seconds)

    def _record(self) -> None:
        self.recorded += [encode(message) for *_, message in self.world.trace[-40:]]
        del self.recorded[:-40]
        self.world.trace.clear()

    # ---- lies

    def lie(self, random: Random, count: int) -> None:
        """So many messages from liars, to one side or the other."""
        for _ in range(count):
            victim, link = self._door(random)
            kind = random.randint(0, 9)
            if kind == 0:
                payload = random.randbytes(random.randint(0, 40))
            elif kind == 1 and self.recorded:
                payload = random.choice(self.recorded)
            else:
                try:
                    payload = encode(self.message(random, victim))
                except OverflowError:
                    continue  # a number that no message can carry
                if kind == 2:
                    at = random.randint(0, len(payload) - 1)
                    payload = payload[:at] + random.randbytes(random.randint(0, 3)) + payload[at + 1 :]
            victim.do(MessageArrived(link, payload))
        self.world.run()

    def raw(self, payload: bytes) -> None:
        """Bytes on an unknown link of both."""
        for victim in self.scene.ranks:
            victim.do(MessageArrived(LINKS[0], payload))
        self.world.run()

    def _door(self, random: Random) -> tuple[Rank, LinkId]:
        target = self.scene.target
        dialled = [link for link, (_, _, address) in target.links.items() if address == EVIL]
        if dialled and random.randint(0, 2) == 0:
            return target, random.choice(dialled)
        return random.choice(self.scene.ranks), random.choice(LINKS)

    def message(self, random: Random, victim: Rank) -> AnyMessage:
        sender = "i-evil" if victim is self.scene.target and random.randint(0, 3) else random.choice(NAMES)
        if random.randint(0, 19) == 0:
            sender = random.choice(["i-p0", "i-d0", "x" * 64])
        receiver = victim.core.instance if random.randint(0, 9) else random.choice(["i-nobody", "i-p0", "i-d0"])
        kind = random.choice(KINDS)
        if kind is Hello:
            return self._hello(random, sender, victim)
        if kind in (Ping, Pong):
            return kind(sender=sender, receiver=receiver)
        if kind is UnknownPeer:
            return UnknownPeer(sender=sender, receiver=random.choice([receiver, ""]))
        if kind is Goodbye:
            return Goodbye(sender=sender, receiver=receiver, reason=self._text(random))
        if kind is Verdict:
            return Verdict(
                sender=sender,
                receiver=receiver,
                compatible=bool(random.randint(0, 1)),
                plan_digest=self._digest(random, victim, sender),
                code=random.choice(["", "layout", "nonsense"]),
                field=random.choice(["", "x"]),
                reason=self._text(random),
            )
        return self._about_a_transfer(random, kind, sender, receiver, victim)

    def _about_a_transfer(self, random: Random, kind: type, sender: str, receiver: str, victim: Rank) -> AnyMessage:
        head = {"sender": sender, "receiver": receiver, "key": self._key(random, kind, victim)}
        if kind is Open:
            return self._open(random, head, victim)
        if kind is Done:
            parts = self._their_parts(random, victim)
            return Done(**head, parts=parts, token_count=random.choice([22, *INTEGERS]), exposed_seconds=1.0)
        if kind is Close:
            return Close(**head, success=bool(random.randint(0, 1)))
        if kind is Failed:
            return Failed(**head, code="aborted", reason=self._text(random), drained=bool(random.randint(0, 1)))
        if kind is Abort:
            return Abort(**head, code=random.choice(["aborted", "x"]), reason=self._text(random))
        return kind(**head)

    def _key(self, random: Random, kind: type, victim: Rank) -> TransferKey:
        """Mostly of live transfers with liars; honest rooms only in messages that cannot claim them."""
        live = [t.key for t in victim.core._transfers.live() if t.peer not in ("i-p0", "i-d0")]
        if live and random.randint(0, 3):
            return random.choice(live)
        rooms = [1, 2, 3, random.choice(INTEGERS[:12])]
        if kind not in (Open, Abort):
            rooms.append(self.room)
        return TransferKey(random.choice(rooms), random.choice([random.randint(1, 400), *INTEGERS]), 1)

    def _hello(self, random: Random, sender: str, victim: Rank) -> Hello:
        if sender in ("i-p0", "i-d0"):
            sender = NAMES[0]
        model = self.scene.target if victim is self.scene.source else self.scene.source
        layout = model.layout if random.randint(0, 2) else self._layout(random, model.layout)
        return Hello(
            sender=sender,
            version=PROTOCOL_VERSION if random.randint(0, 9) else 2,
            group=random.choice(["evil", "evil2", ""]),
            group_size=random.choice([1, 1, 1, 2, 65_536]),
            coordinates=Coordinates(random.choice(INTEGERS), 0, 0, random.randint(0, 3)),
            layout=layout,
            agent_metadata=random.randbytes(random.randint(0, 8)),
            transport="world" if random.randint(0, 9) else "other",
            answers=random.choice(["", victim.core.instance, "i-nobody"]) if random.randint(0, 2) else "",
            hello_sequence=random.choice(INTEGERS),
        )

    def _layout(self, random: Random, layout: CacheLayout) -> CacheLayout:
        """A layout that is almost right: some numbers of it are others."""
        built = msgspec.to_builtins(layout)
        for _ in range(random.randint(1, 3)):
            _mutate(random, built)
        try:
            return msgspec.convert(built, CacheLayout)
        except (msgspec.ValidationError, TypeError):
            pool = msgspec.structs.replace(layout.pools[0], units=random.choice([1, 2, 1 << 30]), rows=4)
            axis = Axis(random.choice([1, 4, 1 << 62]), 1, 0)
            planes = tuple(msgspec.structs.replace(plane, axis=axis) for plane in pool.planes)
            return msgspec.structs.replace(layout, pools=(msgspec.structs.replace(pool, planes=planes),))

    def _open(self, random: Random, head: dict[str, Any], victim: Rank) -> Open:
        grants = self.scene.grants(self.scene.target, random.randint(1, 9))
        session = victim.core._peers.of(head["sender"], "source")
        if random.randint(0, 2) == 0:
            grants = tuple(self._grant(random, grant) for grant in grants[: random.randint(0, 2)])
        parts: tuple[PartBytes, ...] = ()
        if session is not None and session.pair is not None and random.randint(0, 4):
            try:
                parts = parts_of(session.pair, grants)
            except Exception:  # noqa: BLE001 - the lie is too wild for an honest manifest; the core must cope
                parts = self._their_parts(random, victim)
        return Open(
            **head,
            token_count=random.choice([self.scene.shape.tokens, *INTEGERS]),
            grants=grants,
            parts=parts,
            ttl_seconds=random.choice([0.0, 1.0, 86_400.0]),
        )

    def _grant(self, random: Random, grant: Grant) -> Grant:
        units = tuple(random.choice([0, 1, 5, 11, 12, (1 << 31) - 1]) for _ in range(random.randint(0, 8)))
        start, stop = random.choice(INTEGERS), random.choice(INTEGERS)
        choices = [(start, stop), (grant.token_start, grant.token_stop), (0, min(stop, 100_000))]
        begin, end = random.choice(choices)
        return Grant(random.choice([grant.pool, "nothing", ""]), begin, end, random.choice([units, grant.units]))

    def _their_parts(self, random: Random, victim: Rank) -> tuple[PartBytes, ...]:
        found = [
            t.incoming.parts for t in victim.core._transfers.live() if t.incoming is not None and t.peer == "i-evil"
        ]
        if found and random.randint(0, 2):
            return random.choice(found)
        part = PartId("kv", random.choice(INTEGERS), random.choice(INTEGERS), 0, 4)
        return (PartBytes(part, random.choice(INTEGERS)),) * random.randint(0, 3)

    def _digest(self, random: Random, victim: Rank, sender: str) -> str:
        for role in ("source", "target"):
            session = victim.core._peers.of(sender, role)
            if session is not None and session.pair is not None and random.randint(0, 4):
                return session.pair.digest
        return random.choice(["", "0" * 32])

    def _text(self, random: Random) -> str:
        return random.choice(["", "because", "x" * 2048, "\u2028\u0000\U0001f916"])

    # ---- what must hold

    def check(self) -> None:
        """Every table within its bound, on both sides."""
        for rank in self.scene.ranks:
            sizes = rank.core.sizes()
            assert sizes["rooms"] <= SMALL.rooms + 8, sizes  # what our own engine asked for comes on top
            assert sizes["sessions"] <= SMALL.sessions + 1, sizes
            assert sizes["tombstones"] <= SMALL.tombstones, sizes
            assert sizes["forgotten_below"] <= SMALL.sessions, sizes
            assert sizes["instances_replaced"] <= SMALL.sessions, sizes
            assert sizes["transfers"] <= SMALL.rooms_per_peer * SMALL.sessions, sizes
            assert sizes["timer_entries"] <= 4_096, sizes
            assert len(rank.core.counters) < 400
            for peer, units in rank.core._transfers._units_of.items():
                assert peer == "i-d0" or units <= SMALL.units_per_peer
            rank.core.check_invariants()

    def end(self, *, serve: bool = True) -> None:
        """The liars fall silent: what they began ends, and one more honest room is served."""
        self.world.kill(self.world.ranks["evil"])
        self.pass_time(FORGETTING_SECONDS)
        for rank in self.scene.ranks:
            sizes = rank.core.sizes()
            assert (sizes["rooms"], sizes["transfers"], sizes["writes"]) == (0, 0, 0), (rank.name, sizes)
            assert rank.core.quiet
            peers = {name.split()[0] for name, *_ in rank.core.sessions()}
            assert peers <= {"i-p0", "i-d0"}, peers
        if serve:
            self.serve_a_room(Random(0))
        self.check()


KINDS: tuple[Any, ...] = (
    *(Hello, Hello, Hello, Open, Open, Open, Verdict, Verdict),
    *(Ping, Pong, UnknownPeer, Goodbye, Opened, Done, Close, Failed, Abort, Drained, Query, Forgotten),
)


def _mutate(random: Random, built: Any) -> None:
    """Change one leaf of nested lists and dicts."""
    while True:
        if not built:
            return
        place = random.choice(list(built) if isinstance(built, dict) else range(len(built)))
        if isinstance(built[place], list | dict) and built[place]:
            built = built[place]
            continue
        if isinstance(built[place], bool):
            built[place] = not built[place]
        elif isinstance(built[place], int):
            wild = [*INTEGERS, -1, built[place] + 1, built[place] * 2, -(1 << 63), (1 << 64) - 1]
            built[place] = max(-(1 << 63), min((1 << 64) - 1, random.choice(wild)))
        elif isinstance(built[place], str):
            built[place] = random.choice(["", "kv", "aux", "x" * 3000, built[place] + "x"])
        return

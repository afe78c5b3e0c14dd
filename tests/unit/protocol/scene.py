"""Two groups of ranks in one world, one room between them, and a script that plays both engines.

A :class:`Shape` says how the groups are cut; a :class:`Scene` builds them, fills the source with bytes, runs the script
and compares every byte of the target with a naive reshard.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np

from kvbaton.errors import AbortedError
from kvbaton.layout import CacheLayout, Coordinates, Plane, Pool, Region, aux_pool, kv_pool, pool_bytes
from kvbaton.protocol.core import Core
from kvbaton.protocol.effects import KVPoll, RoomStatus
from kvbaton.protocol.events import (
    AbortRequested,
    Chunk,
    ChunkSubmitted,
    GrantsPublished,
    ReceiverOpened,
    SenderOpened,
)
from kvbaton.protocol.messages import AnyMessage, Grant, Role
from kvbaton.protocol.settings import Settings
from kvbaton.testing.rank import Rank
from kvbaton.testing.world import Network, World

ROOM = 7
ENDED = (KVPoll.Failed, KVPoll.Success)
QUICK = Settings(bootstrap_timeout=20.0, waiting_timeout=30.0, announce_seconds=15.0, settle_seconds=5.0)

#: Cells of the transition table that the tests of this directory have reached, as the cores counted them.
REACHED: Counter[str] = Counter()
_cores: list[Core] = []


def collect() -> None:
    """Add the counters of every core that was made since the last call."""
    for core in _cores:
        REACHED.update(core.counters)
    _cores.clear()


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Topology and prompt. ``chunks``: tokens at which chunks end, the last one included."""

    source_tp: int = 1
    source_pp: int = 1
    target_tp: int = 1
    target_pp: int = 1
    heads: int = 4
    latent: bool = False
    source_page: int = 4
    target_page: int = 4
    tokens: int = 22
    prefix: int = 0
    chunks: tuple[int, ...] = (12, 22)
    layers: int = 2
    hold_writes: bool = False
    aux_bytes: int = 8

    @property
    def latent_heads(self) -> int:
        return 1 if self.latent else self.heads


PAIR = Shape()
#: Name → shape: what every fault is tried on.
SHAPES = {
    "1→1": PAIR,
    "2→1": Shape(source_tp=2),
    "1→2": Shape(target_tp=2),
    "bystander": Shape(source_tp=2, latent=True),
    "stages": Shape(source_pp=2, target_pp=1),
    "pages": Shape(source_page=8, target_page=4, chunks=(8, 16, 22)),
    "prefix": Shape(prefix=8),
    "hit": Shape(prefix=20, tokens=20, chunks=(20,)),
}


def layouts(shape: Shape, *, side: Role, units: int = 12, model: str = "m", dtype: str = "u1") -> list[CacheLayout]:
    """Layouts of one group, stage by stage."""
    source = side == "source"
    tp, pp = (shape.source_tp, shape.source_pp) if source else (shape.target_tp, shape.target_pp)
    page_size = shape.source_page if source else shape.target_page
    made = []
    for stage in range(pp):
        owned = range(shape.layers * stage // pp, shape.layers * (stage + 1) // pp)
        for rank in range(tp):
            pool = kv_pool(
                owned,
                pages=units,
                page_size=page_size,
                heads=shape.latent_heads,
                head_bytes=2,
                dtype=dtype,
                tp_size=tp,
                tp_rank=rank,
                name="mla" if shape.latent else "kv",
                kind="mla" if shape.latent else "kv",
                tensors=("latent",) if shape.latent else ("k", "v"),
            )
            base = (1 << 40) * (1 + len(made) + (0 if source else 64))
            pools, regions = [pool], [Region(base, pool_bytes(pool))]
            if not source or stage == pp - 1:
                pools.append(aux_pool(slots=3, slot_bytes=shape.aux_bytes, tp_size=tp, tp_rank=rank, region=1))
                regions.append(Region(base + (1 << 32), 3 * shape.aux_bytes))
            layout = CacheLayout(model, tuple(regions), tuple(pools))
            layout.validate()
            made.append(layout)
    return made


def add_group(
    world: World, shape: Shape, *, side: Role, name: str = "", model: str = "m", dtype: str = "u1"
) -> list[Rank]:
    """Ranks of one group; the memory of a source is filled, replicas alike."""
    made = layouts(shape, side=side, model=model, dtype=dtype)
    name = name or ("p" if side == "source" else "d")
    ranks = [
        world.add(f"{name}{i}", layout, group=name, group_size=len(made), coordinates=Coordinates(tp=i))
        for i, layout in enumerate(made)
    ]
    _cores.extend(rank.core for rank in ranks)
    if side == "source":
        for rank in ranks:
            fill(rank)
    return ranks


def fill(rank: Rank) -> None:
    """Bytes that name their place: the same on every rank that holds the same item."""
    for pool in rank.layout.pools:
        for plane in pool.planes:
            for unit in range(pool.units):
                for row in range(pool.rows):
                    for item in range(plane.axis.first, plane.axis.first + plane.axis.width):
                        seed = hash((plane.layer, unit, row, item)) + (len(plane.name) + ord(plane.name[0])) * 7919
                        value = (seed * 2654435761 >> 7) % 255 + 1
                        item_bytes(rank, plane, unit, row, item)[:] = value


def item_bytes(rank: Rank, plane: Plane, unit: int, row: int, item: int) -> np.ndarray:
    """One item of one row of one unit, straight from the definition of a layout. ``item`` is absolute."""
    address = (
        rank.layout.regions[plane.region].address
        + plane.offset
        + unit * plane.unit_stride
        + row * plane.row_stride
        + (item - plane.axis.first) * plane.item_stride
    )
    return rank.view(address, plane.item_bytes)


@dataclass(eq=False)
class Scene:
    """See the module. ``drive`` plays the engines: publish at once, submit chunks when wanted."""

    shape: Shape = PAIR
    settings: Settings = QUICK
    room: int = ROOM
    world: World = field(init=False)
    sources: list[Rank] = field(init=False)
    targets: list[Rank] = field(init=False)

    def __post_init__(self) -> None:
        self.world = World(self.settings)
        self.sources = add_group(self.world, self.shape, side="source")
        self.targets = add_group(self.world, self.shape, side="target")
        for rank in self.sources:
            rank.hold_writes = self.shape.hold_writes
        self._submitted: dict[str, int] = {}

    # ---- the only source and target of small scenes -------------------------------------------------------------

    @property
    def source(self) -> Rank:
        return self.sources[0]

    @property
    def target(self) -> Rank:
        return self.targets[0]

    @property
    def ranks(self) -> list[Rank]:
        return [*self.sources, *self.targets]

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(rank.address for rank in self.sources)

    def status(self, side: Role, room: int = 0) -> RoomStatus:
        rank = self.source if side == "source" else self.target
        return rank.status(side, room or self.room)

    # ---- what engines do ----------------------------------------------------------------------------------------

    def source_units(self, room: int = 0) -> list[int]:
        count = -(-self.shape.tokens // self.shape.source_page)
        return [int(u) for u in np.random.default_rng((room or self.room, 1)).permutation(12)[:count]]

    def target_units(self, room: int = 0) -> list[int]:
        page = self.shape.target_page
        count = max(0, -(-self.shape.tokens // page) - self.shape.prefix // page)
        return [int(u) for u in np.random.default_rng((room or self.room, 2)).permutation(12)[:count]]

    def open_senders(self, room: int = 0) -> None:
        for rank in self.sources:
            rank.do(SenderOpened(room or self.room))

    def open_receivers(self, room: int = 0) -> None:
        for rank in self.targets:
            rank.do(ReceiverOpened(room or self.room, self.addresses))

    def grants(self, rank: Rank, room: int = 0) -> tuple[Grant, ...]:
        found = []
        for pool in rank.layout.pools:
            if pool.paged:
                found.append(Grant(pool.name, self.shape.prefix, self.shape.tokens, tuple(self.target_units(room))))
            else:
                found.append(Grant(pool.name, 0, 0, ((room or self.room) % pool.units,)))
        return tuple(found)

    def publish(self, room: int = 0) -> None:
        for rank in self.targets:
            rank.do(GrantsPublished(room or self.room, self.grants(rank, room), self.shape.tokens))

    def chunk(self, rank: Rank, number: int, room: int = 0) -> Chunk:
        """Chunk ``number`` of the shape as ``rank`` hands it over; slots go with the last one."""
        stops = self.shape.chunks
        start, stop, last = (stops[number - 1] if number else 0), stops[number], number == len(stops) - 1
        spans = []
        for pool in rank.layout.pools:
            if pool.paged:
                first, after = start // pool.rows, -(-stop // pool.rows)
                spans.append(Grant(pool.name, start, stop, tuple(self.source_units(room)[first:after])))
            elif last:
                spans.append(Grant(pool.name, 0, 0, ((room or self.room) % pool.units,)))
        return Chunk(spans=tuple(spans), last=last)

    def submit(self, number: int, room: int = 0) -> None:
        for rank in self.sources:
            rank.do(ChunkSubmitted(room or self.room, self.chunk(rank, number, room)))

    def start(self) -> None:
        """Everything up to the point where the source may submit."""
        self.open_senders()
        self.open_receivers()
        self.publish()
        self.world.run()

    def submit_all(self) -> None:
        for number in range(len(self.shape.chunks)):
            self.submit(number)
        self.world.run()

    def abort(self, side: Role, reason: str = "client gone") -> None:
        for rank in self.sources if side == "source" else self.targets:
            rank.do(AbortRequested(self.room, side, AbortedError(reason)))

    def drive(self, seconds: float) -> None:
        """Both engines at work: each source rank submits as soon as its room waits for input."""
        end = self.world.now + seconds
        while True:
            self.world.run()
            for rank in self.sources:
                poll = rank.status("source", self.room).poll
                number = self._submitted.get(rank.name, 0)
                if (
                    rank.alive
                    and poll in (KVPoll.WaitingForInput, KVPoll.Transferring)
                    and number < len(self.shape.chunks)
                ):
                    self._submitted[rank.name] = number + 1
                    rank.do(ChunkSubmitted(self.room, self.chunk(rank, number)))
            self.world.run()
            if self.world.now >= end or self.over:
                return
            self.world.run(until=min(end, self.world.now + 0.25))

    # ---- what must be true --------------------------------------------------------------------------------------

    @property
    def over(self) -> bool:
        """No living rank has anything left to do, say or hold."""
        return all(not rank.alive or (not rank.core.live_rooms and rank.core.quiet) for rank in self.ranks)

    def polls(self) -> dict[str, KVPoll]:
        return {
            rank.name: rank.status("source" if rank in self.sources else "target", self.room).poll
            for rank in self.ranks
            if rank.alive
        }

    def expect_success(self, room: int = 0) -> None:
        room = room or self.room
        for rank in self.sources:
            assert rank.status("source", room).poll is KVPoll.Success, self.explain(room)
        for rank in self.targets:
            assert rank.status("target", room).poll is KVPoll.Success, self.explain(room)
        self.expect_bytes(room)
        self.expect_over()

    def expect_failed(self, room: int = 0) -> None:
        """Every living rank failed with an error that names a cause, and nobody holds anything.

        But for bystanders: they owe nothing, and may have released before the others failed.
        """
        room = room or self.room
        for rank in self.ranks:
            if rank.alive:
                status = rank.status("source" if rank in self.sources else "target", room)
                if rank in self.sources and not status.bytes and status.poll is KVPoll.Success:
                    continue
                assert status.poll is KVPoll.Failed, self.explain(room)
                assert status.error is not None, self.explain(room)
                assert status.error.code not in ("error", "internal"), (repr(status.error), self.explain(room))
                assert status.error.room == room, (repr(status.error), self.explain(room))
        self.expect_over()

    def expect_over(self) -> None:
        for rank in self.ranks:
            if rank.alive:
                assert not any(status.leased for status in rank.statuses.values()), self.explain()
        assert self.over, self.explain()

    def expect_bytes(self, room: int = 0) -> None:
        for target in self.targets:
            for pool in target.layout.pools:
                self._expect_pool(target, pool, room)

    def _expect_pool(self, target: Rank, pool: Pool, room: int) -> None:
        slot = (room or self.room) % pool.units
        t_units, s_units = self.target_units(room), self.source_units(room)
        first = self.shape.prefix // pool.rows
        for plane in pool.planes:
            for item in range(plane.axis.first, plane.axis.first + plane.axis.width):
                owner, s_pool, s_plane = self._owner(pool.name, plane, item)
                for token in range(self.shape.prefix, self.shape.tokens) if pool.paged else (0,):
                    t_unit = t_units[token // pool.rows - first] if pool.paged else slot
                    s_unit = s_units[token // s_pool.rows] if pool.paged else slot
                    got = item_bytes(target, plane, t_unit, token % pool.rows, item)
                    wanted = item_bytes(owner, s_plane, s_unit, token % s_pool.rows, item)
                    if not np.array_equal(got, wanted):
                        raise AssertionError(f"{pool.name} {plane.layer} {plane.name} token {token} item {item} differ")

    def _owner(self, pool_name: str, plane: Plane, item: int) -> tuple[Rank, Pool, Plane]:
        for rank in self.sources:
            for pool in rank.layout.pools:
                for theirs in pool.planes:
                    if (pool.name, theirs.layer, theirs.name) == (pool_name, plane.layer, plane.name):
                        axis = theirs.axis
                        if axis.first <= item < axis.first + axis.width:
                            return rank, pool, theirs
        raise AssertionError(f"no source holds {pool_name} {plane.layer} {plane.name} {item}")

    def explain(self, room: int = 0) -> str:
        """Everything that a failed test should print."""
        room = room or self.room
        lines = [f"\nroom {room} at {self.world.now:g} s", self.world.describe()]
        for rank in self.ranks:
            for role in ("source", "target"):
                if (role, room) in rank.statuses:
                    lines.append(f"{rank.name} {role}: {rank.statuses[role, room]}")  # type: ignore[index]
            lines += [f"{rank.name} {line.at:9.3f} {line.text}" for line in rank.core.trace_and_state(room)]
        return "\n".join(lines)


@dataclass(eq=False)
class Fault:
    """A network that treats message ``index`` of a run (heartbeats included) specially.

    ``lost``: it never arrives. ``doubled``: twice. ``delayed``: after the next message on the same way, or never.
    """

    kind: str
    index: int
    seen: int = 0
    kept: tuple[Rank, Rank, AnyMessage] | None = None

    def __call__(self, sender: Rank, receiver: Rank, message: AnyMessage) -> int | list[AnyMessage]:
        number, self.seen = self.seen, self.seen + 1
        if number == self.index:
            if self.kind == "delayed":
                self.kept = (sender, receiver, message)
            return {"lost": 0, "doubled": 2, "delayed": 0}[self.kind]
        if self.kept is not None and self.kept[:2] == (sender, receiver):
            late, self.kept = self.kept[2], None
            return [message, late]
        return 1


def dropping(*kinds: type) -> Network:
    """A network that loses every message of these kinds."""
    return lambda _from, _to, message: 0 if isinstance(message, kinds) else 1


def holding(shape: Shape) -> Shape:
    """The same shape with writes that settle only when a test says so."""
    return replace(shape, hold_writes=True)

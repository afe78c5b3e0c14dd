"""One rank of a world without threads: a real core, its memory, and what it still has to do with writes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvbaton.control.base import LinkId
from kvbaton.errors import DisconnectedError, InternalError
from kvbaton.layout import CacheLayout
from kvbaton.plan.pair import PairPlan
from kvbaton.protocol.core import Core
from kvbaton.protocol.effects import (
    PeerLost,
    PostWrite,
    RoomStatus,
)
from kvbaton.protocol.events import (
    Event,
    PeerQuiesced,
    ReceiverOpened,
    SenderOpened,
    WriteBroken,
    WriteSettled,
)
from kvbaton.protocol.messages import Role

if TYPE_CHECKING:
    from kvbaton.testing.world import World


@dataclass(eq=False)
class Rank:
    """One rank of the world: a core, its memory, and what it told its engine."""

    world: World
    name: str
    core: Core
    address: str
    memory: dict[int, NDArray[np.uint8]]
    statuses: dict[tuple[Role, int], RoomStatus] = field(default_factory=dict)
    links: dict[LinkId, tuple[Rank | None, LinkId | None, str]] = field(default_factory=dict)
    lost: list[PeerLost] = field(default_factory=list)
    pairs: dict[str, PairPlan] = field(default_factory=dict)
    held: list[PostWrite] = field(default_factory=list)
    hold_writes: bool = False
    hold_quiesce: bool = False
    quiescing: list[str] = field(default_factory=list)
    alive: bool = True

    @property
    def layout(self) -> CacheLayout:
        return self.core.identity.layout

    def do(self, event: Event) -> None:
        """Something happens at this rank."""
        if not self.alive:
            return
        if isinstance(event, SenderOpened):
            self.statuses.pop(("source", event.room), None)
        elif isinstance(event, ReceiverOpened):
            self.statuses.pop(("target", event.room), None)
        self.world.perform(self, self.core.handle(event, self.world.now))
        if self.world.checking:
            self.core.check_invariants()
            self._check_leases()

    def _check_leases(self) -> None:
        """A write that is posted and not settled may touch memory: both ends must know."""
        if self.held and self.core.quiet:
            raise InternalError(f"{self.name} holds writes that its core has forgotten")
        for write in self.held:
            target = self.world.by_instance(write.peer)
            if target is not None and not target.core.receiving:
                raise InternalError(f"{self.name} may still write to {target.name}, which holds no lease")

    def link_to(self, other: Rank) -> LinkId:
        """The link over which this rank and ``other`` talk."""
        for link, (end, _, _) in self.links.items():
            if end is other:
                return link
        raise InternalError(f"{self.name} has no link to {other.name}")

    def status(self, role: Role, room: int) -> RoomStatus:
        return self.statuses.get((role, room), RoomStatus())

    def view(self, address: int, length: int) -> NDArray[np.uint8]:
        """The bytes of this rank's memory at an address."""
        for base, buffer in self.memory.items():
            if base <= address and address + length <= base + len(buffer):
                return buffer[address - base : address - base + length]
        raise InternalError(f"{self.name} has no memory at {address}..{address + length}")

    def release_writes(self) -> None:
        """Let the writes that were held land and settle, oldest first."""
        held, self.held = self.held, []
        for write in held:
            self.world.land(self, write)
            self.do(WriteSettled(write.write))

    def release_quiesced(self) -> None:
        """Let what stopped peers had put on the wire be over and done with."""
        peers, self.quiescing = self.quiescing, []
        self.world.later(self, [PeerQuiesced(peer) for peer in peers])

    def break_writes(self, *, landed: bool) -> None:
        """Let the writes that were held fail, with or without their bytes landing."""
        held, self.held = self.held, []
        for write in held:
            if landed:
                self.world.land(self, write)
            self.do(WriteBroken(write.write, DisconnectedError("the wire broke")))

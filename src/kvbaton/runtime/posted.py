"""Writes that were posted and may still touch memory: in flight, or broken until their peer is fenced.

Several writes to one peer may be one post: they settle and break together."""

from __future__ import annotations

from collections.abc import Iterator

from kvbaton.protocol.effects import PostWrite
from kvbaton.transports.base import Handle


class PostedWrites:
    """See the module. Iterates over all of them."""

    def __init__(self) -> None:
        self._in_flight: dict[Handle, tuple[PostWrite, ...]] = {}
        self._broken: list[PostWrite] = []

    def __iter__(self) -> Iterator[PostWrite]:
        for writes in self._in_flight.values():
            yield from writes
        yield from self._broken

    def sizes(self) -> dict[str, int]:
        return {"writes_in_flight": sum(map(len, self._in_flight.values())), "writes_broken": len(self._broken)}

    @property
    def moving(self) -> bool:
        """Some are in flight, and only polling says when they are over."""
        return bool(self._in_flight)

    def in_flight(self) -> list[tuple[Handle, tuple[PostWrite, ...]]]:
        """Every post and its writes."""
        return list(self._in_flight.items())

    def begun(self, handle: Handle, writes: tuple[PostWrite, ...]) -> None:
        self._in_flight[handle] = writes

    def ended(self, handle: Handle) -> None:
        """It is not in flight any more. If it broke, :meth:`broke` has to be told."""
        del self._in_flight[handle]

    def broke(self, write: PostWrite) -> None:
        """A write failed: until its peer is fenced it may still be read from here, and land there."""
        self._broken.append(write)

    def drop(self, peer: str) -> list[PostWrite]:
        """Those towards a peer that was fenced: nothing of them touches our memory any more."""
        dropped = [write for write in self if write.peer == peer]
        self._in_flight = {handle: writes for handle, writes in self._in_flight.items() if writes[0].peer != peer}
        self._broken = [write for write in self._broken if write.peer != peer]
        return dropped

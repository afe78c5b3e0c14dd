"""The facade as an engine sees it: what a scheduler needs, whoever stands behind it.

:class:`kvbaton.manager.KVManager` is one rank's; the embedded engine has another one over a group of ranks. An adapter
or a scheduler that is typed with these works with both. :class:`RankManager` is what adapters of other engines use: one
rank's, with what step-driven engines need.

A room on either side goes through :class:`KVPoll` in order, or ends as Failed. Units belong to the room from ``submit``
or ``publish`` until ``released``: it has ended *and* no write can touch them any more. A failure is told at once, the
release comes on proof. Nothing here blocks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from kvbaton.errors import KVBatonError
from kvbaton.protocol.effects import KVPoll
from kvbaton.protocol.messages import Grant

if TYPE_CHECKING:
    from kvbaton.handles import Finished, Freed
    from kvbaton.protocol.effects import PeerLost

Fence = Callable[[], bool]


class Room(Protocol):
    """What both sides have."""

    room: int

    def poll(self) -> KVPoll:
        """Failed and Success never change any more."""

    @property
    def error(self) -> KVBatonError | None:
        """The first root cause, once ``poll()`` is Failed."""

    @property
    def leased(self) -> bool:
        """A write may still touch this room's units, or will."""

    @property
    def released(self) -> bool:
        """Ended, and nothing is leased: everything may be freed."""

    @property
    def bytes(self) -> int:
        """Bytes that this room moves."""

    @property
    def handoff_seconds(self) -> float:
        """From ``publish`` (receiver) or creation (sender) to the outcome, or to now."""

    @property
    def exposed_seconds(self) -> float:
        """From the last chunk's submission to its last byte having settled."""

    def fail(self, error: KVBatonError) -> None:
        """End the room on both sides, with ``error`` as the cause. Does nothing once it has ended."""

    def abort(self, reason: str) -> None:
        """Give the room up on both sides. Does nothing once it has ended."""


class Sender(Room, Protocol):
    """The prefill side of one room."""

    @property
    def prefix_len(self) -> int:
        """Tokens that every target holds already, known from WaitingForInput on."""

    def submit(
        self, spans: Sequence[Grant], *, last: bool, ready: Fence, layers: tuple[int, int] | None = None
    ) -> None:
        """Hand over a chunk, in token order, or some ``layers`` of it as soon as they are computed; nothing is read
        before ``ready()`` is true."""


class RankSender(Sender, Protocol):
    """:class:`kvbaton.KVSender`: the prefill side on one rank."""

    @property
    def settled(self) -> bool:
        """Every chunk so far is in the memory of every target: nothing reads its units any more."""

    def withdraw(self) -> bool:
        """Ask for the units of all chunks back; whether anything is to be submitted again, once ``settled``."""


class Receiver(Room, Protocol):
    """The decode side of one room."""

    def publish(self, spans: Sequence[Grant], *, token_count: int) -> None:
        """Grant units to the sources for a prompt of ``token_count`` tokens."""


class Manager(Protocol):
    """One rank's end of all its rooms, or a group's."""

    @property
    def wakeup(self) -> threading.Event:
        """Set whenever a room's state changes; an engine loop may sleep on it."""

    def sender(self, room: int) -> Sender:
        """Begin to send a room. Raises LocalProtocolError, OverloadedError."""

    def receiver(self, room: int, sources: Sequence[str]) -> Receiver:
        """Begin to receive a room from the source ranks at these addresses. Raises LocalProtocolError,
        OverloadedError, ConfigError."""


class RankManager(Manager, Protocol):
    """:class:`kvbaton.manager.KVManager`, opened with ``collect_finished``; see there."""

    def sender(self, room: int, *, tag: Any = None) -> RankSender: ...

    def receiver(self, room: int, sources: Sequence[str], *, begun: bool = False, tag: Any = None) -> Receiver: ...

    def decline(self, room: int, sources: Sequence[str], reason: str, *, tag: Any = None) -> Receiver:
        """Let the sources know that nothing is wanted of a room."""

    def take_freed(self) -> list[Freed]:
        """Rooms whose units became free, each once; senders are told before their rooms end."""

    def take_finished(self) -> list[Finished]:
        """Rooms that ended and whose units are free, each once."""

    def take_lost_peers(self) -> list[PeerLost]:
        """Peers that went silent, ended or were replaced."""

    def wait(self, seconds: float) -> bool:
        """Sleep until something has changed, at most so long."""

    @property
    def live_rooms(self) -> int:
        """Rooms that have not ended, or whose units are still leased."""

    @property
    def quarantined_rooms(self) -> int:
        """Of those, the ones that have failed."""

"""Message links between ranks: bytes in, bytes out, nothing interpreted.

Rules:
- A rank listens at one address; the target of a transfer dials. A link is a two-way stream of messages,
  in order while it lives; messages may be lost when it breaks, the protocol above re-sends.
- One thread (the driver) calls everything except :meth:`Links.wake`, which any thread may call.
- ``send`` never blocks: a full queue drops the message and says so.
- A link to an address re-dials by itself for as long as it is open. What is sent while it is not up waits in
  the link's bounded queue.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NewType

from msgspec import Struct

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

LinkId = NewType("LinkId", int)
"""One link of this process; never reused."""

#: Largest message that is sent or accepted, in bytes. Page lists of a 1 M token prompt fit several times.
MAX_MESSAGE_BYTES = 8 << 20


class LinkChange(enum.Enum):
    """What became of a link, as far as the operating system proves it."""

    UP = "up"  #: connected (again); messages sent before may be lost
    DOWN = "down"  #: the stream broke; says nothing about the process behind it
    REFUSED = "refused"  #: nobody listens at the address any more: the process that did has closed or died; may repeat


class Arrived(Struct, frozen=True):
    """A message came in."""

    link: LinkId
    payload: bytes


class Changed(Struct, frozen=True):
    """A link changed. Only dialled links report; accepted ones just fall silent."""

    link: LinkId
    change: LinkChange


class Links(ABC):
    """All message links of one rank."""

    @property
    @abstractmethod
    def address(self) -> str:
        """What a peer dials to reach this rank, e.g. ``tcp://127.0.0.1:40123``."""

    @abstractmethod
    def dial(self, address: str) -> LinkId:
        """Open a link to ``address``; returns at once.

        Raises:
            ConfigError: an address that cannot be.
            OverloadedError: too many links are open.
            TransportError: the operating system gives no descriptor or no memory for it.
        """

    @abstractmethod
    def send(self, link: LinkId, *payloads: bytes) -> bool:
        """Queue messages, in order; together they cost little more than one. False if any of them was dropped: link
        unknown or closed, queue full, or too large. One that is too large takes no other with it."""

    @abstractmethod
    def receive(self) -> list[Arrived | Changed]:
        """Everything that came in, oldest first, at most a bounded batch; never blocks."""

    @property
    def unread(self) -> bool:
        """Whether more had come in than the last :meth:`receive` returned, for all that is known; False where an
        implementation cannot say."""
        return False

    @abstractmethod
    def wait(self, timeout_seconds: float | None) -> None:
        """Sleep until something arrives, :meth:`wake` is called or the time is over (None: no limit)."""

    @abstractmethod
    def wake(self) -> None:
        """Make a current or the next :meth:`wait` return. The only call that is safe from any thread."""

    @abstractmethod
    def close_link(self, link: LinkId) -> None:
        """Close one link. Idempotent. What an accepted link still brings in is ignored; its dialler is not told."""

    def sizes(self) -> dict[str, int]:
        """Entries of each table, by name, for people who look for leaks. Empty where an implementation keeps none."""
        return {}

    @abstractmethod
    def stop_listening(self) -> None:
        """Free the address that peers dial, for somebody else. Dialled links go on. Idempotent."""

    @abstractmethod
    def close(self) -> None:
        """Close all links and the listening address. Idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

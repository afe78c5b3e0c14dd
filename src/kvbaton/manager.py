"""The engines' only doorway: KVManager, KVSender, KVReceiver, KVPoll.

An engine keeps its own queues and polls; nothing here blocks, does I/O or calls back. Reads (``poll``, ``leased``,
``error``) are plain attribute reads of values that the driver thread publishes.

INTERFACE DRAFT: the implementation lands next; signatures are what engines code against.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvbaton.errors import KVBatonError


class KVPoll(enum.IntEnum):
    Failed = 0
    Bootstrapping = 1
    WaitingForInput = 2
    Transferring = 3
    Success = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Units of one pool that hold a token range.

    ``units`` are the page ids of absolute pages ``token_start // page_size`` up to and including the page of
    ``token_stop - 1`` (any order in memory, position in the list = position in the prompt). For slot pools
    (``aux``, ``state``): ``units`` is ``[slot]`` and the token range is ``0..0``.
    """

    pool: str
    units: Sequence[int]
    token_start: int = 0
    token_stop: int = 0


#: The fence of data that is already in memory.
def READY() -> bool:
    return True


class KVSender:
    """The prefill side of one room."""

    room: int

    def poll(self) -> KVPoll: ...
    @property
    def error(self) -> KVBatonError | None:
        """First root cause once poll() is Failed."""

    @property
    def leased(self) -> bool:
        """True while a write may still read our pages or slots; free them only when this is False."""

    @property
    def prefix_len(self) -> int:
        """Tokens that every target already holds (known from WaitingForInput on): no need to submit them."""

    def submit(self, spans: Sequence[Span], *, last: bool, ready: Callable[[], bool]) -> None:
        """Hand over a chunk that is (or will be, when ready() turns true) computed. Chunks come in token order, all
        but the last end on a page boundary; aux and states go with the last one."""

    def abort(self, reason: str) -> None: ...


class KVReceiver:
    """The decode side of one room."""

    room: int

    def poll(self) -> KVPoll: ...
    @property
    def error(self) -> KVBatonError | None: ...
    @property
    def leased(self) -> bool:
        """True while a peer may still write our pages or slots. After Success: False at once."""

    @property
    def bytes_expected(self) -> int: ...
    @property
    def handoff_seconds(self) -> float:
        """From publish() to Success."""

    def publish(self, spans: Sequence[Span], *, token_count: int) -> None:
        """Grant pages and slots to the sources. kv token range starts at the prefix we already hold."""

    def abort(self, reason: str) -> None: ...


class KVManager:
    def start(self) -> None: ...
    def close(self) -> None: ...

    @property
    def instance(self) -> str: ...
    @property
    def address(self) -> str:
        """tcp://host:port of our control link, for the registry."""

    def sender(self, room: int) -> KVSender:
        """Raises LocalProtocolError if the room is live already, OverloadedError if too many are."""

    def receiver(self, room: int, sources: Sequence[str]) -> KVReceiver:
        """sources: control addresses of all ranks of the prefill group (from the registry)."""

    wakeup: threading.Event
    """Set whenever any sender's or receiver's poll/leased changed; shared with the engine's scheduler loop."""

    def story(self, room: int) -> list[str]: ...
    def leased_rooms(self) -> int: ...

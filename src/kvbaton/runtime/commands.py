"""What the engine asks of the driver, in order. A chunk waits here until its fence says that its data is in memory."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator

from msgspec import Struct

from kvbaton.errors import InternalError
from kvbaton.protocol.events import AbortRequested, ChunkSubmitted, ChunksWithdrawn, Event, SenderOpened

log = logging.getLogger("kvbaton.driver")

Fence = Callable[[], bool]

#: Most commands that one turn takes: thousands at once would keep a rank from saying that it lives.
BATCH = 256


class Command(Struct, frozen=True):
    """An event from the engine; a chunk waits until its fence says that the data is there."""

    event: Event
    fence: Fence | None = None

    @property
    def room(self) -> int:
        """The room of a chunk; -1 of anything else."""
        return self.event.room if isinstance(self.event, ChunkSubmitted) else -1


class Commands:
    """``post`` and ``ask`` may be called from any thread, everything else belongs to the driver's.

    ``wants_chunks``: whether a room may still use a chunk.
    """

    def __init__(self, wants_chunks: Callable[[int], bool], counters: Counter[str]) -> None:
        self._wants_chunks = wants_chunks
        self._counters = counters
        self._posted: deque[Command] = deque()
        self._fenced: dict[int, deque[Command]] = {}  # chunks whose data is not in memory yet, by room, oldest first
        self._questions: deque[Callable[[], None]] = deque()

    def __len__(self) -> int:
        """Commands that nobody has looked at."""
        return len(self._posted)

    @property
    def polling(self) -> bool:
        """Some chunk's data is not in memory yet, and only its fence says when it is."""
        return bool(self._fenced)

    def sizes(self) -> dict[str, int]:
        return {"commands": len(self._posted), "fenced_chunks": sum(map(len, self._fenced.values()))}

    def post(self, command: Command) -> None:
        self._posted.append(command)

    def ask(self, question: Callable[[], None]) -> None:
        """Have a question looked at on the driver's thread."""
        self._questions.append(question)

    def answer(self) -> None:
        while self._questions:
            self._questions.popleft()()

    def take(self) -> Iterator[Event]:
        """What is posted by now, or a batch of it, but for chunks that have to wait."""
        for _ in range(min(BATCH, len(self._posted))):
            command = self._posted.popleft()
            room = command.room
            if command.fence is None:
                if isinstance(command.event, ChunksWithdrawn | SenderOpened):  # what waits was submitted before
                    self._fenced.pop(command.event.room, None)
                yield command.event
            elif room in self._fenced:
                self._fenced[room].append(command)
            else:
                self._fenced[room] = deque((command,))
                yield from self._try(room)

    def release(self) -> Iterator[Event]:
        """Chunks whose data is in memory by now. Those of one room keep their order, so only the first is asked for;
        rooms do not wait for each other, and one that failed wants no chunk any more."""
        for room in list(self._fenced):
            if self._wants_chunks(room):
                yield from self._try(room)
            else:
                del self._fenced[room]

    def _try(self, room: int) -> Iterator[Event]:
        """The chunks of a room, up to the first whose data is not in memory. A fence that raises (a CUDA event after an
        error) says that the data never will be there: the room ends at once, and so do its other chunks."""
        waiting = self._fenced[room]
        while waiting:
            fence = waiting[0].fence
            try:
                ready = fence is None or fence()
            except Exception as error:
                log.error("the ready fence of a chunk of room %d raised; the room ends", room, exc_info=error)
                self._counters["fences_raised"] += 1
                waiting.clear()
                yield AbortRequested(room, "source", _raised(error, room))
                break
            if not ready:
                return
            yield waiting.popleft().event
        del self._fenced[room]


def _raised(error: Exception, room: int) -> InternalError:
    return InternalError(
        f"the ready fence of a chunk raised: {error}; look for the cause in the engine that computed it", room=room
    )

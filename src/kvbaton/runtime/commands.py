"""What the engine asks of the driver, in order. A chunk waits here until its fence says that its data is in memory."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kvbaton.errors import InternalError
from kvbaton.protocol.events import AbortRequested, ChunkSubmitted, Event

log = logging.getLogger("kvbaton.driver")

Fence = Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Command:
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
        self._fenced: deque[Command] = deque()
        self._questions: deque[Callable[[], None]] = deque()

    def __len__(self) -> int:
        """Commands that nobody has looked at."""
        return len(self._posted)

    @property
    def fenced(self) -> int:
        """Chunks whose data is not in memory yet."""
        return len(self._fenced)

    def post(self, command: Command) -> None:
        self._posted.append(command)

    def ask(self, question: Callable[[], None]) -> None:
        """Have a question looked at on the driver's thread."""
        self._questions.append(question)

    def answer(self) -> None:
        while self._questions:
            self._questions.popleft()()

    def take(self) -> Iterator[Event]:
        """What is posted by now, but for chunks that have to wait."""
        for _ in range(len(self._posted)):
            command = self._posted.popleft()
            if command.fence is None:
                yield command.event
            elif self._fenced:  # perhaps of the same room, whose chunks keep their order
                self._fenced.append(command)
            else:
                yield from self._try(command, self._fenced)

    def release(self) -> Iterator[Event]:
        """Chunks whose data is in memory by now. Those of one room keep their order, other rooms may overtake; a room
        that failed wants none any more."""
        waiting, self._fenced = self._fenced, deque()
        blocked: set[int] = set()
        for command in waiting:
            if not self._wants_chunks(command.room):
                continue
            if command.room in blocked:
                self._fenced.append(command)
                continue
            before = len(self._fenced)
            yield from self._try(command, self._fenced)
            if len(self._fenced) > before:
                blocked.add(command.room)

    def _try(self, command: Command, waiting: deque[Command]) -> Iterator[Event]:
        """The chunk if it is ready; otherwise it waits. A fence that raises (a CUDA event after an error) says that the
        data never will be there: the room ends at once, and its other chunks are dropped as those of any failed room.
        """
        try:
            ready = command.fence is None or command.fence()
        except Exception as error:
            log.error("the ready fence of a chunk of room %d raised; the room ends", command.room, exc_info=error)
            self._counters["fences_raised"] += 1
            cause = InternalError(
                f"the ready fence of a chunk raised {error!r}; look for the cause in the engine that computed it",
                room=command.room,
            )
            yield AbortRequested(command.room, "source", cause)
            return
        if ready:
            yield command.event
        else:
            waiting.append(command)

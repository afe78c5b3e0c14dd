"""What the engine asks of the driver: chunks keep their order, wait for their fences, and end with their sender."""

from __future__ import annotations

from collections import Counter

from kvbaton.handles import ALWAYS_READY
from kvbaton.protocol.events import Chunk, ChunkSubmitted, Event, SenderOpened
from kvbaton.runtime.commands import BATCH, Command, Commands, Fence

ROOM = 7
FIRST, SECOND = Chunk(spans=(), last=False), Chunk(spans=(), last=True)


def turn(commands: Commands) -> list[Event]:
    return [*commands.take(), *commands.release()]


def open_and_submit(commands: Commands, chunk: Chunk, ready: Fence) -> None:
    commands.post(Command(SenderOpened(ROOM)))
    commands.post(Command(ChunkSubmitted(ROOM, chunk), ready))


def test_a_chunk_behind_one_that_waits_keeps_its_place() -> None:
    commands, there = Commands(lambda _room: True, Counter()), [False]
    open_and_submit(commands, FIRST, lambda: there[0])
    commands.post(Command(ChunkSubmitted(ROOM, SECOND), ALWAYS_READY))
    assert turn(commands) == [SenderOpened(ROOM)]
    assert commands.polling
    there[0] = True
    assert turn(commands) == [ChunkSubmitted(ROOM, FIRST), ChunkSubmitted(ROOM, SECOND)]
    assert not commands.polling


def test_a_turn_takes_a_batch_and_leaves_the_rest_for_the_next() -> None:
    commands = Commands(lambda _room: True, Counter())
    for room in range(BATCH + 1):
        commands.post(Command(SenderOpened(room)))
    assert turn(commands) == [SenderOpened(room) for room in range(BATCH)]
    assert len(commands) == 1
    assert turn(commands) == [SenderOpened(BATCH)]


def test_a_chunk_of_a_sender_that_has_ended_is_not_the_next_ones_of_its_room() -> None:
    """A room fails, and its engine begins the number anew before the driver has looked at what waited."""
    commands, there = Commands(lambda _room: True, Counter()), [False]
    open_and_submit(commands, FIRST, lambda: there[0])
    assert turn(commands) == [SenderOpened(ROOM)]
    open_and_submit(commands, SECOND, ALWAYS_READY)
    there[0] = True
    assert turn(commands) == [SenderOpened(ROOM), ChunkSubmitted(ROOM, SECOND)]
    assert commands.sizes() == {"commands": 0, "fenced_chunks": 0}

"""Pipes between the processes of a server: sending never waits, silence of a child is noticed, a parent's is not."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Iterator

import msgspec
import pytest

from kvbaton.errors import InternalError
from kvbaton.serving.engine import pipe as pipes
from kvbaton.serving.engine.orders import EndRequest, Fail, RankOrder, RankReport, ReplicaOrder, ReplicaReport, Stop
from kvbaton.serving.engine.pipe import Died, Pipe, tell_death

PATIENCE_SECONDS = 20.0


class Text(msgspec.Struct, frozen=True, tag="text"):
    text: str


Messages = Text | Died
Ends = tuple[Pipe[Messages], Pipe[Messages]]


@pytest.fixture
def killed() -> threading.Event:
    """Set when the parent's end kills its child."""
    return threading.Event()


@pytest.fixture
def ends(killed: threading.Event) -> Iterator[Ends]:
    """A parent's end, and its child's."""
    here, there = multiprocessing.Pipe()
    parent: Pipe[Messages] = Pipe(here, "rank 1", Messages, kill=killed.set)
    child: Pipe[Messages] = Pipe(there, "the server", Messages)
    yield parent, child
    child._connection.close()
    parent.close()
    child.release()


def test_all_processes_of_a_server_speak_one_language() -> None:
    """Two messages of one tag, or of a type that does not go through a pipe, are refused here."""
    everything = RankOrder | RankReport | ReplicaOrder | ReplicaReport
    here, there = multiprocessing.Pipe()
    with here, there:
        parent: Pipe[msgspec.Struct] = Pipe(here, "rank 1", everything)
        child: Pipe[msgspec.Struct] = Pipe(there, "the server", everything)
        for message in (Stop(), EndRequest("a", "gone"), Fail(1, InternalError("broken", room=3))):
            parent.send(message)
            received = child.recv()
            assert type(received) is type(message)
            assert str(received) == str(message)
        parent.release()


def in_time(work: object) -> None:
    """Run it on a thread of its own; it must end."""
    thread = threading.Thread(target=work, daemon=True)  # type: ignore[arg-type]
    thread.start()
    thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive()


def test_sending_to_a_process_that_does_not_read_returns_at_once(ends: Ends) -> None:
    """A stopped data-parallel rank froze the event loop of its server, /health included."""
    parent, child = ends
    long = Text("x" * (4 << 20))
    in_time(lambda: [parent.send(long) for _ in range(8)])
    received: list[object] = []
    in_time(lambda: received.extend(child.recv() for _ in range(8)))
    assert received == [long] * 8


def test_a_child_that_beats_but_lets_too_much_wait_is_given_up(
    ends: Ends, killed: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parent's ``recv`` went on for as long as the beats came, and nobody told what waited for the child."""
    monkeypatch.setattr(pipes, "MAX_WAITING_BYTES", 8 << 20)
    monkeypatch.setattr(pipes, "BEAT_SECONDS", 0.05)
    parent, child = ends
    child.send(Text("ready"))
    assert parent.recv() == Text("ready")
    received: list[object] = []
    listener = threading.Thread(target=lambda: received.append(parent.recv()), daemon=True)
    listener.start()

    def flood() -> None:
        for _ in range(8):
            parent.send(Text("x" * (4 << 20)))

    with pytest.raises(InternalError, match=r"rank 1 is gone: it has left \d+ bytes unread"):
        flood()
    listener.join(PATIENCE_SECONDS)
    assert received == [None]
    assert killed.is_set()
    in_time(lambda: [None for _ in iter(child.recv, None)])  # its end has come as well


def test_a_child_that_beats_but_reads_no_frame_is_given_up(
    ends: Ends, killed: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipes, "UNREAD_SECONDS", 0.3)
    monkeypatch.setattr(pipes, "BEAT_SECONDS", 0.05)
    parent, child = ends
    child.send(Text("ready"))
    assert parent.recv() == Text("ready")
    parent.send(Text("x" * (4 << 20)))
    in_time(parent.recv)
    assert killed.is_set()
    assert "rank 1 is lost: it has read nothing for 0.3 s: it hangs" in str(parent.lost(None))


def test_what_cannot_be_decoded_ends_the_pipe_and_not_its_reader(ends: Ends, killed: threading.Event) -> None:
    parent, child = ends
    child._connection.send_bytes(b"\xc1 of no message")
    assert parent.recv() is None
    assert killed.is_set()
    assert "rank 1 is lost: it has sent what cannot be decoded" in str(parent.lost(None))


def test_a_child_that_is_silent_is_lost_and_one_that_only_beats_is_not(
    ends: Ends, killed: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipes, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(pipes, "LIFE_SECONDS", 0.5)
    parent, child = ends
    child.send(Text("ready"))
    assert parent.recv() == Text("ready")
    began = time.monotonic()
    timer = threading.Timer(1.5, child.send, (Text("still here"),))
    timer.start()
    assert parent.recv() == Text("still here")
    assert time.monotonic() - began > 2 * pipes.LIFE_SECONDS
    child.release()  # no beats any more, as of a process that is stopped
    assert parent.recv() is None
    assert killed.is_set()
    assert "rank 1 is lost: it has said nothing for 0.5 s: it hangs or is stopped" in str(parent.lost(None))


def test_a_parent_that_was_stopped_itself_reads_before_it_judges(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipes, "LIFE_SECONDS", 0.05)
    parent, child = ends
    child.send(Text("before"))
    assert parent.recv() == Text("before")
    child.send(Text("meanwhile"))
    assert parent.waits(PATIENCE_SECONDS)
    parent._heard_at = time.monotonic() - 100.0
    assert parent.recv() == Text("meanwhile")


def test_the_last_word_comes_after_everything_that_was_sent(ends: Ends) -> None:
    parent, child = ends
    sent = [Text(f"{number}" * 100_000) for number in range(10)]
    received: list[object] = []
    reader = threading.Thread(target=lambda: received.extend(parent.recv() for _ in range(11)), daemon=True)
    reader.start()
    for message in sent:
        child.send(message)
    child.release()
    tell_death(child._connection, InternalError("the engine has died"))
    reader.join(PATIENCE_SECONDS)
    assert received[:10] == sent
    assert isinstance(received[10], Died)
    with pytest.raises(InternalError, match="its pipe is closed"):
        child.send(sent[0])

"""The one thread of a rank that owns its core, links and transport.

It sleeps until a message, a command of the engine or a deadline wakes it; only while bytes are on the move does it
poll, and the longer nothing happens the less often. Each turn reads the inbox first, then the writes, then the clock:
a deadline never beats a message that is already here. What fails unforeseen is logged and counted, and is answered as
the foreseen failure would be; what follows it is done all the same, so that whatever is broken, deadlines pass.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from kvbaton.control.base import Arrived, LinkChange, Links
from kvbaton.errors import DisconnectedError, ExpiredError, InternalError, KVBatonError, TransportError
from kvbaton.protocol.core import Core
from kvbaton.protocol.effects import (
    CancelWrites,
    CloseLink,
    Dial,
    Effect,
    FencePeer,
    KVPoll,
    PostWrite,
    PreparePeer,
    Quiesce,
    Report,
    Scatter,
    Send,
)
from kvbaton.protocol.events import (
    AbortRequested,
    ChunkSubmitted,
    Dialed,
    DialFailed,
    Event,
    LinkRefused,
    LinkUp,
    MessageArrived,
    PeerFenced,
    PeerPrepared,
    PeerQuiesced,
    PeerUnprepared,
    ShutdownRequested,
    TimePassed,
    WriteBroken,
    WriteSettled,
)
from kvbaton.runtime.posting import PostingQueue, Window
from kvbaton.runtime.staging import StagingDesk
from kvbaton.transports.base import Handle, TableId, Transport, WriteState

log = logging.getLogger("kvbaton.driver")

#: Longest pause between two polls while bytes are on the move, and its share of the time since something last happened.
POLL_MOST_SECONDS = 0.001
POLL_SHARE = 0.05
#: How long a closing rank waits for its own writes before it goes without a farewell.
CLOSE_GRACE_SECONDS = 5.0
#: Bytes of a peer that was stopped by force may sit in our transport's buffers: it is polled at least so long and so
#: often before they count as landed. Only where the target must help writes to land.
QUIESCE_SECONDS = 0.5
QUIESCE_POLLS = 500
#: Distinct failures whose number is remembered, and characters of each.
MAX_COMPLAINTS = 64
MAX_COMPLAINT = 200
#: How long after a fence that failed it is tried again.
FENCE_AGAIN_SECONDS = 1.0
#: How often the transport is asked for evidence of the path in the life of a rank.
MAX_EVIDENCE_ASKED = 1_000

#: How long a question may wait for the thread, which may be copying a large write; how often it is looked after.
ASK_SECONDS = 5.0
ASK_SHARE_SECONDS = 0.1

Fence = Callable[[], bool]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Command:
    """An event from the engine; a chunk waits until its fence says that the data is there."""

    event: Event
    fence: Fence | None = None


class Driver:
    """See the module. ``post`` and ``close`` may be called from any thread, everything else happens inside."""

    def __init__(
        self,
        core: Core,
        transport: Transport,
        links: Links,
        *,
        on_report: Callable[[Report], None],
        window: Window,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._core = core
        self._transport = transport
        self._links = links
        self._on_report = on_report
        self._clock = clock
        self._staging = StagingDesk(core.staging)
        self._queue = PostingQueue(window, self._staging.may_post)
        self._spoiled: dict[int, KVBatonError] = {}  # target rooms that live on
        self._commands: deque[Command] = deque()
        self._fenced_chunks: deque[Command] = deque()
        self._events: deque[Event] = deque()
        self._questions: deque[Callable[[], None]] = deque()
        self._in_flight: dict[Handle, PostWrite] = {}
        self._broken: list[PostWrite] = []
        self._tables: dict[str, tuple[TableId, ...]] = {}
        self._staged_tables: dict[str, tuple[TableId | None, ...]] = {}
        self._quiescing: dict[str, tuple[float, int]] = {}
        self._to_fence: dict[str, float] = {}
        self._complaints = Counter[str]()
        self._active_at = 0.0
        self._closing = threading.Event()
        self._close_deadline: float | None = None
        self._thread = threading.Thread(target=self._run, name="kvbaton-driver", daemon=True)
        self.counters: Counter[str] = Counter()
        #: How bytes were seen to travel, by peer; filled in after the first writes.
        self.evidence: dict[str, str] = {}

    def start(self) -> None:
        self._thread.start()

    def post(self, command: Command) -> None:
        """Hand an event to the core. Returns at once."""
        self._commands.append(command)
        self._links.wake()

    def ask(self, question: Callable[[Core, float], T]) -> T:
        """What ``question(core, now)`` finds, asked on the driver's thread, or here where that does not run.

        Raises ExpiredError if the thread does not come to it in time, and whatever the question raises.
        """
        answer: Future[T] = Future()
        deadline = self._clock() + ASK_SECONDS

        def look() -> None:
            try:
                answer.set_result(question(self._core, self._clock()))
            except Exception as error:  # noqa: BLE001 - the question is the asker's
                answer.set_exception(error)  # it is told to whoever asked, and is no fault of this thread

        self._questions.append(look)
        self._links.wake()
        while self._thread.is_alive():
            try:
                return answer.result(ASK_SHARE_SECONDS)
            except TimeoutError:
                if answer.done():  # just now, or the question itself has raised it
                    return answer.result()
                if self._clock() > deadline:
                    raise ExpiredError(f"the driver thread did not answer within {ASK_SECONDS:g} s") from None
        return question(self._core, self._clock())

    def sizes(self) -> dict[str, int]:
        """Entries of every table here and in what the driver owns. Driver's thread only, like all of it."""
        return {
            "commands": len(self._commands) + len(self._events),
            "fenced_chunks": len(self._fenced_chunks),
            "writes_in_flight": len(self._in_flight),
            "writes_broken": len(self._broken),
            "staging_slots_taken": len(self._staging),
            "peers_with_tables": len(self._tables),
            "peers_with_evidence": len(self.evidence),
            "peers_posting": len(self._queue),
            "peers_to_fence": len(self._to_fence),
            "counter_names": len(self.counters),
            **{f"transport_{name}": size for name, size in self._transport.sizes().items()},
            **{f"links_{name}": size for name, size in self._links.sizes().items()},
        }

    def close(self, reason: str) -> None:
        """Fail what is live, settle, say goodbye, release everything. Idempotent."""
        self.stop(reason)
        if self._thread.ident is not None:
            self._thread.join()
        else:  # never started: rooms that were begun end all the same, and nothing stays open
            self._take_commands()
            self.farewell()

    def stop(self, reason: str) -> None:
        """Begin to close. Returns at once. Idempotent."""
        if not self._closing.is_set():
            self._commands.append(Command(ShutdownRequested(reason)))
            self._closing.set()
            self._links.wake()

    # ---- the loop -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            self.turn()
            if self.finished():
                break
            self._sleep()
        self.farewell()

    def finished(self) -> bool:
        """Whether a closing rank may go: its writes have settled, or it has waited for them long enough."""
        if not self._closing.is_set():
            return False
        if self._close_deadline is None:
            self._close_deadline = self._clock() + CLOSE_GRACE_SECONDS
        return not self._commands and (self._core.quiet or self._clock() > self._close_deadline)

    def turn(self) -> None:
        """One round of work, without waiting. Public for simulators, which have no thread."""
        for step in (
            self._receive,
            self._take_commands,
            self._answer_questions,
            self._poll_writes,
            self._poll_quiescing,
            self._fence_due,
            self._feed,
            self._pass_time,
            self._post_one,
            self._feed,
            self._progress,
        ):
            self._attempt(step)

    def _attempt(self, call: Callable[[], object]) -> Exception | None:
        """Whatever ``call`` raises that was not foreseen."""
        try:
            call()
        except Exception as error:  # noqa: BLE001 - the thread must go on
            self._complain(error)
            return error
        return None

    def _complain(self, error: Exception) -> None:
        """Of what was not foreseen. Without a thread, whoever turns the driver hears of it."""
        if self._thread.ident is None:
            raise error
        self.counters["driver_errors"] += 1
        text = repr(error)[:MAX_COMPLAINT]
        if len(self._complaints) >= MAX_COMPLAINTS:
            self._complaints.clear()
        self._complaints[text] += 1
        times = self._complaints[text]
        if times.bit_count() == 1:  # what fails in every turn must not fill a disk
            log.error("something failed, %d times by now; the driver goes on", times, exc_info=error)

    def _receive(self) -> None:
        for item in self._links.receive():
            self._active_at = self._clock()
            if isinstance(item, Arrived):
                self._events.append(MessageArrived(item.link, item.payload))
            elif item.change is LinkChange.UP:
                self._events.append(LinkUp(item.link))
            elif item.change is LinkChange.REFUSED:
                self._events.append(LinkRefused(item.link))

    def _answer_questions(self) -> None:
        while self._questions:
            self._questions.popleft()()

    def _pass_time(self) -> None:
        deadline = self._core.next_deadline()
        if deadline is not None and deadline <= self._clock():
            self._events.append(TimePassed())
            self._feed()

    def _progress(self) -> None:
        if self._target_must_progress:
            self._transport.progress()

    @property
    def pending(self) -> bool:
        """Work is at hand: the next turn must not wait."""
        return bool(self._events or self._commands or self._queue.ready)

    @property
    def polling(self) -> bool:
        """Something moves that tells nobody: the next turn may wait for a moment only."""
        return bool(self._in_flight or self._fenced_chunks or self._quiescing) or self._target_must_progress

    @property
    def unread(self) -> tuple[Event, ...]:
        """What has happened but is not yet told to the core, oldest first."""
        return tuple(self._events)

    def staging_reader(self, slot: int) -> object | None:
        """The write that reads one of our staging slots; None if it is free."""
        return self._staging.reader(slot)

    @property
    def quiescing(self) -> bool:
        """Bytes of a peer that was stopped by force are being waited for, turn by turn."""
        return bool(self._quiescing)

    @property
    def _target_must_progress(self) -> bool:
        return self._transport.capabilities.target_must_progress and self._core.receiving

    def _take_commands(self) -> None:
        for _ in range(len(self._commands)):
            command = self._commands.popleft()
            self._active_at = self._clock()
            if command.fence is not None and (self._fenced_chunks or not self._ready(command)):
                self._fenced_chunks.append(command)
            else:
                self._events.append(command.event)
        self._feed()
        self._release_fenced()

    def _ready(self, command: Command) -> bool:
        """Whether a chunk's data is in memory. A fence that raises (a CUDA event after an error) says that it never
        will be: the room ends at once, and its chunks are dropped as those of any failed room."""
        try:
            return command.fence is None or command.fence()
        except Exception as error:
            room = command.event.room if isinstance(command.event, ChunkSubmitted) else -1
            log.error("the ready fence of a chunk of room %d raised; the room ends", room, exc_info=error)
            self.counters["fences_raised"] += 1
            cause = InternalError(
                f"the ready fence of a chunk raised {error!r}; look for the cause in the engine that computed it",
                room=room,
            )
            self._events.append(AbortRequested(room, "source", cause))
            return False

    def _release_fenced(self) -> None:
        """Chunks of one room keep their order, other rooms may overtake; a room that failed wants none any more."""
        waiting: deque[Command] = deque()
        blocked: set[int] = set()
        for command in self._fenced_chunks:
            room = command.event.room if isinstance(command.event, ChunkSubmitted) else -1
            if not self._core.wants_chunks(room):
                continue
            if room in blocked or not self._ready(command):
                blocked.add(room)
                waiting.append(command)
            else:
                self._events.append(command.event)
        self._fenced_chunks = waiting

    def _feed(self) -> None:
        """Events to the core, effects to the world, until neither brings about the other."""
        while self._events:
            event = self._events.popleft()
            for effect in self._core.handle(event, self._clock()):
                error = self._attempt(partial(self._perform, effect))
                if error is not None:
                    self._answer_failed(effect, error)

    def _sleep(self) -> None:
        if self.pending:
            return
        now = self._clock()
        if self.polling:
            pause = min(POLL_MOST_SECONDS, POLL_SHARE * (now - self._active_at))
            if pause < POLL_MOST_SECONDS:
                time.sleep(pause)
            else:
                self._wait(POLL_MOST_SECONDS)
            return
        deadlines = [*self._to_fence.values()]
        deadline = self._core.next_deadline()
        if deadline is not None:
            deadlines.append(deadline)
        self._wait(max(0.0, min(deadlines) - now) if deadlines else None)

    def _wait(self, seconds: float | None) -> None:
        if self._attempt(lambda: self._links.wait(seconds)) is not None:
            time.sleep(POLL_MOST_SECONDS)

    # ---- effects ------------------------------------------------------------------------------------------------

    def _perform(self, effect: Effect) -> None:
        if isinstance(effect, Send):
            if not self._links.send(effect.link, effect.payload):
                self.counters["messages_dropped"] += 1
        elif isinstance(effect, Report):
            self._report(effect)
        elif isinstance(effect, PostWrite):
            self._queue.offer(effect)
        elif isinstance(effect, CancelWrites):
            self._events.extend(WriteSettled(write) for write in self._queue.cancel(effect.writes))
        elif isinstance(effect, PreparePeer):
            self._prepare(effect)
        elif isinstance(effect, FencePeer):
            self._to_fence[effect.peer] = self._clock()
            self._fence_due()
        elif isinstance(effect, Scatter):
            self._staging.scatter(effect)
        elif isinstance(effect, Quiesce):
            self._quiescing[effect.peer] = (self._clock() + QUIESCE_SECONDS, QUIESCE_POLLS)
        elif isinstance(effect, Dial):
            self._dial(effect.address)
        elif isinstance(effect, CloseLink):
            self._links.close_link(effect.link)

    def _answer_failed(self, effect: Effect, error: Exception) -> None:
        """What the core is to think of an effect that failed unforeseen."""
        if isinstance(effect, Scatter):  # what is not copied must not be served, whatever the core says
            self._spoiled[effect.room] = InternalError(
                f"what has arrived could not be copied to its pages: {error!r}; restart this rank", room=effect.room
            )
        elif isinstance(effect, PreparePeer):
            self._events.append(PeerUnprepared(effect.peer, _unforeseen("preparing a peer", error, effect.peer)))
        elif isinstance(effect, Dial):
            self._events.append(DialFailed(effect.address, _unforeseen("dialling a peer", error, effect.address)))

    def _report(self, report: Report) -> None:
        status = report.status
        spoiled = self._spoiled.get(report.room) if report.role == "target" else None
        if spoiled is not None and status.poll in (KVPoll.Success, KVPoll.Failed):
            if not status.leased:
                del self._spoiled[report.room]
            if status.poll is KVPoll.Success:
                report = replace(report, status=replace(status, poll=KVPoll.Failed, error=spoiled))
        self._on_report(report)

    def _dial(self, address: str) -> None:
        try:
            self._events.append(Dialed(address, self._links.dial(address)))
        except KVBatonError as error:
            self._events.append(DialFailed(address, error))

    def _prepare(self, effect: PreparePeer) -> None:
        try:
            self._transport.connect(effect.peer, effect.metadata)
            self._tables[effect.peer] = tuple(
                self._transport.prepare(effect.peer, part.source.table, part.target.table) for part in effect.pair.parts
            )
            self._staged_tables[effect.peer] = tuple(
                self._transport.prepare(effect.peer, staged.source, staged.target) if staged is not None else None
                for staged in effect.staged
            )
        except TransportError as error:
            log.warning("cannot prepare %s: %s", effect.peer, error)
            self._events.append(PeerUnprepared(effect.peer, error))
        else:
            self._events.append(PeerPrepared(effect.peer))

    def _post_one(self) -> None:
        """One write a turn: a post may copy its bytes itself, and messages must not wait for all of them."""
        write = self._queue.take()
        if write is None:
            return
        self._active_at = self._clock()
        tables = (self._tables if write.staged is None else self._staged_tables).get(write.peer)
        table = tables[write.part] if tables is not None else None
        try:
            if table is None:
                raise DisconnectedError("the peer's memory is not reachable", peer=write.peer)
            source_entries, target_entries = self._staging.gather(write)
            handle = self._transport.post(table, source_entries, target_entries)
        except TransportError as error:
            self._break(write, error)
            return
        except Exception as error:
            self._break(write, _unforeseen("posting a write", error, write.peer))
            raise
        self.counters["writes_posted"] += 1
        self.counters["bytes_posted"] += write.bytes
        self.counters["entries_posted"] += len(source_entries)
        if write.staged is not None:
            self.counters["writes_staged"] += 1
            self.counters["bytes_staged"] += write.bytes
        self._in_flight[handle] = write
        self._check(handle, write)

    def _poll_writes(self) -> None:
        for handle, write in list(self._in_flight.items()):
            self._check(handle, write)

    def _poll_quiescing(self) -> None:
        for peer, (until, polls) in list(self._quiescing.items()):
            if self._transport.capabilities.target_must_progress and (polls > 0 or self._clock() < until):
                self._transport.progress()
                self._quiescing[peer] = (until, polls - 1)
            else:
                del self._quiescing[peer]
                self._events.append(PeerQuiesced(peer))

    def _check(self, handle: Handle, write: PostWrite) -> None:
        state = WriteState.BROKEN
        try:
            state = self._transport.poll(handle)
        except Exception as unforeseen:  # noqa: BLE001 - the writes behind it must be looked after as well
            self._complain(unforeseen)
        if state is WriteState.PENDING:
            return
        self._active_at = self._clock()
        del self._in_flight[handle]
        if state is WriteState.DONE:
            self._queue.settled(write)
            self._staging.settled(write)
            self._events.append(WriteSettled(write.write))
            self._attempt(lambda: self._note_evidence(write.peer))
        else:
            self._break(write, DisconnectedError("a write broke on the wire", peer=write.peer))
        self._attempt(lambda: self._transport.release(handle))

    def _break(self, write: PostWrite, error: KVBatonError) -> None:
        """Until its peer is fenced it may still be read from here."""
        self._queue.settled(write)
        self._broken.append(write)
        self._events.append(WriteBroken(write.write, error))

    def _note_evidence(self, peer: str) -> None:
        """Ask the transport how the bytes went, until it knows or has been asked often enough."""
        if not self.evidence.get(peer) and self.counters["evidence_asked"] < MAX_EVIDENCE_ASKED:
            self.counters["evidence_asked"] += 1
            self.evidence[peer] = self._transport.evidence(peer)

    def _fence_due(self) -> None:
        """Fence who is to be fenced; again and again until it is done, since only that frees what they hold."""
        for peer, when in list(self._to_fence.items()):
            if when <= self._clock():
                self._to_fence[peer] = self._clock() + FENCE_AGAIN_SECONDS
                self._fence(peer)

    def _fence(self, peer: str) -> None:
        self._transport.fence(peer)
        del self._to_fence[peer]
        self._queue.drop_peer(peer)
        self._tables.pop(peer, None)
        self.evidence.pop(peer, None)
        self._staged_tables.pop(peer, None)
        for write in (*self._in_flight.values(), *self._broken):
            if write.peer == peer:
                self._staging.settled(write)
        self._in_flight = {handle: write for handle, write in self._in_flight.items() if write.peer != peer}
        self._broken = [write for write in self._broken if write.peer != peer]
        self.counters["peers_fenced"] += 1
        self._events.append(PeerFenced(peer))

    def farewell(self) -> None:
        """Say goodbye where that is true, and release everything."""
        try:
            if self._core.quiet:
                for effect in self._core.farewell("closing"):
                    self._perform(effect)
        finally:
            self._transport.close()
            self._links.close()


def _unforeseen(doing: str, error: Exception, peer: str) -> InternalError:
    return InternalError(f"{doing} failed: {error!r}; the log of this rank has more", peer=peer)

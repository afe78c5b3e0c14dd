"""The one thread of a rank that owns its core, links and data plane.

It sleeps until a message, a command of the engine or a deadline wakes it; only while bytes are on the move does it
poll, and the longer nothing happens the less often. Each turn reads the inbox first, then the writes, then the clock:
a deadline never beats a message that is already here. What the engine has posted by then goes to the core before what
has come, which may be an answer to it. What fails unforeseen is logged and counted, and is answered as
the foreseen failure would be; what follows it is done all the same, so that whatever is broken, deadlines pass.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

from kvbaton.control.base import Links
from kvbaton.errors import ExpiredError
from kvbaton.layout import Region
from kvbaton.protocol.core import Core
from kvbaton.protocol.effects import (
    CancelWrites,
    CloseLink,
    Dial,
    Effect,
    FencePeer,
    PeerLost,
    PostWrite,
    PreparePeer,
    Quiesce,
    Report,
    Scatter,
    Send,
)
from kvbaton.protocol.events import (
    DialFailed,
    Event,
    PeerUnprepared,
    ShutdownRequested,
    TimePassed,
)
from kvbaton.runtime.commands import Command, Commands
from kvbaton.runtime.controlplane import ControlPlane
from kvbaton.runtime.dataplane import DataPlane, unforeseen
from kvbaton.runtime.guard import Guard
from kvbaton.runtime.posting import Window
from kvbaton.runtime.reports import Reports
from kvbaton.transports.base import Transport

#: Longest pause between two polls while bytes are on the move, and its share of the time since something last happened.
POLL_MOST_SECONDS = 0.001
POLL_SHARE = 0.05
#: Times as long as a turn took that could not read all that has come, the interpreter is left to the engine, which
#: shares it: whoever floods a rank, or begins thousands of rooms at once, has half of it at most.
REST = 1
#: How long a closing rank waits for its own writes before it goes without a farewell.
CLOSE_GRACE_SECONDS = 5.0
#: How long whoever closes a rank waits for its thread: it may be in a call of the data plane that does not come back.
CLOSE_SECONDS = 60.0
#: How long a question may wait for the thread, which may be copying a large write; how often it is looked after.
ASK_SECONDS = 5.0
ASK_SHARE_SECONDS = 0.1

T = TypeVar("T")


class Driver:
    """See the module. ``post`` and ``close`` may be called from any thread, everything else happens inside."""

    def __init__(
        self,
        core: Core,
        transport: Transport,
        links: Links,
        *,
        on_report: Callable[[Report], None],
        on_peer_lost: Callable[[PeerLost], None],
        on_news: Callable[[], None],
        window: Window,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._core = core
        self._reports = Reports(on_report, on_peer_lost, on_news)
        self._clock = clock
        self._thread = threading.Thread(target=self._run, name="kvbaton-driver", daemon=True)
        self.counters: Counter[str] = Counter()
        self._guard = Guard(self.counters, lambda: self.started)
        self._events: deque[Event] = deque()
        self._control = ControlPlane(
            links, happened=self._events.append, guard=self._guard, counters=self.counters, clock=clock
        )
        self._data = DataPlane(
            transport,
            core.staging,
            window,
            happened=self._events.append,
            guard=self._guard,
            counters=self.counters,
            clock=clock,
        )
        self._commands = Commands(core.wants_chunks, self.counters)
        self._performers: dict[type, Callable[..., object]] = {
            Send: self._say,
            Report: self._reports.report,
            PeerLost: self._reports.lost,
            PostWrite: self._data.offer,
            CancelWrites: self._data.cancel,
            PreparePeer: self._data.prepare,
            FencePeer: lambda effect: self._data.fence(effect.peer),
            Scatter: self._data.scatter,
            Quiesce: lambda effect: self._data.quiesce(effect.peer),
            Dial: lambda effect: self._control.dial(effect.address),
            CloseLink: self._close_link,
        }
        self._active_at = 0.0
        self._closing_at: float | None = None
        self._parted = threading.Event()  # the transport is destroyed, and whoever may know it does

    @property
    def evidence(self) -> dict[str, str]:
        """How bytes were seen to travel, by peer."""
        return self._data.evidence

    @property
    def started(self) -> bool:
        return self._thread.ident is not None

    @property
    def closing(self) -> bool:
        """It has been told to close: nothing new may begin."""
        return self._closing_at is not None

    def start(self) -> None:
        self._thread.start()

    def post(self, command: Command) -> None:
        """Hand an event to the core. Returns at once."""
        self._commands.post(command)
        self._control.wake()

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

        self._commands.ask(look)
        self._control.wake()
        while self._thread.is_alive():
            try:
                return answer.result(ASK_SHARE_SECONDS)
            except TimeoutError:
                if answer.done():  # just now, or the question itself has raised it
                    return answer.result()
                if self._clock() > deadline:
                    raise ExpiredError(f"the driver thread did not answer within {ASK_SECONDS:g} s") from None
        return question(self._core, self._clock())

    def register(self, regions: Sequence[Region]) -> None:
        """Make memory reachable again, and tell the peers before they hear of any room. Raises TransportError,
        ExpiredError."""

        def register(_core: Core, _now: float) -> None:
            self._data.register(regions)
            self._data.look_at_agent()
            self._feed()

        self.ask(register)

    def deregister(self) -> None:
        """Let go of all memory; no room may be live. Raises TransportError, ExpiredError."""
        self.ask(lambda _core, _now: self._data.deregister())

    def sizes(self) -> dict[str, int]:
        """Entries of every table here and in what the driver owns. Driver's thread only, like all of it."""
        return {
            "events": len(self._events),
            **self._commands.sizes(),
            "counter_names": len(self.counters),
            **self._data.sizes(),
            **self._control.sizes(),
        }

    def close(self, reason: str) -> None:
        """Fail what is live, settle, say goodbye, release everything. Idempotent. Raises ExpiredError if the thread
        does not come to the end of it in time; it goes on, and whatever is not proven stays leased."""
        self.stop(reason)
        if self.started:
            if not self._parted.wait(CLOSE_SECONDS):
                raise ExpiredError(
                    f"the data plane has not come back from a call within {CLOSE_SECONDS:g} s of closing: the "
                    "memory may still be read and written, so keep it, or end the process"
                )
        else:  # never started: rooms that were begun end all the same, and nothing stays open
            while self._commands:
                self._take_commands()
            self.part()
            self.hang_up()

    def stop(self, reason: str) -> None:
        """Begin to close. Returns at once. Idempotent."""
        if self._closing_at is None:
            self._commands.post(Command(ShutdownRequested(reason)))
            self._closing_at = self._clock()
            self._control.wake()

    # ---- the loop -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            began = self._clock()
            self.turn()
            if self.finished():
                break
            if self._control.unread:
                time.sleep(REST * (self._clock() - began))
            self._sleep()
        self.part()
        if not self.gone:
            self._guard.attempt(self._control.stop_listening)
            self._parted.set()
        while not self.gone:
            self._sleep()
            self.turn()
        self._guard.attempt(self.hang_up)
        self._parted.set()

    def finished(self) -> bool:
        """Whether a closing rank may go: its writes have settled, or it has waited for them long enough."""
        if self._closing_at is None:
            return False
        late = self._clock() > self._closing_at + CLOSE_GRACE_SECONDS
        return not self._commands and (self._core.quiet or late)

    def turn(self) -> None:
        """One round of work, without waiting. Public for simulators, which have no thread."""
        for step in (
            self._receive,
            self._take_commands,
            self._commands.answer,
            self._poll_writes,
            self._data.poll_quiescing,
            self._data.fence_due,
            self._data.look_at_agent,
            self._feed,
            self._pass_time,
            self._send,
            self._post_one,
            self._feed,
            self._send,
            self._progress,
        ):
            self._guard.attempt(step)

    def _receive(self) -> None:
        if self._control.receive():
            self._active_at = self._clock()

    def _pass_time(self) -> None:
        if not self._due:
            return
        self._guard.attempt(self._receive)  # once more: what was done since may have taken long
        self._feed()
        if self._due and not self._control.behind:
            self._events.append(TimePassed())
            self._feed()

    @property
    def _due(self) -> bool:
        deadline = self._core.next_deadline()
        return deadline is not None and deadline <= self._clock()

    def _poll_writes(self) -> None:
        if self._data.poll_writes():
            self._active_at = self._clock()

    def _post_one(self) -> None:
        if self._data.ready:
            self._active_at = self._clock()
            self._data.post_one()

    def _progress(self) -> None:
        if self._target_must_progress:
            self._data.progress()

    @property
    def pending(self) -> bool:
        """Work is at hand: the next turn must not wait."""
        return bool(self._events or self._commands or self._data.ready)

    @property
    def polling(self) -> bool:
        """Something moves that tells nobody: the next turn may wait for a moment only."""
        return self._data.moving or self._commands.polling or self._target_must_progress

    @property
    def unread(self) -> tuple[Event, ...]:
        """What has happened but is not yet told to the core, oldest first."""
        return tuple(self._events)

    def staging_reader(self, slot: int) -> object | None:
        """The write that reads one of our staging slots; None if it is free."""
        return self._data.staging_reader(slot)

    @property
    def quiescing(self) -> bool:
        """Bytes of a peer that was stopped by force are being waited for, turn by turn."""
        return self._data.quiescing

    @property
    def _target_must_progress(self) -> bool:
        return self._data.target_must_progress and self._core.moving

    def _take_commands(self) -> None:
        if self._commands:
            self._active_at = self._clock()
        self._events.extendleft(reversed([*self._commands.take()]))  # what has come may be an answer to them
        self._feed()
        self._events.extend(self._commands.release())

    def _feed(self) -> None:
        """Events to the core, effects to the world, until neither brings about the other."""
        while self._events:
            event = self._events.popleft()
            for effect in self._core.handle(event, self._clock()):
                error = self._guard.attempt(partial(self._perform, effect))
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
        due = (self._data.next_fence(), self._core.next_deadline())
        first = min((at for at in due if at is not None), default=None)
        self._wait(None if first is None else max(0.0, first - now))

    def _wait(self, seconds: float | None) -> None:
        if self._guard.attempt(lambda: self._control.wait(seconds)) is not None:
            time.sleep(POLL_MOST_SECONDS)

    # ---- effects ------------------------------------------------------------------------------------------------

    def _perform(self, effect: Effect) -> None:
        self._performers[type(effect)](effect)

    def _say(self, effect: Send) -> None:
        self._control.say(effect.link, effect.payload)

    def _close_link(self, effect: CloseLink) -> None:
        self._send()
        self._control.close_link(effect.link)

    def _send(self) -> None:
        """All that was said to a peer since the last time goes together, after the engine was woken, once, for all that
        was reported to it."""
        self._reports.flush()
        self._control.send()

    def _answer_failed(self, effect: Effect, error: Exception) -> None:
        """What the core is to think of an effect that failed unforeseen."""
        if isinstance(effect, Scatter):
            self._reports.spoil(effect.room, error)
        elif isinstance(effect, PreparePeer):
            self._events.append(PeerUnprepared(effect.peer, unforeseen("preparing a peer", error, effect.peer)))
        elif isinstance(effect, Dial):
            self._events.append(DialFailed(effect.address, unforeseen("dialling a peer", error, effect.address)))

    def part(self) -> None:
        """Say goodbye where that is true, and destroy the transport. What fails of it is logged: peers may still write
        our memory, and the wait for the proof that they do not must not end by it."""
        self._guard.attempt(self._farewell)
        self._guard.attempt(self._send)
        self._guard.attempt(self._data.close)
        self._guard.attempt(self._feed)
        self._guard.attempt(self._send)

    @property
    def gone(self) -> bool:
        """Of a rank that has parted: whether it is proven that nobody writes its memory any more. The links stay up
        until then; where a peer's host has vanished without proof, the operator's ``quarantine_seconds`` decides."""
        return not self._core.receiving

    def _farewell(self) -> None:
        if self._core.quiet:
            for effect in self._core.farewell("closing"):
                self._perform(effect)

    def hang_up(self) -> None:
        """Close the links: nobody hears of this rank any more."""
        self._control.close()

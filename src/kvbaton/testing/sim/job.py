"""One request on one simulated rank: begun, looked at, aborted, ended; its units are freed when they are released."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvbaton.errors import AbortedError, LocalProtocolError, OverloadedError
from kvbaton.manager import KVPoll, KVReceiver, KVSender
from kvbaton.testing.sim.allocator import Tenancy
from kvbaton.testing.sim.scenario import SimRequest

if TYPE_CHECKING:
    from kvbaton.testing.sim.process import Process

ENDED = (KVPoll.Failed, KVPoll.Success)


class SimJob(ABC):
    """One request on one rank. ``outcome`` is the first terminal poll that was reported, and must stay it."""

    role = ""

    def __init__(self, process: Process, request: SimRequest) -> None:
        self.process = process
        self.request = request
        self.prompt = process.world.scenario.prompt_of(request)
        self.tenancy = Tenancy(self)
        self.side: KVSender | KVReceiver | None = None
        self.started_at = process.clockwork.now
        self.outcome: KVPoll | None = None
        self.ended_at: float | None = None
        self.refused = False
        self.over = False

    def __repr__(self) -> str:
        return f"request {self.request.number} (room {self.request.room}) as {self.role} on {self.process.name}"

    @property
    def aborts_here(self) -> bool:
        return not self.request.lone_abort or self.process.number == 0

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        """The engine's own timer: it waits while the process is stopped, and dies with it."""
        process = self.process

        def fire() -> None:
            if not process.alive or self.over:
                return
            if process.paused_until > process.clockwork.now:
                process.clockwork.at(process.paused_until, fire)
            else:
                action()

        process.clockwork.after(seconds, fire)

    def begin(self) -> None:
        try:
            self.side = self.open()
        except (LocalProtocolError, OverloadedError) as error:
            self.process.clockwork.tell(self.process.name, f"engine: {self} refused: {error}")
            self.free()
            self.refused = self.over = True
            self.process.world.job_over(self)
            return
        self.process.clockwork.tell(self.process.name, f"engine: {self} begins")
        self.schedule()

    @abstractmethod
    def open(self) -> KVSender | KVReceiver: ...

    @abstractmethod
    def schedule(self) -> None: ...

    def look(self) -> None:
        """The room may have changed: go on, or let go."""
        if self.over or self.side is None:
            return
        if self.side.freed:
            self.free()
        if self.side.released:
            self.end()
        else:
            self.go_on()

    @abstractmethod
    def go_on(self) -> None: ...

    def abort(self) -> None:
        if self.side is not None and not self.over:
            self.process.clockwork.tell(self.process.name, f"engine: {self} aborts")
            self.process.clockwork.faults[f"abort at the {self.role}"] += 1
            self.process.world.judge.aborted(self)
            self.side.fail(AbortedError("the client has gone", room=self.request.room))

    def free(self) -> None:
        """Nothing touches the units any more, whatever becomes of the room."""
        freed = self.process.engine.allocator.give_back(self.tenancy)
        if freed:
            self.process.clockwork.tell(self.process.name, f"engine: {self} frees {len(freed)} units")
            self.process.world.judge.freed(self, freed)

    def end(self) -> None:
        """Concluded."""
        self.over = True
        self.process.world.judge.released(self)
        self.process.clockwork.tell(self.process.name, f"engine: {self} over")
        self.process.engine.forget(self)
        self.process.engine.look_at_all()
        self.process.world.job_over(self)

"""One cell of the matrix: bring a transfer to its phase, break something, and check everybody afterwards.

What must hold in every cell: the client gets the right answer or a typed error before its deadline, with a second
worker the right answer; the survivors are the processes that they were and serve again; no page, slot or room stays
held, and what is held meanwhile says why in the room's story; every answer, during and after, is the single process's.

Where there are two workers of a role the victim is the one that has the request. Faults that strike before the request
strike the first one, and there are two requests, one for each worker.
"""

from __future__ import annotations

import asyncio
import re
import resource
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from kvbaton.errors import ExpiredError, KVBatonError
from kvbaton.protocol.messages import AnyMessage, Close, Done, Hello, Open
from kvbaton.serving.fleet import Server
from lab.chaos.client import ClientOutcome
from lab.chaos.fault import (
    FILES_SECONDS,
    PARTITION_SECONDS,
    REGISTRY_SECONDS,
    STOP_SECONDS,
    Fault,
    Phase,
    Spec,
    Victim,
)
from lab.chaos.proxy import Direction, TcpProxy
from lab.chaos.scene import LONG, RECOVERY_SECONDS, SHORT, Scene, open_files

FULL_DISK = Path("/dev/full")
_HELD_AT: dict[Phase, type] = {
    Phase.HANDSHAKE: Hello,
    Phase.OPEN: Open,
    Phase.DELIVERED: Done,
    Phase.CLOSING: Close,
}
_WATCHED_UNTIL: dict[Phase, int] = {Phase.FIRST: 1, Phase.MIDDLE: len(LONG.prompt) // 2}
_CHUNK = re.compile(r"chunk to token (\d+) submitted")
_REASON = re.compile(r"draining|quiescing|settling|failing")
#: Faults that strike before the request where the phase is the handshake: there is nothing to hold yet.
_STRIKE_FIRST = (Fault.MUTE, Fault.REGISTRY, Fault.FILES)


@dataclass(frozen=True, kw_only=True, slots=True)
class CellResult:
    """What a cell found. ``seconds``: from the fault to the client's outcome; ``failures``: empty when all held."""

    spec: Spec
    outcome: str
    message: str = ""
    seconds: float = 0.0
    recovered_seconds: float = 0.0
    quarantined: str = ""
    failures: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.failures


@dataclass
class FaultCell:
    """One run of one cell in a scene that is at rest."""

    scene: Scene
    spec: Spec
    at: int = 0  # which of the prefills has the request
    room: int | None = None
    quarantined: str = ""
    failures: list[str] = field(default_factory=list)
    reached: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.decode = self.scene.fleet.decodes[0]
        self._decodes: dict[str, Server] = {}  # by instance

    @property
    def prefill(self) -> Server:
        return self.scene.fleet.prefills[self.at]

    @property
    def control(self) -> TcpProxy:
        return self.scene.controls[self.at]

    @property
    def registry(self) -> TcpProxy:
        return self.scene.registries[self.at]

    @property
    def victim(self) -> Server:
        return self.prefill if self.spec.victim is Victim.PREFILL else self.decode

    @property
    def peer(self) -> Server:
        return self.decode if self.spec.victim is Victim.PREFILL else self.prefill

    async def run(self) -> CellResult:
        await self._prepare()
        fleet = self.scene.fleet
        processes = {s: s.process.pid for s in (*fleet.prefills, *fleet.decodes, fleet.router) if s.process is not None}
        asking: list[asyncio.Task[ClientOutcome]] = []
        if not self._strikes_first:
            asking = [await self._bring_to_phase()]
        struck_at = time.monotonic()
        async with self._fault():
            asking = asking or [asyncio.create_task(self.scene.ask(LONG)) for _ in range(self.spec.workers)]
            outcomes = sorted(await asyncio.gather(*asking), key=lambda one: (one.kind != "answer", one.ended_at))
        outcome = outcomes[-1]
        for one in outcomes:
            self._judge(one)
        recovered = await self.scene.recovered()
        for server in processes.keys() - self._dying():
            if server.process is None or not server.running or server.process.pid != processes[server]:
                self.failures.append(f"{server.name} did not survive:\n{server.last_words()}")
        await self._serve_again()
        return CellResult(
            spec=self.spec,
            outcome=outcome.label,
            message=outcome.message,
            seconds=outcome.ended_at - struck_at,
            recovered_seconds=recovered,
            quarantined=self.quarantined,
            failures=tuple(self.failures),
        )

    # ---- before ---------------------------------------------------------------------------------------------------

    @property
    def _strikes_first(self) -> bool:
        return self.spec.phase is Phase.HANDSHAKE and self.spec.fault in _STRIKE_FIRST

    async def _prepare(self) -> None:
        """Normal logs for everybody but the victims of a full disk, and fresh decodes for a first handshake."""
        fleet = self.scene.fleet
        fresh: set[Server] = set()
        victims = fleet.prefills if self.spec.victim is Victim.PREFILL else fleet.decodes
        for server in (*fleet.prefills, *fleet.decodes):
            log = FULL_DISK if self.spec.fault is Fault.DISK and server in victims else server.usual_log
            if server.log != log:
                server.log = log
                fresh.add(server)
        if self.spec.phase is Phase.HANDSHAKE:
            fresh.update(fleet.decodes)
        await asyncio.gather(*(server.kill() for server in fresh))
        await asyncio.gather(*(self.scene.restart(server) for server in fresh))
        if fresh and self.spec.phase is not Phase.HANDSHAKE:
            await self.scene.recovered()
        self._decodes = await self.scene.decodes_by_instance()

    def _dying(self) -> set[Server]:
        """Processes that need not live through this cell."""
        if self.spec.fault is Fault.DISK:
            return {self.peer}
        return {self.victim} if self.spec.fault in (Fault.KILL, Fault.RESTART, Fault.TERM, Fault.HANG) else set()

    async def _bring_to_phase(self) -> asyncio.Task[ClientOutcome]:
        for number, proxy in enumerate(self.scene.controls):
            proxy.watch = partial(self._on_message, number)
        asking = asyncio.create_task(self.scene.ask(LONG))
        watching = asyncio.create_task(self._watch_chunks())
        try:
            await asyncio.wait(
                {asking, asyncio.ensure_future(self.reached.wait())}, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            watching.cancel()
        if not self.reached.is_set():
            raise ExpiredError(f"{self.spec}: the phase was not reached; the request ended with {asking.result()}")
        return asking

    def _on_message(self, at: int, direction: Direction, message: AnyMessage) -> bool:
        if self.reached.is_set():  # held once; what comes after the release passes
            return False
        if isinstance(message, Open) and self.room is None:
            self._has_request(at, message)
            self.room = message.key.room
        wanted = _HELD_AT.get(self.spec.phase)
        if wanted is None or not isinstance(message, wanted) or (wanted is Hello and direction == "out"):
            return False
        if isinstance(message, Hello):
            self._has_request(at, message)
        self.reached.set()
        return True

    def _has_request(self, at: int, message: Open | Hello) -> None:
        """The pair: the prefill behind this proxy, and the decode that says so."""
        self.at, self.decode = at, self._decodes.get(message.sender, self.decode)

    async def _watch_chunks(self) -> None:
        until = _WATCHED_UNTIL.get(self.spec.phase)
        while until is not None:
            if self.room is not None:
                story = await self.scene.story(self.prefill, self.room)
                chunks = [int(found[1]) for text in story if (found := _CHUNK.search(text))]
                if max(chunks, default=0) >= until:
                    self.reached.set()
                    return
            await asyncio.sleep(0.001)

    # ---- the faults: struck on entry, over on exit ------------------------------------------------------------------

    def _fault(self) -> AbstractAsyncContextManager[None]:
        faults: dict[Fault, Callable[[], AbstractAsyncContextManager[None]]] = {
            Fault.KILL: self._kill,
            Fault.RESTART: self._restart,
            Fault.TERM: self._term,
            Fault.STOP: self._stop,
            Fault.HANG: self._hang,
            Fault.PARTITION: self._partition,
            Fault.CUT: self._cut,
            Fault.MUTE: self._mute,
            Fault.REGISTRY: self._registry,
            Fault.FILES: self._files,
            Fault.DISK: self._disk,
        }
        return faults[self.spec.fault]()

    def _lose_held(self) -> None:
        """What the proxy holds is lost with its connection: a message that is held was never sent."""
        if self.spec.phase in _HELD_AT:
            self.control.drop()

    @asynccontextmanager
    async def _kill(self) -> AsyncIterator[None]:
        await self.victim.kill()
        self._lose_held()
        yield
        await self.scene.restart(self.victim)

    @asynccontextmanager
    async def _restart(self) -> AsyncIterator[None]:
        await self.victim.kill()
        self._lose_held()
        await self.victim.start()
        yield
        await self.scene.fleet.ready(self.victim)
        await self.scene.fleet.ready(self.scene.fleet.router)

    @asynccontextmanager
    async def _term(self) -> AsyncIterator[None]:
        stopping = asyncio.create_task(self.victim.stop())
        await asyncio.sleep(0)
        self._lose_held()
        yield
        code = await stopping
        if code != 0:
            self.failures.append(f"{self.victim.name} ended with {code} after SIGTERM:\n{self.victim.last_words()}")
        await self.scene.restart(self.victim)

    @asynccontextmanager
    async def _stop(self) -> AsyncIterator[None]:
        self.victim.send_signal(signal.SIGSTOP)
        self._lose_held()
        over = _later(STOP_SECONDS, lambda: self.victim.send_signal(signal.SIGCONT))
        yield
        await over

    @asynccontextmanager
    async def _hang(self) -> AsyncIterator[None]:
        self.victim.send_signal(signal.SIGSTOP)
        self._lose_held()
        yield
        await self._look_for_quarantine()
        await self.victim.kill()
        await self.scene.restart(self.victim)

    @asynccontextmanager
    async def _partition(self) -> AsyncIterator[None]:
        self.control.silence()
        over = _later(PARTITION_SECONDS, self.control.release)
        yield
        await over
        self.control.drop()

    @asynccontextmanager
    async def _cut(self) -> AsyncIterator[None]:
        self.control.drop()
        yield

    @asynccontextmanager
    async def _mute(self) -> AsyncIterator[None]:
        proxy = self.control if self.spec.victim is Victim.LINK else self.registry
        proxy.silence()
        yield
        proxy.drop()

    @asynccontextmanager
    async def _registry(self) -> AsyncIterator[None]:
        await self.registry.shut()
        self.control.release()
        over = _later(REGISTRY_SECONDS, self.registry.unshut)
        yield
        await over

    @asynccontextmanager
    async def _files(self) -> AsyncIterator[None]:
        """No further file for the victim; a second client comes while it lasts."""
        process = self.victim.process
        if process is None:
            raise ExpiredError(f"{self.victim.name} does not run")
        before = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (open_files(process.pid), before[1]))
        over = _later(
            FILES_SECONDS,
            lambda: resource.prlimit(process.pid, resource.RLIMIT_NOFILE, before) if _lives(process) else None,
        )
        self.control.release()
        second = asyncio.create_task(self.scene.ask(SHORT))
        yield
        outcome = await second
        if outcome.kind not in self._allowed or self.scene.is_corrupt(SHORT, outcome):
            self.failures.append(f"a second client meanwhile: {outcome}")
        await over

    @asynccontextmanager
    async def _disk(self) -> AsyncIterator[None]:
        peer = self.peer
        await peer.kill()
        self._lose_held()
        yield
        await self.scene.restart(peer)

    async def _look_for_quarantine(self) -> None:
        """While the victim hangs: what the survivor still holds must be explained by the room's story."""
        survivor = self.peer
        held = await self.scene.fleet.held(survivor)
        if not held:
            return
        story = await self.scene.story(survivor, self.room) if self.room is not None else []
        reasons = [text for text in story if _REASON.search(text)]
        if not reasons:
            self.failures.append(
                f"{survivor.name} holds {held} and the story of room {self.room} says not why: {story}"
            )
        self.quarantined = reasons[-1] if reasons else ""

    # ---- after ----------------------------------------------------------------------------------------------------

    @property
    def _allowed(self) -> tuple[str, ...]:
        """What a client may get while the fault lasts."""
        return ("answer",) if self.spec.workers > 1 else ("answer", "error")

    def _judge(self, outcome: ClientOutcome) -> None:
        if outcome.kind not in self._allowed:
            self.failures.append(f"the client got none of: {', '.join(self._allowed)}, but {outcome}")
        if self.scene.is_corrupt(LONG, outcome):
            self.failures.append(f"CORRUPT: {outcome.tokens} instead of {self.scene.expected[LONG.title]}")

    async def _serve_again(self) -> None:
        outcomes = await asyncio.gather(*(self.scene.ask(question) for question in (LONG, SHORT)))
        for question, outcome in zip((LONG, SHORT), outcomes, strict=True):
            if outcome.kind != "answer":
                self.failures.append(f"after recovery: {outcome}")
            elif self.scene.is_corrupt(question, outcome):
                self.failures.append(f"CORRUPT after recovery: {question.title}")
        try:
            await self.scene.fleet.all_returned(RECOVERY_SECONDS)
        except KVBatonError as error:
            self.failures.append(str(error))


def _later(seconds: float, act: Callable[[], object]) -> asyncio.Task[None]:
    async def wait() -> None:
        await asyncio.sleep(seconds)
        act()

    return asyncio.create_task(wait())


def _lives(process: asyncio.subprocess.Process) -> bool:
    return process.returncode is None

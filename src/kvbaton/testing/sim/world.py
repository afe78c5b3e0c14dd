"""One run of one scenario, from the first request until everything has ended, healed, been returned and closed."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from kvbaton.manager import KVPoll
from kvbaton.plan.costs import Costs
from kvbaton.protocol.settings import Settings
from kvbaton.testing.sim.clockwork import Clockwork
from kvbaton.testing.sim.departing import DepartingJob
from kvbaton.testing.sim.fabric import Fabric
from kvbaton.testing.sim.job import SimJob
from kvbaton.testing.sim.judge import Judge
from kvbaton.testing.sim.memory import RankMemory
from kvbaton.testing.sim.network import SimNetwork
from kvbaton.testing.sim.process import Process
from kvbaton.testing.sim.scenario import (
    Fault,
    LinkFault,
    MessageFault,
    Noise,
    PrepareFault,
    RankFault,
    Scenario,
    SimGroup,
    SimRequest,
    WriteFault,
)
from kvbaton.testing.sim.source_job import SourceJob
from kvbaton.testing.sim.target_job import QUEUE_SECONDS, TargetJob
from kvbaton.testing.sim.violation import Violation

#: A run that takes more steps than this has lost its way.
MOST_STEPS = 400_000
#: How long closing may take, in the world's time.
CLOSING_SECONDS = 120.0


@dataclass(kw_only=True, slots=True)
class Outcome:
    """What one run showed. ``kind`` is empty if every invariant held.

    Args:
        cells: how often each cell of the transition table was reached, ``state:event``.
        faults: how often each fault took effect.
        results: how rooms ended on the ranks: ``success`` or the code of the error.
        trace: everything that happened, where it was asked for.
    """

    scenario: Scenario
    kind: str = ""
    text: str = ""
    steps: int = 0
    seconds: float = 0.0
    cells: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    results: Counter[str] = field(default_factory=Counter)
    trace: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.kind


def run(scenario: Scenario, *, tracing: bool = False) -> Outcome:
    """Run a scenario to its end or to the first violation. Deterministic: the same scenario, the same outcome."""
    world = SimWorld(scenario, tracing=tracing)
    kind, text = "", ""
    try:
        world.run()
    except Violation as violation:
        kind, text = violation.kind, violation.text
    except Exception as error:  # noqa: BLE001 - whatever escapes from the code under test is a finding
        kind, text = f"crash: {type(error).__name__}", "".join(traceback.format_exception(error)[-3:])
        world.clockwork.tell("judge", f"!!! {kind}: {text}")
    return world.outcome(kind, text)


class SimWorld:
    """Everything that exists in one run."""

    def __init__(self, scenario: Scenario, *, tracing: bool) -> None:
        self.scenario = scenario
        self.clockwork = Clockwork(scenario.seed, tracing=tracing)
        tuning = scenario.tuning
        self.settings = Settings(
            handshake_timeout=8.0,
            bootstrap_timeout=20.0,
            waiting_timeout=30.0,
            announce_seconds=15.0,
            settle_seconds=5.0,
            write_bytes=tuning.write_bytes,
            write_entries=tuning.write_entries,
            tombstones=tuning.tombstones,
            rooms=tuning.rooms,
            staging=tuning.staging,
            quarantine_seconds=tuning.quarantine_seconds,
            costs=Costs(post_seconds=tuning.post_seconds),
        )
        self.results: Counter[str] = Counter()
        self.judge = Judge(self)
        self.network = SimNetwork(self.clockwork)
        self.fabric = Fabric(self.clockwork, self.judge)
        self.troubled_until = 0.0
        self._healed = False
        self._instances: dict[str, Process] = {}
        self._places: dict[str, Process] = {}
        self._holes: set[str] = set()
        self._births = 0
        self.onward = {r.after: r for r in scenario.requests if r.onward is not None}
        self._waiting: dict[int, list[SimRequest]] = {}
        self._unstarted = 0
        self._open: dict[int, int] = {}
        self._last_start = 0.0
        for group, source in [*((g, True) for g in scenario.sources), *((g, False) for g in scenario.targets)]:
            for number in range(group.size):
                self._stand_up(group, number, source=source)
        for request in scenario.requests:
            if request.after is None:
                self._plan(request)
            else:
                self._waiting.setdefault(request.after, []).append(request)
        for fault in scenario.faults:
            self._arrange(fault)

    # ---- lookups ------------------------------------------------------------------------------------------------

    def process(self, instance: str) -> Process:
        return self._instances[instance]

    def living(self) -> list[Process]:
        return [process for process in self._instances.values() if process.alive]

    def groups_of(self, request: SimRequest) -> tuple[SimGroup, SimGroup]:
        """The source and the target of a request."""
        targets = self.scenario.targets
        if request.onward is not None:
            return targets[request.target], targets[request.onward]
        pair = self.scenario.sources[request.source], targets[request.target]
        return (pair[1], pair[0]) if request.back else pair

    @property
    def pairs(self) -> int:
        return sum(g.size for g in self.scenario.sources) * sum(g.size for g in self.scenario.targets)

    @property
    def most_seconds(self) -> float:
        """Longest time until a room ends, however disturbed: every wait has a deadline, progress restarts some; what is
        lost is said again after a pause, and dropped as often as a fault says."""
        rates = [clock.rate for g in (*self.scenario.sources, *self.scenario.targets) for clock in g.clocks]
        late = sum(f.count * (f.seconds + 60.0) for f in self.scenario.faults if isinstance(f, WriteFault))
        drops = (f.count for f in self.scenario.faults if isinstance(f, MessageFault) and f.kind == "drop")
        late += self.settings.retry_most_seconds * sum(drops)
        chunks = max((len(r.chunks) for r in self.scenario.requests), default=1)
        waits = self.settings.bootstrap_timeout + (3 + chunks) * self.settings.waiting_timeout
        slowest = max((r.chunk_every * chunks + r.ready_after for r in self.scenario.requests), default=0.0)
        queued = max((r.publish_after for r in self.scenario.requests), default=0.0) + QUEUE_SECONDS
        return (waits + queued + slowest + late + self.settings.announce_seconds) / min(rates, default=1.0)

    # ---- processes and requests ---------------------------------------------------------------------------------

    def _stand_up(self, group: SimGroup, number: int, *, source: bool) -> None:
        """A process starts at the place of a rank: always the same address and memory, always a new instance."""
        self._births += 1
        place = group.rank(number)
        memory = RankMemory(self.scenario.model, group, number, source=source)
        instance = f"{place}-{self._births}"
        self.clockwork.tell(place, f"stands up as {instance}")
        process = Process(self, group, number, memory, instance, source=source)
        self._instances[instance] = self._places[place] = process

    def _plan(self, request: SimRequest) -> None:
        start = self.clockwork.now
        self._unstarted += 1
        source, target = self.groups_of(request)
        skew = self.clockwork.stream(f"skew {request.number}")
        self._open[request.number] = source.size + target.size
        for number in range(source.size):
            at = start + request.source_at + 0.001 * skew.random()
            self.clockwork.at(at, lambda n=number: self._start(source.rank(n), request, source=True))  # type: ignore[misc]
        addresses = [f"sim://{source.rank(n)}" for n in range(source.size)]
        for number in range(target.size):
            at = start + request.target_at + 0.001 * skew.random()
            self.clockwork.at(
                at,
                lambda n=number: self._start(target.rank(n), request, addresses, source=False),  # type: ignore[misc]
            )

    def _start(self, place: str, request: SimRequest, addresses: list[str] | None = None, *, source: bool) -> None:
        process = self._places[place]
        if source and request.begun == "lost":
            self._one_over(request)
            return
        if process.alive and process.paused_until > self.clockwork.now:
            self.clockwork.at(process.paused_until, lambda: self._start(place, request, addresses, source=source))
            return
        self._last_start = self.clockwork.now
        if not process.alive or process.closing:
            process.engine.drop_kept(request)
            self._one_over(request)
            return
        sender = SourceJob if request.onward is None else DepartingJob
        job = sender(process, request) if source else TargetJob(process, request, addresses or [])
        self.judge.begun(job)
        process.engine.add(job)

    def job_over(self, job: SimJob) -> None:
        self._one_over(job.request)

    def _one_over(self, request: SimRequest) -> None:
        self._open[request.number] -= 1
        if not self._open[request.number]:
            self._unstarted -= 1
            self._go_on_after(request)

    def _go_on_after(self, request: SimRequest) -> None:
        """Whatever waited for its end. What did not come to every rank of a group cannot go on from there."""
        for following in self._waiting.pop(request.number, ()):
            group = self.groups_of(following)[0]
            engines = [self._places[group.rank(number)].engine for number in range(group.size)]
            if following.onward is None or all(engine.keeps(following) for engine in engines):
                self._plan(following)
                continue
            for engine in engines:
                engine.drop_kept(following)
            self._go_on_after(following)

    def process_over(self, process: Process) -> None:
        for job in process.engine.jobs:
            job.over = True
            self._one_over(job.request)
        process.engine.jobs.clear()

    # ---- faults -------------------------------------------------------------------------------------------------

    def _arrange(self, fault: Fault) -> None:
        if isinstance(fault, MessageFault):
            self.network.add_message_fault(fault)
            self._trouble(0.0 if fault.kind == "drop" else fault.seconds)
        elif isinstance(fault, Noise):
            self.network.add_noise(fault)
            self._trouble(fault.at + fault.seconds + fault.delay_seconds)
        elif isinstance(fault, WriteFault):
            self.fabric.add_write_fault(fault)
        elif isinstance(fault, PrepareFault):
            self.fabric.add_prepare_fault(fault)
        elif isinstance(fault, LinkFault):
            self.clockwork.when(fault.when, lambda: self._cut(fault))
        else:
            self.clockwork.when(fault.when, lambda: self._strike(fault))

    def _trouble(self, seconds: float) -> None:
        self.troubled_until = max(self.troubled_until, self.clockwork.now + seconds)

    def _cut(self, fault: LinkFault) -> None:
        if not self._healed:
            self._trouble(fault.seconds)
            self.network.cut(fault)

    def _strike(self, fault: RankFault) -> None:
        if self._healed:
            return
        process = self._places[fault.rank]
        self._trouble(fault.seconds)
        if fault.kind == "pause":
            process.pause(fault.seconds)
        elif fault.kind == "slow_reader":
            process.read_slowly(fault.seconds)
        elif fault.kind == "close":
            process.close()
            self.clockwork.faults["rank closed"] += 1
        elif process.alive:
            if fault.kind == "vanish":
                self._holes.add(fault.rank)
            process.kill(hole=fault.kind == "vanish")
            if fault.kind == "restart":
                self.clockwork.after(fault.seconds, lambda: self._restart(process))

    def _restart(self, process: Process) -> None:
        self.clockwork.faults["rank restarted"] += 1
        self._stand_up(process.group, process.number, source=process.source)

    # ---- running ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Raises Violation, or whatever escapes from the code under test."""
        while not self._settled():
            self._step()
            if self._overdue():
                break
        excused = self._excused()
        self.judge.finish(excused)
        self._rest()
        self.judge.forgotten()
        if not (excused or self.scenario.misuses):
            self._serve_again()
        give_up_at = self.clockwork.now + CLOSING_SECONDS
        while staying := [process for process in self.living() if not (process.parted and excused)]:
            for process in staying:
                process.close()
            self._step()
            if self.clockwork.now > give_up_at:
                raise self.clockwork.violated("stuck", f"{staying[0]} does not close")
        while self.fabric.busy and self.clockwork.now < give_up_at:
            self._step()

    def _rest(self) -> None:
        """Long enough for whoever lives to find its peers again, and to forget those that it does not."""
        settings = self.settings
        recovery = 2 * (settings.silence_seconds + settings.handshake_timeout) + settings.announce_seconds
        slowest = min((c.rate for g in (*self.scenario.sources, *self.scenario.targets) for c in g.clocks), default=1.0)
        began = self.clockwork.now
        while (until := max(began, self.troubled_until) + recovery / slowest) > self.clockwork.now:
            self.clockwork.at(until, lambda: None)  # time passes where nobody has anything to do
            while self.clockwork.now < until:  # trouble may still begin
                self._step()

    def _serve_again(self) -> None:
        """One more request for each two groups whose ranks all live, when nothing is disturbed any more."""
        self._healed = True
        self.clockwork.end_triggers()
        kept_apart = self.network.end_faults()
        self.fabric.end_faults()
        if kept_apart:
            self._rest()
        for number, (source, target, back) in enumerate(self._able()):
            request = SimRequest(
                number=1_000 + number, room=10_000 + number, source=source, target=target, back=back, chunks=(3,)
            )
            self._plan(request)
            give_up_at = self.clockwork.now + self.most_seconds
            while self._unstarted and self.clockwork.now < give_up_at:
                self._step()
            self.judge.worked_again(request)

    def _able(self) -> Iterator[tuple[int, int, bool]]:
        """Indices of a source and a target group that can serve, and whether the other way round."""
        used_back = {(r.source, r.target) for r in self.scenario.requests if r.back}
        for s, source in enumerate(self.scenario.sources):
            for t, target in enumerate(self.scenario.targets):
                places = [self._places[g.rank(n)] for g in (source, target) for n in range(g.size)]
                if all(process.alive and not process.closing for process in places):
                    yield s, t, False
                    if (s, t) in used_back:
                        yield s, t, True

    def _step(self) -> None:
        if not self.clockwork.step():
            raise self.clockwork.violated("stuck", "nothing is left to happen")
        if self.clockwork.steps > MOST_STEPS:
            raise self.clockwork.violated("too many steps", f"{MOST_STEPS} steps, at {self.clockwork.now:.1f} s")

    def _settled(self) -> bool:
        if self._unstarted or (self.clockwork.now < self.troubled_until and self.clockwork.next is not None):
            return False
        return not self.fabric.busy and not any(
            p.manager.core.live_rooms or p.manager.driver.pending or p.links.inbox for p in self.living()
        )

    def _overdue(self) -> bool:
        """Whether everything should have ended: faults healed long ago, and the last request began long ago."""
        if self.clockwork.steps % 64:
            return False
        since = max(self.troubled_until, self._last_start) + self.most_seconds
        return self.clockwork.now > since + 2 * self.settings.announce_seconds

    def _has_hole(self, group: SimGroup) -> bool:
        """Whether a rank of the group was lost with its host."""
        return any(group.rank(number) in self._holes for number in range(group.size))

    def _excused(self) -> set[SimJob]:
        """Rooms that may stay quarantined: a host was lost without proof that its writes have ended."""
        return {
            job
            for process in self.living()
            for job in process.engine.jobs
            if isinstance(job, TargetJob)
            and job.outcome is KVPoll.Failed
            and self._has_hole(self.groups_of(job.request)[0])
        }

    def outcome(self, kind: str, text: str) -> Outcome:
        cells: Counter[str] = Counter()
        for process in self._instances.values():
            cells.update({key: n for key, n in process.manager.core.counters.items() if ":" in key})
        return Outcome(
            scenario=self.scenario,
            kind=kind,
            text=text,
            steps=self.clockwork.steps,
            seconds=self.clockwork.now,
            cells=cells,
            faults=self.clockwork.faults,
            results=self.results,
            trace=self.clockwork.trace or [],
        )

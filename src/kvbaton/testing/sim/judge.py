"""The invariants: what must hold after every step of every run, whatever was done to it; why so: docs/design.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvbaton.errors import InternalError, MessageError
from kvbaton.manager import KVPoll
from kvbaton.protocol.effects import Report
from kvbaton.protocol.events import Event, MessageArrived
from kvbaton.protocol.messages import Abort, Close, Done, Failed, decode
from kvbaton.protocol.transfer import Transfer
from kvbaton.testing.sim.allocator import Tenancy
from kvbaton.testing.sim.fabric import Host, Run, Write
from kvbaton.testing.sim.job import ENDED, SimJob
from kvbaton.testing.sim.process import Process
from kvbaton.testing.sim.scenario import SimRequest
from kvbaton.testing.sim.source_job import SourceJob
from kvbaton.testing.sim.target_job import TargetJob

if TYPE_CHECKING:
    from kvbaton.testing.sim.world import SimWorld

#: How soon, where nothing is disturbed, one side knows of the other's failure.
NEWS_SECONDS = 4.0
#: Most steps of an undisturbed run, for each request and each pair of ranks.
STEPS_PER_PAIR = 1500


class Judge:
    """See the module. Raises :class:`~kvbaton.testing.sim.violation.Violation`."""

    def __init__(self, world: SimWorld) -> None:
        self._world = world
        self._clockwork = world.clockwork
        self._first_abort: dict[int, float] = {}
        self._counted: dict[Process, tuple[int, int]] = {}
        self._delivered: dict[int, str] = {}
        self._raised: list[SimJob] = []
        self.jobs: list[SimJob] = []

    # ---- the data plane -----------------------------------------------------------------------------------------

    def posted(self, source: Host, target: Host, run: Run) -> None:
        """A write begins: both its ends must belong to one room, and both ranks must have agreed on the plan."""
        if self._released_by_policy(target):
            return
        rooms = set()
        for host, owners, kind in ((source, run.source_owners, "read"), (target, run.target_owners, "write")):
            for unit, owner in owners:
                if owner is None:
                    where = f"{host.name} {host.memory.unit_name(unit)}"
                    raise self._violated(f"{kind} after free", f"{source.name} posts a write, {where} is free")
                if host.in_two_roles(unit):
                    where = f"{host.name} {host.memory.unit_name(unit)}"
                    raise self._violated("slot used twice", f"{where} is leased to a source and sent from")
                if isinstance(owner, Tenancy):
                    rooms.add(owner.job.request.room)
                elif isinstance(owner, Transfer):
                    rooms.add(owner.key.room)
        if len(rooms) > 1:
            raise self._violated(
                "misdirected write", f"{source.name} → {target.name}: {run.source_owners} to {run.target_owners}"
            )
        self._check_once(source, target, run)
        self._check_digest(source, target)

    def _check_once(self, source: Host, target: Host, run: Run) -> None:
        """No byte of a room is written twice, by whomever, unless its chunks were withdrawn and come again."""
        owner, room, number = run.target_owners[0][1], -1, 0
        if isinstance(owner, Tenancy):
            room, number = owner.job.request.room, owner.number
        elif isinstance(owner, Transfer):
            room, number = owner.key.room, -owner.key.id
        again = any(request.room == room and request.preempt is not None for request in self._world.scenario.requests)
        written = target.memory.written_for[run.target : run.target + run.length]
        if number and not again and (written == number).any():
            raise self._violated("written twice", f"{source.name} → {target.name}: {run.target_owners}")
        written[:] = number

    def _check_digest(self, source: Host, target: Host) -> None:
        ours = self._world.process(source.instance).manager.core.plan_digest(target.instance, "source")
        theirs = self._world.process(target.instance).manager.core.plan_digest(source.instance, "target")
        if ours != theirs:
            raise self._violated("digests differ", f"{source.name} has {ours}, {target.name} has {theirs}")

    def read_late(self, write: Write, unit: int, owner: object) -> None:
        """Bytes are read from a unit that has changed hands since the write was posted."""
        host = write.writer.host
        now = host.owner_of(unit, reading=True)
        where = f"{host.name} {host.memory.unit_name(unit)}"
        raise self._violated("read after free", f"a write reads {where}, which was {owner} and is {now} now")

    def trespassed(self, write: Write, unit: int, owner: object) -> None:
        """Bytes land in a unit that has changed hands since they were posted."""
        target = write.target
        if self._released_by_policy(target):
            self._clockwork.faults["write lands after a release by policy"] += 1
            return
        now = target.owner_of(unit, reading=False)
        where = f"{target.name} {target.memory.unit_name(unit)}"
        raise self._violated(
            "write after free",
            f"a write of {write.writer.host.name} lands in {where}, which was {owner} and is {now} now",
        )

    def freed(self, job: SimJob, units: list[int]) -> None:
        """An engine has freed units: nothing in flight may read or touch them."""
        host, freed = job.process, set(units)
        if isinstance(job, TargetJob) and not self._released_by_policy(host):
            for write in self._world.fabric.towards(host.instance):
                if any(owner is job.tenancy for run in write.flying for _, owner in run.target_owners):
                    raise self._violated("write after free", f"{job} freed units that {write.writer.host.name} writes")
        elif isinstance(job, SourceJob):
            for write in self._world.fabric.reading(host.instance):
                reads = {unit for run in write.flying if run.captured is None for unit, _ in run.source_owners}
                if reads & freed:
                    raise self._violated("read after free", f"{job} freed units that a write to {write.peer} reads")

    def _released_by_policy(self, host: Host) -> bool:
        return bool(self._world.process(host.instance).manager.core.counters["leases_released_by_policy"])

    # ---- what an engine is told ---------------------------------------------------------------------------------

    def begun(self, job: SimJob) -> None:
        self.jobs.append(job)

    def aborted(self, job: SimJob) -> None:
        if job.outcome is None:
            self._first_abort.setdefault(job.request.number, self._clockwork.now)

    def fence_raised(self, job: SimJob) -> None:
        self.aborted(job)
        if job.outcome is None:
            self._raised.append(job)

    def reported(self, process: Process, report: Report) -> None:
        status, poll = report.status, report.status.poll
        job = next((j for j in process.engine.jobs if j.side is process.manager.side_of(report)), None)
        self._clockwork.tell(process.name, f"reports {report.role} of room {report.room}: {_brief(report)}")
        if job is None:
            return
        if isinstance(job, TargetJob) and (status.leased or job.request.declines) and job.opened_at is None:
            job.opened_at = self._clockwork.now
        if job.outcome is not None:
            if poll is not job.outcome:
                raise self._violated("terminal state changed", f"{job} was {job.outcome.name}, is {poll.name}")
            return
        if poll not in ENDED:
            return
        job.outcome, job.ended_at = poll, self._clockwork.now
        self._check_time(job)
        if poll is KVPoll.Success:
            self._world.results["success"] += 1
            self._check_bytes(job)
            return
        error = status.error
        raised = any(one.ready_raises for one in self._world.scenario.requests if one.room == job.request.room)
        ours = () if raised else ("error", "internal")
        if error is None or error.code in ours or error.room != report.room:
            raise self._violated("bad error", f"{job} failed with {error!r} of room {error.room if error else None}")
        self._world.results[error.code] += 1
        self._check_inbox(process, report)

    def _check_inbox(self, process: Process, report: Report) -> None:
        """No deadline may beat a message that is already here."""
        error = report.status.error
        silent = error is not None and error.message.startswith("no sign of life")
        if error is None or not (silent or error.code == "expired") or _brings_a_cause(process.handling):
            return
        for event in process.manager.driver.unread:
            if not isinstance(event, MessageArrived):
                continue
            try:
                message = decode(event.payload)
            except MessageError:
                continue
            spoke = silent and error.peer.startswith(message.sender)
            if spoke or (error.code == "expired" and isinstance(message, Done) and message.key.room == report.room):
                raise self._violated(
                    "deadline before inbox",
                    f"{process.name} room {report.room}: {error}, but here is {str(message)[:99]}",
                )

    def _check_bytes(self, job: SimJob) -> None:
        """Success: every byte of every unit is what some request of this room (of this one, as a rule) computed."""
        if not isinstance(job, TargetJob) or self._released_by_policy(job.process):
            return
        rivals = [r.number for r in self._world.scenario.requests if r.room == job.request.room]
        if not self._world.scenario.misuses:
            rivals = [job.request.number]
        if wrong := job.wrong(rivals):
            raise self._violated("corrupt", f"{job} succeeded, but {wrong} are wrong")
        for number in rivals if len(rivals) > 1 and job.side is not None and job.side.bytes else ():
            group = job.process.group.name
            if not job.wrong([number]) and self._delivered.setdefault(number, group) != group:
                raise self._violated("delivered twice", f"{job} and group {self._delivered[number]} got one content")

    def released(self, job: SimJob) -> None:
        if job.outcome is None:
            raise self._violated("ended unseen", f"{job} is released, but no end was reported")
        if job.outcome is KVPoll.Success:
            self._check_bytes(job)

    def _check_time(self, job: SimJob) -> None:
        """An end comes within a bounded time, counted on the rank's own clock, without the time it was stopped."""
        lasted = self._clockwork.now - job.started_at - job.process.paused_seconds
        if lasted > self._world.most_seconds:
            raise self._violated("late end", f"{job} ended only after {lasted:.1f} s")

    # ---- every step ---------------------------------------------------------------------------------------------

    def turned(self, process: Process) -> None:
        core = process.manager.core
        for job in self._raised:
            if job.outcome is None:
                raise self._violated("fence swallowed", f"{job} goes on, though the fence of its chunk has raised")
        self._raised.clear()
        if process.handling is None:
            return
        process.handling = None
        try:
            core.check_invariants()
        except InternalError as error:
            raise self._violated("core invariant", f"{process.name}: {error}") from error
        counted = (core.counters["messages_forbidden"], core.counters["messages_malformed"])
        if counted != self._counted.get(process, (0, 0)):
            self._counted[process] = counted
            raise self._violated("forbidden message", f"{process.name} got a message that no correct peer sends")

    def closed(self, process: Process) -> None:
        writes = self._world.fabric.reading(process.instance)
        reading = [run for write in writes for run in write.flying if run.captured is None]
        if reading and process.manager.core.quiet:
            raise self._violated("after close", f"{process.name} said goodbye with writes in flight")

    def gone(self, process: Process) -> None:
        """A rank that has closed hangs up: its memory is its engine's again, whatever it is used for next."""
        writes = self._world.fabric.towards(process.instance)
        if writes and not self._released_by_policy(process):
            raise self._violated("write after close", f"{process.name} is gone, {writes[0].writer.host.name} writes it")

    # ---- the end ------------------------------------------------------------------------------------------------

    def finish(self, excused: set[SimJob]) -> None:
        """Everything has ended and healed: nothing may be missing. What has come for a request whose other ranks are
        ``excused`` may wait to be handed on."""
        numbers = {job.request.number for job in excused}
        for process in self._world.living():
            left = [job for job in process.engine.jobs if job not in excused]
            if left:
                raise self._violated("stuck", f"{left[0]} has not ended: {left[0].side}")
            if any(job in excused for job in process.engine.jobs):
                continue
            if process.engine.allocator.taken and not process.engine.keeps_what_came(numbers):
                raise self._violated("units lost", f"{process.name} has {process.engine.allocator.taken} units missing")
            core, driver = process.manager.core, process.manager.driver
            if core.live_rooms or not core.quiet or driver.pending:
                raise self._violated("core not idle", f"{process.name}: {core.live_rooms} rooms, quiet {core.quiet}")
        requests = self._world.scenario.requests
        for request in requests:
            self._check_agreement(request)
        if self._world.scenario.undisturbed:
            self._check_undisturbed()

    def forgotten(self) -> None:
        """Long after a host was lost: nobody holds a session with it that no room needs."""
        for process in self._world.living():
            for peer, role, state in process.manager.core.sessions():
                address = peer.rpartition(" at ")[2]
                if role == "target" and self._world.network.is_hole(address) and not process.engine.jobs:
                    raise self._violated("session kept", f"{process.name} still holds a session with {peer}: {state}")

    def worked_again(self, request: SimRequest) -> None:
        """When all faults are over, whoever lives serves as before."""
        for job in (job for job in self.jobs if job.request is request):
            if job.outcome is not KVPoll.Success:
                raise self._violated("does not recover", f"{job}: {job.side}, {job.side.error if job.side else ''}")

    def _check_agreement(self, request: SimRequest) -> None:
        """Where one source rank serves a room alone, its success is everybody's."""
        jobs = [job for job in self.jobs if job.request is request]
        sources = [job for job in jobs if isinstance(job, SourceJob)]
        if self._world.scenario.misuses or self._world.groups_of(request)[0].size > 1:
            return
        if any(job.outcome is KVPoll.Success for job in sources):
            for job in jobs:
                if job.outcome is KVPoll.Failed and isinstance(job, TargetJob):
                    raise self._violated("disagreement", f"{job} failed, but its only source succeeded")

    def _check_undisturbed(self) -> None:
        """Without faults everything succeeds in few steps; what is aborted ends everywhere at once."""
        spoiled: set[int] = set()
        for request in self._world.scenario.requests:
            jobs = [job for job in self.jobs if job.request is request]
            if request.room in spoiled:
                continue  # a room that was given up before both sides had met is remembered as failed, by its number
            if request.number in self._first_abort:
                spoiled.add(request.room)
            aborted_at = self._first_abort.get(request.number)
            if aborted_at is None:
                failed = [job for job in jobs if job.outcome is not KVPoll.Success]
                if not failed:
                    continue
                if not _is_late(request, jobs):
                    raise self._violated("failed undisturbed", f"{failed[0]}: {failed[0].side}")
                spoiled.add(request.room)
                aborted_at = min((job.ended_at for job in failed if job.ended_at is not None), default=0.0)
            opened = [job.opened_at for job in jobs if isinstance(job, TargetJob)]
            known_at = [aborted_at, *(job.started_at for job in jobs), *(at for at in opened if at is not None)]
            if None not in opened or self._given_up_by_target(request):
                for job in jobs:
                    if job.ended_at is None or job.ended_at > max(known_at) + NEWS_SECONDS:
                        raise self._violated("slow news", f"{job} ended at {job.ended_at}, aborted at {aborted_at}")
        steps = self._clockwork.steps
        if steps > STEPS_PER_PAIR * self._world.pairs * len(self._world.scenario.requests):
            raise self._violated("too many steps", f"{steps} steps without any fault")

    def _given_up_by_target(self, request: SimRequest) -> bool:
        """Whether every target rank has given up first, and no source: nobody waits for anything of theirs."""
        return request.source_abort is None and (request.declines or not request.lone_abort)

    def _violated(self, kind: str, text: str) -> Exception:
        return self._clockwork.violated(kind, text)


def _is_late(request: SimRequest, jobs: Sequence[SimJob]) -> bool:
    """Whether decode, which was told that prefill has begun it, may have asked before a rank of prefill knew of it."""
    sources = [job.started_at for job in jobs if isinstance(job, SourceJob)]
    targets = [job.started_at for job in jobs if isinstance(job, TargetJob)]
    return request.begun == "late" and max(sources, default=0.0) >= min(targets, default=0.0)


def _brings_a_cause(event: Event | None) -> bool:
    """Whether an error was the peer's word, not our own clock's."""
    return isinstance(event, MessageArrived) and isinstance(decode(event.payload), Abort | Failed | Close)


def _brief(report: Report) -> str:
    status = report.status
    cause = f" ({status.error.code}: {status.error.message[:120]})" if status.error else ""
    return f"{status.poll.name}{', leased' if status.leased else ''}{cause}"

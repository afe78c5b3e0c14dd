"""An engine in this process, and what it stands on: the :class:`Replica` of one group of ranks.

This file must not know how any of it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvbaton.discovery.registry import Route
from kvbaton.errors import KVBatonError
from kvbaton.manager import KVManager, TraceEvent
from kvbaton.plan.layout_file import RankLayout
from kvbaton.plan.staging import StagingPolicy
from kvbaton.serving.engine.group import Group
from kvbaton.serving.engine.handoffs import Handoffs, StagingUse
from kvbaton.serving.engine.request import Output, Request
from kvbaton.serving.engine.scheduler import Scheduler
from kvbaton.serving.engine.stats import Stats
from kvbaton.serving.server.rank import ServerRank


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalReplica:
    """A running engine and what it stands on: the :class:`Replica` of this process."""

    scheduler: Scheduler
    manager: KVManager | None
    group: Group | None
    rank: ServerRank
    policy: StagingPolicy
    routes: tuple[Route, ...]
    layouts: tuple[RankLayout, ...]

    def submit(self, request: Request, on_output: Callable[[Output], None]) -> None:
        self.scheduler.submit(request, on_output)

    def abort(self, request_id: str, reason: str = "aborted by the client") -> None:
        self.scheduler.abort(request_id, reason)

    def end_all(self, error: KVBatonError) -> None:
        self.scheduler.end_all(error)

    def hand_on(self, request_ids: Sequence[str], room: int) -> None:
        self.scheduler.hand_on(request_ids, room)

    def stats(self) -> Stats:
        return self.scheduler.stats()

    @property
    def failure(self) -> KVBatonError | None:
        return self.scheduler.failure

    def handoffs(self) -> Handoffs | None:
        return handoffs_of(self.manager, self.rank, self.policy) if self.manager is not None else None

    def timeline(self, room: int) -> Sequence[TraceEvent]:
        return self.manager.timeline(room) if self.manager is not None else ()

    def watch(self, on_lost: Callable[[KVBatonError], None]) -> None:
        """A group without one of its ranks can serve nothing."""
        group = self.group
        if group is not None:
            group.on_lost = on_lost
            if group.lost is not None:
                on_lost(group.lost)


def handoffs_of(manager: KVManager, rank: ServerRank, policy: StagingPolicy) -> Handoffs:
    """What one rank knows of its hand-offs now."""
    staging = manager.layout.staging
    use = None
    if staging is not None:
        use = StagingUse(
            policy=policy,
            slot_bytes=staging.slot_bytes,
            slots=staging.slots,
            slots_free=manager.staging_slots_free,
        )
    return Handoffs(
        evidence=manager.evidence(),
        address=manager.address,
        group=rank.group,
        layout_digest=manager.layout.digest(),
        rank=rank.shard.rank,
        live_rooms=manager.live_rooms,
        leased_rooms=manager.leased_rooms,
        quarantined_rooms=manager.quarantined_rooms,
        staging=use,
        counters=manager.counters(),
    )

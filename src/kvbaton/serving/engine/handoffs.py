"""What the first rank of an engine knows of all its hand-offs, for operators: plain data that goes through a pipe.

This file must not know how it is shown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from msgspec import Struct


class StagingUse(Struct, frozen=True, kw_only=True):
    """Staging memory of a rank, and how much of it is in use."""

    policy: str
    slot_bytes: int
    slots: int
    slots_free: int


class Handoffs(Struct, frozen=True, kw_only=True):
    """What the first rank of an engine knows of its hand-offs; or the sum, where there are several engines."""

    evidence: str
    address: str
    group: str
    layout_digest: str
    rank: int
    live_rooms: int
    leased_rooms: int
    quarantined_rooms: int
    staging: StagingUse | None
    counters: dict[str, int]


def sum_of(several: Sequence[Handoffs]) -> Handoffs:
    """The hand-offs of several engines that are alike, as one."""
    first = several[0]
    counters = Counter[str]()
    for one in several:
        counters.update(one.counters)
    staging = first.staging
    uses = [one.staging for one in several if one.staging is not None]
    if staging is not None:
        staging = StagingUse(
            policy=staging.policy,
            slot_bytes=staging.slot_bytes,
            slots=sum(use.slots for use in uses),
            slots_free=sum(use.slots_free for use in uses),
        )
    return Handoffs(
        evidence=_joined(one.evidence for one in several),
        address=_joined(one.address for one in several),
        group=_joined(one.group for one in several),
        layout_digest=_joined(one.layout_digest for one in several),
        rank=first.rank,
        live_rooms=sum(one.live_rooms for one in several),
        leased_rooms=sum(one.leased_rooms for one in several),
        quarantined_rooms=sum(one.quarantined_rooms for one in several),
        staging=staging,
        counters=dict(counters),
    )


def _joined(words: Iterable[str]) -> str:
    """Distinct ones, in order of appearance."""
    return ", ".join(dict.fromkeys(word for word in words if word))

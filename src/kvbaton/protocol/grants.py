"""Grants against a layout and a plan: what a peer or an engine hands in is checked here, once, before it is used."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from kvbaton.errors import LayoutError
from kvbaton.layout import CacheLayout
from kvbaton.plan.pair import PairPlan, PartId
from kvbaton.plan.staging import StagedPart
from kvbaton.protocol.messages import MAX_UNIT, Grant, PartBytes, StagingGrant, Units
from kvbaton.protocol.transfer import Lease


def check_grants(grants: Iterable[Grant], layout: CacheLayout, *, distinct: bool = True) -> dict[str, Grant]:
    """Grants by pool. Raises LayoutError unless each names a pool of ``layout`` once, and units that exist.

    A paged pool needs one unit for every page that the token range touches, a slot pool exactly one unit and no
    tokens. ``distinct``: no unit may appear twice (it would be written twice).
    """
    by_pool: dict[str, Grant] = {}
    for grant in grants:
        pool = layout.pool(grant.pool)
        if grant.pool in by_pool:
            raise LayoutError(f"pool {grant.pool!r} is granted twice")
        by_pool[grant.pool] = grant
        if pool.paged:
            if grant.token_start > grant.token_stop:
                raise LayoutError(f"pool {grant.pool!r}: tokens {grant.token_start}..{grant.token_stop} run backwards")
            empty = grant.token_start == grant.token_stop
            needed = 0 if empty else -(-grant.token_stop // pool.rows) - grant.token_start // pool.rows
        else:
            if grant.token_start or grant.token_stop:
                raise LayoutError(f"pool {grant.pool!r} has slots, not pages: its token range must be 0..0")
            needed = 1
        if len(grant.units) != needed:
            raise LayoutError(
                f"pool {grant.pool!r}: tokens {grant.token_start}..{grant.token_stop} need {needed} units of "
                f"{pool.rows} rows, {len(grant.units)} were given"
            )
        if needed and not (_least(grant.units) >= 0 and _most(grant.units) < pool.units):
            raise LayoutError(f"pool {grant.pool!r}: a unit is outside 0..{pool.units - 1}")
        if distinct and needed > 1 and _repeats(grant.units):
            raise LayoutError(f"pool {grant.pool!r}: a unit is given twice")
    return by_pool


def own_units(grants: Iterable[Grant]) -> tuple[Grant, ...]:
    """What an engine hands in, with arrays copied: it may go on to change its own. Raises LayoutError for an array that
    is not a list of integers."""
    return tuple(
        grant if isinstance(grant.units, tuple) else structs.replace(grant, units=_copied(grant)) for grant in grants
    )


def _copied(grant: Grant) -> NDArray[np.int32]:
    given = np.asarray(grant.units)
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise LayoutError(
            f"pool {grant.pool!r}: units are {given.ndim}-dimensional {given.dtype}, not a list of integers"
        )
    if given.size and int(given.max()) > MAX_UNIT:
        raise LayoutError(f"pool {grant.pool!r}: unit {given.max()} is more than a message carries")
    return given.astype(np.int32)


def _least(units: Units) -> int:
    return int(units.min()) if isinstance(units, np.ndarray) else min(units)


def _most(units: Units) -> int:
    return int(units.max()) if isinstance(units, np.ndarray) else max(units)


def _repeats(units: Units) -> bool:
    if isinstance(units, np.ndarray):
        ordered = np.sort(units)
        return bool((ordered[1:] == ordered[:-1]).any())
    return len(set(units)) != len(units)


def check_staging(
    staging: Iterable[StagingGrant], known: Iterable[StagedPart | None], grants: dict[str, Grant]
) -> dict[PartId, Lease]:
    """The target's staging slots by part. Raises LayoutError unless each fits its part and no slot is given twice."""
    staged_parts = {staged.part.id: staged for staged in known if staged is not None}
    leases: dict[PartId, Lease] = {}
    seen: set[int] = set()
    for given in staging:
        staged, grant = staged_parts.get(given.part), grants.get(given.part.pool)
        if staged is None or grant is None or given.part in leases:
            raise LayoutError(f"part {given.part} cannot be staged here")
        blocks = staged.part.blocks(grant.token_start, grant.token_stop)
        slots = len(staged.target.rows)
        most = staged.slots_for(len(blocks))
        if not 1 <= len(given.slots) <= most or not all(0 <= slot < slots for slot in given.slots):
            raise LayoutError(
                f"part {given.part}: {len(blocks)} blocks take 1 to {most} staging slots of 0..{slots - 1}, "
                f"{list(given.slots)[:8]} were given"
            )
        if seen & set(given.slots) or len(set(given.slots)) != len(given.slots):
            raise LayoutError(f"part {given.part}: a staging slot is given twice")
        seen |= set(given.slots)
        leases[given.part] = Lease(staged=staged, slots=tuple(given.slots), first=blocks.start)
    return leases


def up_to(grants: Iterable[Grant], token_count: int) -> tuple[Grant, ...]:
    """What these grants hold of a prompt of ``token_count`` tokens; slots are whole, units stay as they are."""
    return tuple(
        structs.replace(grant, token_stop=max(grant.token_start, min(grant.token_stop, token_count)))
        for grant in grants
    )


def parts_of(pair: PairPlan, grants: Iterable[Grant]) -> tuple[PartBytes, ...]:
    """The manifest of one writer: every part of ``pair`` that moves bytes for these grants."""
    by_pool = {grant.pool: grant for grant in grants}
    found = []
    for part in pair.parts:
        grant = by_pool.get(part.id.pool)
        if grant is not None:
            size = part.bytes(grant.token_start, grant.token_stop)
            if size:
                found.append(PartBytes(part.id, size))
    return tuple(found)

"""Grants and manifests: what a peer or an engine hands in is judged by name before it is used."""

from __future__ import annotations

import msgspec
import pytest

from kvbaton.errors import LayoutError
from kvbaton.layout import CacheLayout, Region, Staging, aux_pool, kv_pool, pool_bytes
from kvbaton.plan.pair import PartId, pair_plan
from kvbaton.plan.staging import stage
from kvbaton.protocol.grants import check_grants, check_staging, parts_of
from kvbaton.protocol.messages import Grant, PartBytes, StagingGrant


def layout(base: int) -> CacheLayout:
    pool = kv_pool([0], pages=8, page_size=4, heads=2, head_bytes=8, dtype="u1")
    regions = (Region(base, pool_bytes(pool)), Region(base + (1 << 32), 24))
    return CacheLayout("m", regions, (pool, aux_pool(slots=3, slot_bytes=8, region=1)))


LAYOUT = layout(1 << 40)


@pytest.mark.parametrize(
    "grant",
    [
        Grant("kv", 0, 0, ()),
        Grant("kv", 9, 9, ()),
        Grant("kv", 0, 1, (7,)),
        Grant("kv", 0, 4, (0,)),
        Grant("kv", 0, 5, (0, 7)),
        Grant("kv", 4, 12, (3, 1)),
        Grant("kv", 6, 9, (3, 1)),
        Grant("aux", 0, 0, (2,)),
    ],
    ids=str,
)
def test_a_grant_names_a_unit_for_every_page_that_it_touches(grant: Grant) -> None:
    assert check_grants([grant], LAYOUT) == {grant.pool: grant}


@pytest.mark.parametrize(
    ("grant", "words"),
    [
        (Grant("lora", 0, 1, (0,)), "layout has no pool 'lora'; it has kv, aux"),
        (Grant("kv", 4, 0, ()), "pool 'kv': tokens 4..0 run backwards"),
        (Grant("kv", 0, 5, (0,)), "pool 'kv': tokens 0..5 need 2 units of 4 rows, 1 were given"),
        (Grant("kv", 0, 4, (0, 1)), "need 1 units of 4 rows, 2 were given"),
        (Grant("kv", 0, 0, (1,)), "need 0 units"),
        (Grant("kv", 0, 4, (8,)), "a unit is outside 0..7"),
        (Grant("kv", 0, 4, (-1,)), "a unit is outside 0..7"),
        (Grant("kv", 0, 8, (3, 3)), "a unit is given twice"),
        (Grant("aux", 0, 1, (0,)), "pool 'aux' has slots, not pages: its token range must be 0..0"),
        (Grant("aux", 0, 0, ()), "need 1 units"),
        (Grant("aux", 0, 0, (3,)), "a unit is outside 0..2"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_grant_is_said(grant: Grant, words: str) -> None:
    with pytest.raises(LayoutError) as caught:
        check_grants([grant], LAYOUT)
    assert words in caught.value.message


def test_a_pool_is_granted_once() -> None:
    with pytest.raises(LayoutError, match="pool 'kv' is granted twice"):
        check_grants([Grant("kv", 0, 4, (0,)), Grant("kv", 4, 8, (1,))], LAYOUT)


def test_a_source_may_read_a_unit_twice() -> None:
    """A chunk may name a page more than once: prefixes are shared, and reading is harmless."""
    assert check_grants([Grant("kv", 0, 8, (3, 3))], LAYOUT, distinct=False)


def test_the_manifest_is_what_moves_bytes() -> None:
    pair = pair_plan(LAYOUT, layout(1 << 41))
    kv, aux = PartId("kv", 0, 1, 0, 2), PartId("aux", -1, 0, 0, 1)
    grants = (Grant("kv", 0, 9, (0, 1, 2)), Grant("aux", 0, 0, (1,)))
    assert parts_of(pair, grants) == (PartBytes(kv, 3 * 4 * 2 * 8 * 2), PartBytes(aux, 8))
    assert parts_of(pair, grants[1:]) == (PartBytes(aux, 8),)
    assert parts_of(pair, (Grant("kv", 8, 8, ()), grants[1])) == (PartBytes(aux, 8),)
    assert parts_of(pair, ()) == ()


# ---- staging


def staged_layout(base: int) -> CacheLayout:
    """A block of 4 tokens takes 128 bytes: two fit a slot."""
    pool = kv_pool([0], pages=8, page_size=4, heads=2, head_bytes=8, dtype="u1")
    other = kv_pool([0], pages=8, page_size=4, heads=2, head_bytes=8, dtype="u1", name="other")
    sizes = [pool_bytes(pool)] * 2 + [4 * 256]
    regions = tuple(Region(base + (i << 32), size) for i, size in enumerate(sizes))
    other = msgspec.structs.replace(other, planes=tuple(msgspec.structs.replace(p, region=1) for p in other.planes))
    return CacheLayout("m", regions, (pool, other), Staging(2, 256, 4))


KV, OTHER = PartId("kv", 0, 1, 0, 2), PartId("other", 0, 1, 0, 2)
SOURCE, TARGET = staged_layout(1 << 40), staged_layout(1 << 41)
STAGED = stage(pair_plan(SOURCE, TARGET), SOURCE, TARGET)
STAGED_GRANTS = {"kv": Grant("kv", 4, 16, (0, 1, 2)), "other": Grant("other", 0, 8, (0, 1))}


def test_staging_slots_become_leases_from_the_first_block_granted() -> None:
    leases = check_staging([StagingGrant(KV, (3, 0)), StagingGrant(OTHER, (1,))], [*STAGED, None], STAGED_GRANTS)
    assert {part: (lease.slots, lease.first) for part, lease in leases.items()} == {KV: ((3, 0), 1), OTHER: ((1,), 0)}
    assert [leases[part].staged for part in (KV, OTHER)] == list(STAGED)


@pytest.mark.parametrize(
    ("staging", "words"),
    [
        ([StagingGrant(PartId("lora", 0, 1, 0, 2), (0,))], "cannot be staged here"),
        ([StagingGrant(PartId("kv", 0, 1, 0, 1), (0, 1))], "cannot be staged here"),
        ([StagingGrant(KV, (0, 1)), StagingGrant(KV, (2, 3))], "cannot be staged here"),
        ([StagingGrant(KV, ())], "3 blocks take 1 to 2 staging slots of 0..3, [] were given"),
        ([StagingGrant(KV, (0, 1, 2))], "take 1 to 2 staging slots"),
        ([StagingGrant(KV, (0, 4))], "staging slots of 0..3, [0, 4] were given"),
        ([StagingGrant(KV, (-1, 0))], "staging slots of 0..3"),
        ([StagingGrant(KV, (2, 2))], "a staging slot is given twice"),
        ([StagingGrant(KV, (2, 1)), StagingGrant(OTHER, (2,))], "a staging slot is given twice"),
    ],
    ids=str,
)
def test_what_is_wrong_with_staging_slots_is_said(staging: list[StagingGrant], words: str) -> None:
    with pytest.raises(LayoutError) as caught:
        check_staging(staging, STAGED, STAGED_GRANTS)
    assert words in caught.value.message


def test_a_part_without_a_grant_or_without_staging_takes_no_slots() -> None:
    for known, grants in ((STAGED, {"other": STAGED_GRANTS["other"]}), ((None, STAGED[1]), STAGED_GRANTS)):
        with pytest.raises(LayoutError, match="cannot be staged here"):
            check_staging([StagingGrant(KV, (0, 1))], known, grants)

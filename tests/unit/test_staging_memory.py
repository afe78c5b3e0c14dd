"""Staging memory that a rank makes for itself, and the name that its group agrees on."""

from __future__ import annotations

import multiprocessing
from multiprocessing.queues import Queue
from pathlib import Path

import pytest
from ranks import MakeRank

from kvbaton import CacheLayout, KVManager, Region, launch_id
from kvbaton.errors import ConfigError
from kvbaton.layout import aux_pool, kv_pool, pool_bytes
from kvbaton.runtime.staging_memory import ALIGNMENT_BYTES, STAGING_BYTES, STAGING_SLOT_BYTES, with_staging

MIB = 1 << 20


def a_layout(*, page_size: int = 16) -> CacheLayout:
    pool = kv_pool(range(2), pages=4, page_size=page_size, heads=2, head_bytes=64, dtype="float32")
    regions = (Region(1 << 40, pool_bytes(pool)), Region(1 << 41, 64))
    return CacheLayout("model", regions, (pool, aux_pool(slots=1, slot_bytes=64, region=1)))


def test_it_is_the_last_region_and_sized_by_the_pages() -> None:
    layout, owner = with_staging(a_layout(), None)
    assert owner is not None
    layout.validate()
    assert layout.staging is not None
    assert layout.staging.slot_bytes == STAGING_SLOT_BYTES["DRAM"]
    assert layout.staging.slots == STAGING_BYTES["DRAM"] // STAGING_SLOT_BYTES["DRAM"]
    region = layout.regions[layout.staging.region]
    assert (region.address % ALIGNMENT_BYTES, region.length) == (0, STAGING_BYTES["DRAM"])


def test_a_slot_holds_the_largest_page_of_all_layers() -> None:
    layout, _ = with_staging(a_layout(page_size=(1 << 14) + 1), 40 * MIB)
    page = 2 * 2 * ((1 << 14) + 1) * 2 * 64
    assert layout.staging is not None
    assert layout.staging.slot_bytes == -(-page // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    assert layout.staging.slots == 40 * MIB // layout.staging.slot_bytes


def test_what_cannot_be_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="at least 4 MiB"):
        with_staging(a_layout(), MIB)
    with pytest.raises(ConfigError, match="of its own"):
        with_staging(with_staging(a_layout(), None)[0], None)
    slots = CacheLayout("m", (Region(1 << 41, 64),), (aux_pool(slots=1, slot_bytes=64, region=0),))
    with pytest.raises(ConfigError, match="no pages"):
        with_staging(slots, None)


def test_a_manager_makes_it(make_rank: MakeRank) -> None:
    layout = make_rank("prefill").layout
    with KVManager.open(layout, role="decode", backend="memory", staging_bytes=8 * MIB) as manager:
        assert manager.staging_slots_free == 2
        assert manager.layout.staging is not None
    with pytest.raises(ConfigError, match="at least 4 MiB"):
        KVManager.open(layout, role="decode", backend="memory", staging_bytes=1)


def test_all_ranks_of_a_launch_get_one_name_and_the_next_launch_another(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    ranks = [context.Process(target=_rank, args=(rank, str(tmp_path / "store"), told)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    first, second = [told.get(timeout=120) for _ in ranks]
    for rank in ranks:
        rank.join()
    assert first == second
    assert len(set(first)) == 2, "each launch has a name of its own"
    with pytest.raises(ConfigError, match="needs torch"):
        launch_id()


def _rank(rank: int, store: str, told: Queue[list[str]]) -> None:
    """Two launches of a group, for which one process each is enough."""
    import torch.distributed as distributed

    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    told.put([launch_id(), launch_id()])
    distributed.destroy_process_group()

"""Gather and scatter on a device, against torch's own indexed copy and a plain copy of the same bytes."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import numpy as np
import torch

from kvbaton.errors import KVBatonError
from kvbaton.plan.pair import pair_plan
from kvbaton.runtime.gather import gather, scatter
from lab.gpu.pool import HEAD_BYTES, HEADS, LAYERS, PAGE_SIZE, Device, DevicePool, content, make_pool
from lab.gpu.transfer import ROUNDS, SEED, shuffled


def check_kernels(device: Device, pages: int) -> dict[str, object]:
    """Half the heads of half the pages into a block and back. Raises KVBatonError where a byte differs."""
    pool, half = make_pool(device, pages), make_pool("cpu", pages, tp_size=2)
    pool.memory.copy_(content(pages, seed=SEED).view(-1))
    part = pair_plan(pool.layout, half.layout).parts[0]
    units = np.array(shuffled(pages // 2, pages, 5), dtype=np.int64)
    blocks = part.source_blocks(range(len(units)), units, 0)
    slot = torch.zeros(len(units) * part.block_bytes, dtype=torch.uint8, device=device)
    before = pool.memory.clone()
    gathered = _seconds(device, lambda: gather(part.source_lanes, blocks, slot.data_ptr()))
    scattered = _seconds(device, lambda: scatter(part.source_lanes, blocks, slot.data_ptr()))
    if not torch.equal(before, pool.memory):
        raise KVBatonError("what was gathered and scattered to where it came from differs")
    index = torch.from_numpy(units).to(device)
    counts = [torch.bincount(found.flatten(), minlength=256) for found in (_half_of(pool, index), slot)]
    if not torch.equal(*counts):
        raise KVBatonError("the gathered bytes are not those of the heads")
    reference = _seconds(device, lambda: _half_of(pool, index))
    target = torch.empty_like(slot)
    copied = _seconds(device, lambda: target.copy_(slot))
    moved = 2 * slot.numel()  # read and written
    return {
        "bytes": slot.numel(),
        "gather_gb_s": moved / gathered / 1e9,
        "scatter_gb_s": moved / scattered / 1e9,
        "index_select_gb_s": moved / reference / 1e9,
        "copy_gb_s": moved / copied / 1e9,
        "ratios": {"gather/copy": gathered / copied, "scatter/copy": scattered / copied},
    }


def _half_of(pool: DevicePool, index: Any) -> Any:
    """The first half of the heads of some pages, by torch's own indexing, in an order of its own."""
    view = pool.page_view().view(2 * LAYERS, -1, PAGE_SIZE, HEADS, HEAD_BYTES)
    return view[:, :, :, : HEADS // 2].index_select(1, index)


def _seconds(device: Device, work: Any) -> float:
    times = []
    for _ in range(ROUNDS + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times[1:])

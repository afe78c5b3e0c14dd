"""A pool in memory of a device (or of the host, for a dry run), with content that both processes can compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvbaton.layout import CacheLayout, Coordinates, Region, Staging, kv_pool

Device = Literal["cpu", "cuda"]

LAYERS, HEADS, HEAD_BYTES, PAGE_SIZE = 8, 8, 256, 16
#: Bytes of a page, all layers, K and V, all heads: 512 KiB.
PAGE_BYTES = LAYERS * 2 * HEADS * HEAD_BYTES * PAGE_SIZE
#: Slots enough for all that a check moves at once, 256 MiB and what is being sent.
STAGING_SLOTS, SLOT_BYTES = 24, 16 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class DevicePool:
    """``memory``: uint8 ``[layers, K and V, pages, tokens, heads of this rank, bytes]`` (NHD: unequal TP then moves
    short lanes). ``staging``: memory of the staging slots, on the same device."""

    memory: Any
    staging: Any
    layout: CacheLayout

    def page_view(self) -> Any:
        """``[layers * 2, pages, bytes of a page and tensor]``, sharing memory."""
        pages = self.layout.pools[0].units
        return self.memory.view(LAYERS * 2, pages, -1)


def make_pool(device: Device, pages: int, *, tp_size: int = 1, tp_rank: int = 0) -> DevicePool:
    """Zeros. Raises LayoutError."""
    memory = torch.zeros(pages * PAGE_BYTES // tp_size, dtype=torch.uint8, device=device)
    staging = torch.zeros(STAGING_SLOTS * SLOT_BYTES, dtype=torch.uint8, device=device)
    pool = kv_pool(
        range(LAYERS),
        pages=pages,
        page_size=PAGE_SIZE,
        heads=HEADS,
        head_bytes=HEAD_BYTES,
        dtype="uint8",
        order="NHD",
        tp_size=tp_size,
        tp_rank=tp_rank,
    )
    kind: Literal["VRAM", "DRAM"] = "VRAM" if device == "cuda" else "DRAM"
    regions = tuple(Region(tensor.data_ptr(), tensor.numel(), kind, 0) for tensor in (memory, staging))
    layout = CacheLayout("gpu-check", regions, (pool,), Staging(1, SLOT_BYTES, STAGING_SLOTS))
    return DevicePool(memory=memory, staging=staging, layout=layout)


def content(pages: int, *, seed: int) -> Any:
    """Random bytes of all pages and all heads, ``[layers * 2, pages, tokens, heads, bytes]``, in memory of the host."""
    generator = torch.Generator().manual_seed(seed)
    shape = (LAYERS * 2, pages, PAGE_SIZE, HEADS, HEAD_BYTES)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def heads_of(whole: Any, coordinates: Coordinates, tp_size: int) -> Any:
    """What one rank holds of :func:`content`."""
    width = HEADS // tp_size
    return whole[:, :, :, coordinates.tp * width : (coordinates.tp + 1) * width].contiguous()

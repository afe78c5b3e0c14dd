"""A soak as a small SVG: one column for each half, one row for each quantity. No library, so that it runs anywhere."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from lab.soak.config import SoakConfig
from lab.soak.run import Half, Sample

WIDTH, HEIGHT, GAP, LEFT, TOP = 380, 78, 30, 62, 44
#: Title of a row, and what it shows of a sample.
ROWS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("memory, MiB", ("rss_kib",)),
    ("blocks that Python holds", ("python_blocks",)),
    ("threads", ("threads",)),
    ("file descriptors", ("fds",)),
    ("registered regions", ("transport_regions",)),
    ("tombstones", ("tombstones",)),
    ("live rooms, writes, peers", ("rooms", "transfers", "writes", "sessions", "transport_peers")),
)


def svg(config: SoakConfig, halves: Sequence[Half]) -> str:
    width = LEFT + len(halves) * (WIDTH + LEFT)
    height = TOP + len(ROWS) * (HEIGHT + GAP) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="11" fill="#333"><rect width="{width}" height="{height}" fill="#fff"/>'
    ]
    for column, half in enumerate(halves):
        x = LEFT + column * (WIDTH + LEFT)
        parts.append(
            f'<text x="{x}" y="18" font-size="13" font-weight="bold">{half.survivor} lives, its peer dies '
            f"{half.restarts} times ({half.samples[-1].rooms:,} rooms, {half.seconds:.0f} s)</text>"
        )
        for row, (title, names) in enumerate(ROWS):
            parts.append(_panel(x, TOP + row * (HEIGHT + GAP), title, names, half.samples, config.warmup))
    return "\n".join([*parts, "</svg>\n"])


def _value(sample: Sample, names: Sequence[str]) -> float:
    total = float(sum(sample.sizes.get(name, 0) for name in names))
    return total / 1024 if names == ("rss_kib",) else total


def _panel(x: int, y: int, title: str, names: Sequence[str], samples: Sequence[Sample], warmup: float) -> str:
    values = [_value(sample, names) for sample in samples]
    top, last = max(*values, 1.0) * 1.1, samples[-1].rooms
    scale_x, scale_y = WIDTH / last, HEIGHT / top
    points = " ".join(
        f"{x + sample.rooms * scale_x:.1f},{y + HEIGHT - value * scale_y:.1f}"
        for sample, value in zip(samples, values, strict=True)
    )
    restarts = [after.rooms for before, after in itertools.pairwise(samples) if after.restarts > before.restarts]
    ticks = "".join(
        f'<line x1="{x + at * scale_x:.1f}" x2="{x + at * scale_x:.1f}" y1="{y}" y2="{y + HEIGHT}" stroke="#e8b0a0"/>'
        for at in restarts
    )
    return (
        f'<rect x="{x}" y="{y}" width="{warmup * WIDTH:.1f}" height="{HEIGHT}" fill="#f3f3f3"/>'
        f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#bbb"/>{ticks}'
        f'<polyline points="{points}" fill="none" stroke="#2060a0" stroke-width="1.5"/>'
        f'<text x="{x}" y="{y - 4}">{title}</text>'
        f'<text x="{x - 4}" y="{y + 9}" text-anchor="end">{top:,.0f}</text>'
        f'<text x="{x - 4}" y="{y + HEIGHT}" text-anchor="end">0</text>'
        f'<text x="{x + WIDTH}" y="{y + HEIGHT + 12}" text-anchor="end">{last:,} rooms</text>'
    )

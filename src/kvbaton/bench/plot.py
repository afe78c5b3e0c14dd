"""The staging grid as a picture: what a room costs over the length of its runs, one panel for each room size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from kvbaton.bench.staging import Point

#: Attribute of a point, label, style.
_LINES = (
    ("direct_seconds", "direct: a descriptor for each run", {"color": "#c04020", "marker": "o"}),
    ("staged_seconds", "staged: gather, one write, scatter", {"color": "#2060a0", "marker": "s"}),
    ("equal_seconds", "equal TP: the same bytes, no runs", {"color": "#888", "linestyle": "--"}),
)


def save(points: Sequence[Point], path: Path) -> None:
    """Write the picture to ``path`` (.svg or .png). Rings: what the cost model picks."""
    pages = sorted({point.pages for point in points})
    figure = Figure(figsize=(4.2 * len(pages), 3.8), layout="constrained")
    for panel, count in zip(figure.subplots(1, len(pages), sharey=True, squeeze=False)[0], pages, strict=True):
        here = sorted((p for p in points if p.pages == count), key=lambda p: p.run_bytes)
        runs = [point.run_bytes for point in here]
        for name, label, style in _LINES:
            panel.plot(runs, [getattr(p, name) * 1e3 for p in here], label=label, markersize=4, **style)
        picked = [(p.staged_seconds if p.prefers_staging else p.direct_seconds) * 1e3 for p in here]
        panel.plot(runs, picked, "o", markersize=10, fillstyle="none", color="#208040", label="the cost model's choice")
        panel.set(xscale="log", yscale="log", xlabel="bytes of a run", title=f"{count} pages of 64 tokens")
        panel.set_xticks(runs, [str(run) for run in runs], rotation=60)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    figure.axes[0].set_ylabel("ms of a room, TP 4 to 1, tokens outermost")
    figure.axes[0].legend(fontsize=7)
    with mpl.rc_context({"svg.hashsalt": "kvbaton", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)

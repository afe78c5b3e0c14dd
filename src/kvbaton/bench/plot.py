"""Figures as pictures: what a room costs over the length of its runs, and beside others that are open."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from kvbaton.bench.open_rooms import Beside
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
        title = f"{count} {'page' if count == 1 else 'pages'} of {here[0].page_size} tokens"
        panel.set(xscale="log", yscale="log", xlabel="bytes of a run", title=title)
        panel.set_xticks(runs, [str(run) for run in runs], rotation=60)
        panel.minorticks_off()
        label_decades(panel.yaxis)
        panel.grid(alpha=0.3)
    outermost = "tokens" if points[0].interior == "NHD" else "heads"
    figure.axes[0].set_ylabel(f"ms of a room, TP 4 to 1, {outermost} outermost")
    figure.axes[0].legend(fontsize=7)
    write(figure, path)


def save_open_rooms(found: Sequence[Beside], path: Path) -> None:
    """Write the picture of one small room beside open ones to ``path`` (.svg or .png)."""
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    times, waiting = figure.subplots(1, 2)
    opened = [one.open for one in found]
    for name, label, style in (
        ("kvbaton", "kvbaton", {"color": "#2060a0", "marker": "s"}),
        ("leanest", "leanest loop", {"color": "#888", "linestyle": "--"}),
    ):
        times.plot(opened, [1e3 * (one.result.median(name) or 0.0) for one in found], label=label, **style)
    waiting.plot(opened, [100 * one.waiting_cpu for one in found], color="#c04020", marker="o")
    times.set(ylabel="ms of a room of 131 kB", ylim=(0, None))
    waiting.set(ylabel="% of a core, decode waiting", ylim=(0, None))
    times.legend(fontsize=7)
    for panel in (times, waiting):
        panel.set(xscale="symlog", xlabel="rooms that are open and wait", xlim=(-0.2, 2 * max(opened)))
        panel.set_xticks(opened, [f"{count:,}" for count in opened])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    write(figure, path)


def label_decades(axis: Axis) -> None:
    """Ticks at 1, 2 and 5 of each decade of a logarithmic axis, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter("{x:g}")


def write(figure: Figure, path: Path) -> None:
    """The same picture gives the same bytes."""
    with mpl.rc_context({"svg.hashsalt": "kvbaton", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)

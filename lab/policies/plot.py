"""The comparison of policies as a picture: hit rate, throughput, skew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from matplotlib.figure import Figure

from kvbaton.bench.plot import write
from lab.policies.campaign import Measured

_COLOURS = ("#2060a0", "#c08020")


def save(found: Sequence[Measured], path: Path) -> None:
    """Write the picture to ``path`` (.svg or .png). Bars: medians; strokes: each round."""
    loads = list(dict.fromkeys(one.workload for one in found))
    policies = list(dict.fromkeys(one.policy for one in found))
    panels: dict[str, Callable[[Measured, Measured], list[float]]] = {
        "prompt tokens found in decode's cache, %": lambda one, _: [100 * share for share in one.hits],
        "requests/s, over round_robin": lambda one, first: [a / b for a, b in zip(one.rates, first.rates, strict=True)],
        "busiest decode server, over the mean": lambda one, _: one.skews,
    }
    figure = Figure(figsize=(11.0, 3.6), layout="constrained")
    for panel, (title, figures) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for number, load in enumerate(loads):
            rows = {one.policy: one for one in found if one.workload == load}
            for place, policy in enumerate(policies):
                values = figures(rows[policy], rows[policies[0]])
                at = place + 0.4 * (number - (len(loads) - 1) / 2)
                label = load if place == 0 else None
                panel.bar(at, median(values), width=0.38, color=_COLOURS[number % len(_COLOURS)], label=label)
                panel.plot([at] * len(values), values, "_", color="#222", markersize=7)
        panel.set_xticks(range(len(policies)), policies, rotation=30, fontsize=8)
        panel.set_title(title, fontsize=9)
        panel.grid(axis="y", alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    write(figure, path)

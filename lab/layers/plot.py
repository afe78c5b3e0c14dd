"""Time to the first token and exposed hand-off, with layers ahead and without, over the length of the prompt: a column
for each share that moving has of computing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from kvbaton.bench.plot import label_decades, write
from lab.layers.case import WAYS, Case

_STYLES = {"without": {"color": "#c04020", "marker": "o"}, "ahead": {"color": "#2060a0", "marker": "s"}}


def save(cases: Sequence[Case], path: Path) -> None:
    """Write the picture to ``path`` (.svg or .png)."""
    shares = sorted({_share(case) for case in cases})
    figure = Figure(figsize=(4.2 * len(shares), 6.0), layout="constrained")
    panels = figure.subplots(2, len(shares), squeeze=False)
    for column, share in enumerate(shares):
        here = [case for case in cases if _share(case) == share]
        tokens = [case.tokens for case in here]
        medians = list(zip(*(case.milliseconds() for case in here), strict=True))
        for row, name in enumerate(("time to the first token", "exposed hand-off")):
            panel = panels[row][column]
            for way, values in zip(WAYS, medians[2 * row : 2 * row + 2], strict=True):
                label = "layers ahead" if way == "ahead" else "whole chunk"
                panel.plot(tokens, values, label=label, markersize=4, **_STYLES[way])
            panel.set(xscale="log", yscale="log", xlabel="tokens of a prompt, one chunk", ylabel=f"{name}, ms")
            panel.set_xticks(tokens, [str(count) for count in tokens])
            panel.minorticks_off()
            label_decades(panel.yaxis)
            panel.grid(alpha=0.3)
        panels[0][column].set_title(f"moving takes {share:g} of computing")
    panels[0][0].legend(fontsize=8)
    write(figure, path)


def _share(case: Case) -> float:
    return round(case.moving / case.computing, 1)

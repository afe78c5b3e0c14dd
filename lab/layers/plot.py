"""Time to the first token and exposed hand-off, with layers ahead and without, over the length of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from lab.layers.case import WAYS, Case

_STYLES = {"without": {"color": "#c04020", "marker": "o"}, "ahead": {"color": "#2060a0", "marker": "s"}}


def save(cases: Sequence[Case], path: Path) -> None:
    """Write the picture to ``path`` (.svg or .png)."""
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    tokens = [case.tokens for case in cases]
    medians = list(zip(*(case.milliseconds() for case in cases), strict=True))
    for number, title in enumerate(("time to the first token", "exposed hand-off")):
        panel = panels[number]
        for way, values in zip(WAYS, medians[2 * number : 2 * number + 2], strict=True):
            label = "layers ahead" if way == "ahead" else "whole chunk"
            panel.plot(tokens, values, label=label, markersize=4, **_STYLES[way])
        panel.set(xscale="log", yscale="log", xlabel="tokens of a prompt, one chunk", ylabel="ms", title=title)
        panel.set_xticks(tokens, [str(count) for count in tokens])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    with mpl.rc_context({"svg.hashsalt": "kvbaton", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)

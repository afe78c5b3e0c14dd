"""Which cells of the transition table runs have reached, and a heat map of it: SVG, written by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from pathlib import Path

from kvbaton.errors import ConfigError
from kvbaton.protocol.table import TABLE, Ignored, Illegal

_CELL, _ROW, _LEFT, _TOP = 46, 26, 96, 128


def cell(state: object, on: object) -> str:
    """A cell's name, as cores count it."""
    return f"{state.value}:{on.value}"  # type: ignore[attr-defined]


def legal_cells() -> list[str]:
    """Every cell that a correct world can reach."""
    return [cell(s, on) for s, rules in TABLE.items() for on, rule in rules.items() if not isinstance(rule, Illegal)]


def never_reached(cells: Mapping[str, int]) -> list[str]:
    return [name for name in legal_cells() if not cells.get(name)]


def forbidden_but_reached(cells: Mapping[str, int]) -> list[str]:
    legal = set(legal_cells())
    return [name for name, count in cells.items() if count and name not in legal]


def write_plot(path: Path, cells: Mapping[str, int], caption: str) -> None:
    """States × events as ``.svg``, or as a page of its own as ``.html``.

    Raises:
        ConfigError: the file is neither.
    """
    drawing = svg(cells, caption)
    if path.suffix == ".svg":
        path.write_text(drawing, encoding="utf-8")
    elif path.suffix in (".html", ".htm"):
        page = f"<!doctype html><meta charset=utf-8><title>kvbaton sim</title><body>{drawing}</body>\n"
        path.write_text(page, encoding="utf-8")
    else:
        raise ConfigError(f"cannot plot to {path.name}: use a name that ends in .html or .svg")


def svg(cells: Mapping[str, int], caption: str) -> str:
    """The heat map: how often each cell was reached, on a logarithmic scale; grey cells cannot be."""
    states = list(TABLE)
    events = list(dict.fromkeys(on for rules in TABLE.values() for on in rules))
    most = max([*cells.values(), 2])
    width, height = _LEFT + _CELL * len(events) + 16, _TOP + _ROW * len(states) + 36
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="8" y="18" font-size="13" fill="#222">{escape(caption)}</text>',
    ]
    for column, on in enumerate(events):
        x = _LEFT + column * _CELL + _CELL // 2
        lines.append(f'<text transform="translate({x},{_TOP - 8}) rotate(-50)" fill="#222">{escape(on.value)}</text>')
    for row, state in enumerate(states):
        y = _TOP + row * _ROW
        lines.append(f'<text x="{_LEFT - 8}" y="{y + 17}" text-anchor="end" fill="#222">{escape(state.value)}</text>')
        for column, on in enumerate(events):
            rule = TABLE[state].get(on)
            count = cells.get(cell(state, on), 0)
            lines.append(_square(_LEFT + column * _CELL, y, count, most, rule, f"{state.value}: {on.value}"))
    lines.append(
        f'<text x="8" y="{height - 10}" fill="#555">grey: illegal, never reached · white: legal, never reached · '
        "darker: reached more often (log) · italic: ignored with a reason</text>"
    )
    return "\n".join([*lines, "</svg>", ""])


def _square(x: int, y: int, count: int, most: int, rule: object, title: str) -> str:
    style = ""
    if count:
        heat = math.log1p(count) / math.log1p(most)
        fill = f"rgb({int(232 - 200 * heat)},{int(241 - 140 * heat)},{int(250 - 90 * heat)})"
        ink = "white" if heat > 0.6 else "#222"
        style = ' font-style="italic"' if isinstance(rule, Ignored) else ""
    elif isinstance(rule, Illegal) or rule is None:
        fill, ink = "#dddddd", "#999"
    else:
        fill, ink = "#ffffff", "#c00"
    label = _short(count) if count else ("" if fill == "#dddddd" else "0")
    return (
        f'<g><title>{escape(title)}: {count}</title><rect x="{x}" y="{y}" width="{_CELL - 2}" height="{_ROW - 2}" '
        f'fill="{fill}" stroke="#ccc"/><text x="{x + _CELL // 2 - 1}" y="{y + 16}" text-anchor="middle" '
        f'font-size="10" fill="{ink}"{style}>{label}</text></g>'
    )


def _short(count: int) -> str:
    for unit, name in ((1_000_000, "M"), (1_000, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return str(count)

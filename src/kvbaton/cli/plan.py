"""``kvbaton plan``: who would send what to whom, for a model and two topologies, before anything runs."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from kvbaton.cli.settings import positive
from kvbaton.errors import ConfigError
from kvbaton.explain.model import ELEMENT_BYTES, read_model
from kvbaton.explain.picture import draw, page, size
from kvbaton.explain.topology import Explanation, Flow, GroupSettings, explain, totals
from kvbaton.serving.models import builtin

if TYPE_CHECKING:
    from rich.table import Table

MOST_ROWS = 200
TABLE_COLUMNS = 140


def add_arguments(parser: argparse.ArgumentParser) -> None:
    settings = "tp=N,pp=N,page=TOKENS,order=HND|NHD,fusion=none|page|item, each optional"
    parser.add_argument("--source", default="tp=1", metavar="SETTINGS", help=f"the prefill side: {settings}")
    parser.add_argument("--target", default="tp=1", metavar="SETTINGS", help="the decode side, likewise")
    parser.add_argument("--model", default="recall", help="a directory with a config.json, or a bundled model")
    parser.add_argument("--page-size", type=positive, default=16, help="tokens per page, where a side does not say")
    parser.add_argument("--tokens", type=positive, default=1024, help="length of the prompt that is counted")
    parser.add_argument("--dtype", default="", choices=("", *ELEMENT_BYTES), help="of the cache; empty: the model's")
    parser.add_argument("--svg", type=Path, default=None, metavar="FILE", help="write the picture here")
    parser.add_argument("--html", type=Path, default=None, metavar="FILE", help="write picture and table here")
    parser.add_argument("--json", action="store_true", help="data on stdout instead of a table")


def run(options: argparse.Namespace) -> int:
    source = GroupSettings.parse(options.source, page_size=options.page_size)
    target = GroupSettings.parse(options.target, page_size=options.page_size)
    model = read_model(_directory(options.model), dtype=options.dtype)
    explanation = explain(model, source, target, tokens=options.tokens)
    if options.svg is not None:
        _write(options.svg, draw(explanation))
    if options.html is not None:
        _write(options.html, page(explanation, _as_text(explanation)))
    if options.json:
        sys.stdout.write(msgspec.json.encode(_data(explanation)).decode() + "\n")
    else:
        sys.stdout.write(_as_text(explanation))
    return 0


def _directory(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    try:
        return builtin(name)
    except ValueError as error:
        raise ConfigError(f"model {name!r} is no directory, and {error}") from None


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from None
    print(f"kvbaton plan: wrote {path}", file=sys.stderr)


def _data(explanation: Explanation) -> dict[str, object]:
    sums = totals(explanation.flows)
    return {
        "model": explanation.model.name,
        "tokens": explanation.tokens,
        "source": {"side": explanation.source_side, "ranks": [rank.name for rank in explanation.sources]},
        "target": {"side": explanation.target_side, "ranks": [rank.name for rank in explanation.targets]},
        "flows": explanation.flows,
        "writers": {rank.name: explanation.writers_of(t) for t, rank in enumerate(explanation.targets)},
        "bystanders": explanation.bystanders,
        "bytes_per_token": sums["token_bytes"],
        "bytes": sums["bytes"],
        "descriptors": sums["descriptors"],
        "descriptors_per_1k_tokens": round(sums["descriptors"] * 1024 / explanation.tokens, 1),
        "smallest_piece_bytes": sums["piece_bytes"],
    }


def _as_text(explanation: Explanation) -> str:
    try:
        from rich.console import Console
    except ModuleNotFoundError as error:
        raise ConfigError(f"the table needs the package {error.name!r}", hint="pip install 'kvbaton[serve]'") from None
    out = io.StringIO()
    console = Console(file=out, width=TABLE_COLUMNS, force_terminal=False, highlight=False)
    console.print(_table(explanation))
    if len(explanation.flows) > MOST_ROWS:
        console.print(f"... and {len(explanation.flows) - MOST_ROWS} more parts (--json has all)")
    for line in _conclusions(explanation):
        console.print(line, markup=False)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _table(explanation: Explanation) -> Table:
    from rich.table import Table

    title = f"{explanation.model.name}: {explanation.source_side} -> {explanation.target_side}"
    table = Table(title=title, title_justify="left")
    for heading in ("from", "to", "part"):
        table.add_column(heading)
    for heading in ("bytes/token", f"{explanation.tokens} tokens", "descriptors", "smallest piece"):
        table.add_column(heading, justify="right")
    for flow in explanation.flows[:MOST_ROWS]:
        table.add_row(
            explanation.sources[flow.source].name,
            explanation.targets[flow.target].name,
            _part(flow),
            f"{flow.token_bytes:g}" if flow.token_bytes else "once",
            size(flow.bytes),
            f"{flow.descriptors:,}",
            size(flow.piece_bytes),
        )
    return table


def _part(flow: Flow) -> str:
    layers = "" if flow.layer_stop <= 0 else f" layers {flow.layer_start}..{flow.layer_stop - 1}"
    last = flow.item_stop - 1
    shown = f"item {last}" if flow.item_start == last else f"items {flow.item_start}..{last}"
    items = f" {shown} of {flow.items}" if flow.items > 1 else ""
    return f"{flow.pool}{layers}{items}"


def _conclusions(explanation: Explanation) -> list[str]:
    sums = totals(explanation.flows)
    per_1k = sums["descriptors"] * 1024 / explanation.tokens
    lines = [
        f"{sums['token_bytes']:,.0f} bytes per token; {size(sums['bytes'])} for {explanation.tokens} tokens; "
        f"{per_1k:,.0f} descriptors per 1k tokens of scattered pages, the smallest of {size(sums['piece_bytes'])}"
    ]
    for t, rank in enumerate(explanation.targets):
        names = ", ".join(explanation.sources[s].name.removeprefix("prefill ") for s in explanation.writers_of(t))
        lines.append(f"{rank.name} is written by {names}")
    idle = [explanation.sources[s].name.removeprefix("prefill ") for s in explanation.bystanders]
    lines.append(f"bystanders: {', '.join(idle)} (informed, so that they complete)" if idle else "bystanders: none")
    return lines

"""``python -m lab layers``: time to the first token with layers that go ahead of their chunk, and without."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from kvbaton.cli.settings import add_log_level, positive
from kvbaton.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lab.layers.case import Case


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=positive, nargs="+", default=[512, 1024, 2048, 4096], help="prompt lengths")
    parser.add_argument("--rounds", type=positive, default=7, help="measured rounds, after one that warms up")
    parser.add_argument("--threads", type=positive, default=1, help="threads that each engine computes with")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the engines compute")
    parser.add_argument("--network", default="tcp", help="UCX_TLS of all engines; empty: UCX's choice")
    parser.add_argument("--layers", type=positive, default=16, help="layers of the model")
    parser.add_argument("--hidden", type=positive, default=64, help="its width: what a token costs to compute")
    parser.add_argument(
        "--head", type=positive, default=64, help="elements of each of its 8 heads: what a token weighs"
    )
    parser.add_argument(
        "--accelerator",
        type=float,
        nargs="+",
        default=None,
        metavar="SHARE",
        help="computing is a pause, so long that moving takes these shares of it",
    )
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write every round here")
    parser.add_argument("--plot", type=Path, default=None, metavar="FILE", help="write a picture here, .svg or .png")
    add_log_level(parser)


def run(options: argparse.Namespace) -> int:
    """Rows on stdout are a table of Markdown."""
    try:
        from rich.console import Console
    except ModuleNotFoundError as error:
        raise ConfigError(f"layers needs the package {error.name!r}", hint="pip install 'kvbaton[serve]'") from None
    from lab.layers import accelerator, measure

    console = Console(stderr=True)
    with console.status("starting") as status:
        common = {"rounds": options.rounds, "network": options.network, "progress": status.update}
        if options.accelerator is not None:
            cases = accelerator.measure(options.tokens, options.accelerator, layers=options.layers, **common)
        else:
            width = measure.Width(layers=options.layers, hidden=options.hidden, head=options.head)
            cases = measure.measure(options.tokens, width, threads=options.threads, device=options.device, **common)
    _print(cases)
    if options.json is not None:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(cases)))
    if options.plot is not None:
        from lab.layers.plot import save

        save(cases, options.plot)
    return 0


def _print(cases: Sequence[Case]) -> None:
    heads = ["tokens", "MB", "moving ms", "computing ms", "first token, whole ms", "ahead ms", "ratio"]
    heads += ["exposed, whole ms", "ahead ms", "CPU, whole ms", "ahead ms", "writes"]
    sys.stdout.write(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|\n")
    for case in cases:
        first, ahead, *others = (f"{time:.1f}" for time in case.milliseconds())
        sizes = (f"{case.tokens}", f"{case.bytes / 1e6:.1f}", f"{case.moving * 1e3:.1f}", f"{case.computing * 1e3:.1f}")
        writes = f"{case.writes['without']}, {case.writes['ahead']}"
        row = (*sizes, first, ahead, f"{case.ratio:.2f}", *others, writes)
        sys.stdout.write(f"| {' | '.join(row)} |\n")

"""``python -m lab gpu``: what only a GPU shows, on any machine with one; ``tools/gpu_check`` on a bare one."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import msgspec

from kvbaton.cli.signals import exit_on_sigterm

#: Where ``--pack`` puts the wheels, and ``tools/gpu_check`` looks for them.
WHEELS = Path("build/gpu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run, in host memory")
    parser.add_argument("--check", action="append", default=None, metavar="NAME", help="only this one; may be repeated")
    parser.add_argument("--only", default="", metavar="NAME", help="this one, here; its result as a line of JSON")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the report here as well")
    parser.add_argument("--pack", action="store_true", help=f"fetch what a bare machine lacks into {WHEELS}, and end")


def run(options: argparse.Namespace) -> int:
    exit_on_sigterm()
    if options.pack:
        from lab.gpu.pack import pack

        print(f"{pack(WHEELS):,} bytes of wheels in {WHEELS}")
        return 0
    from kvbaton.errors import ConfigError
    from lab.gpu.checks import CHECKS, run_apart, run_here

    names = [options.only] if options.only else options.check or list(CHECKS)
    for name in names:
        if name not in CHECKS:
            raise ConfigError(f"--check {name}: there are {', '.join(CHECKS)}")
    if options.only:
        result = run_here(options.only, options.device)
        sys.stdout.write(msgspec.json.encode(result).decode() + "\n")
        return 0
    start, results = time.perf_counter(), []
    for result in run_apart(names, options.device):
        print(f"{result.check}: {'ok' if result.ok else result.error}", file=sys.stderr, flush=True)
        results.append(result)
    report = msgspec.json.format(
        msgspec.json.encode({"seconds": time.perf_counter() - start, "results": results}), indent=2
    )
    sys.stdout.write(report.decode() + "\n")
    if options.json is not None:
        options.json.write_bytes(report)
    return 0 if all(result.ok for result in results) else 1

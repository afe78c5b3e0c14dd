"""``python -m lab wheel``: build the wheel, install it in an empty environment, run the first example there."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="data on stdout instead of lines")


def run(options: argparse.Namespace) -> int:
    from lab.wheel import BrokenWheel, examine

    try:
        report = examine()
    except BrokenWheel as error:
        print(error, file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(dataclasses.asdict(report)))
        return 1 if report.faults else 0
    print(f"{report.name}: {report.size_bytes:,} bytes in {report.files} files; needs {', '.join(report.needs)}")
    print(f"import kvbaton: {report.import_seconds:.3f} s; examples/handoff.py memory: {report.example}")
    for fault in report.faults:
        print(f"fault: {fault}", file=sys.stderr)
    return 1 if report.faults else 0

"""``python -m lab docs``: what is generated in the documents; nobody edits it by hand."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from lab.docs import fields, flags, mutants, protocol, readme

#: page → its text with its generated parts as they should be, of its text as it is.
GENERATED: dict[Path, Callable[[str], str]] = {
    flags.PAGE: flags.rewritten,
    fields.PAGE: fields.rewritten,
    protocol.PAGE: protocol.rewritten,
    mutants.PAGE: mutants.rewritten,
    readme.PAGE: readme.rewritten,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a page is out of date")


def run(options: argparse.Namespace) -> int:
    code = 0
    for path, rewritten in GENERATED.items():
        page = path.read_text(encoding="utf-8")
        wanted = rewritten(page)
        if page == wanted:
            continue
        if options.check:
            print(f"{path.name} is out of date\nhint: make docs", file=sys.stderr)
            code = 1
        else:
            path.write_text(wanted, encoding="utf-8")
    return code

"""``kvbaton layout RANK...``: the memory of running ranks as a layout file, for ``kvbaton check``.

A rank is named by its control address, whatever engine it serves: vLLM and SGLang log it at the start, and a vLLM
prefill server lists those of all its ranks in ``kv_transfer_params.kvbaton_sources``. Or the URL of one of our servers.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kvbaton.cli.check import load
from kvbaton.discovery.access import read_secret
from kvbaton.plan.layout_file import encode


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "rank", metavar="RANK", nargs="+", help="tcp://HOST:PORT of each rank of one group, or a server's URL"
    )
    parser.add_argument("--secret-file", type=Path, default=None, help="shared secret; needed where the ranks have one")
    parser.add_argument("--output", type=Path, default=None, metavar="FILE", help="write it there instead of stdout")


def run(options: argparse.Namespace) -> int:
    secret = read_secret(options.secret_file) if options.secret_file is not None else None
    payload = encode(load(",".join(options.rank), secret))
    if options.output is not None:
        options.output.write_bytes(payload + b"\n")
    else:
        sys.stdout.write(payload.decode() + "\n")
    return 0

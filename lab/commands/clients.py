"""``python -m lab clients``: clients of others, their own code, in front of our servers."""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
from pathlib import Path

import msgspec

from kvbaton.cli.settings import positive
from kvbaton.cli.signals import exit_on_sigterm
from lab.clients.row import PARTS, Row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object a row on stdout")
    parser.add_argument("--only", action="append", choices=PARTS, help="what to run, repeatable (default: all)")
    parser.add_argument(
        "--questions", type=positive, default=200, help="recall questions, of each router and of lm-eval"
    )
    parser.add_argument("--venv", type=Path, default=Path(".venv-clients"), help="the clients' environment")
    parser.add_argument("--vllm-venv", type=Path, default=Path(".venv-vllm"), help="that of `lab vllm`, if it is there")
    parser.add_argument(
        "--sglang-venv", type=Path, default=Path(".venv-sglang"), help="that of `lab sglang`, if it is there"
    )
    parser.add_argument("--promtool", default="promtool", help="Prometheus' tool, if it is there")
    parser.add_argument("--build", type=Path, default=Path("build/clients"), help="where logs go")


def run(options: argparse.Namespace) -> int:
    exit_on_sigterm()
    from lab.clients.campaign import Clients, perform
    from lab.clients.environment import interpreter, prepare

    clients = Clients(
        python=prepare(options.venv.absolute()),
        vllm=interpreter(options.vllm_venv.absolute()),
        sglang=interpreter(options.sglang_venv.absolute()),
        promtool=shutil.which(options.promtool),
    )
    for name, python in (("vLLM", clients.vllm), ("SGLang", clients.sglang)):
        if python is None:
            print(f"the benchmark of {name} is left out: its environment is not there", file=sys.stderr)
    if clients.promtool is None:
        print("promtool is left out: it is not there", file=sys.stderr)
    options.build.mkdir(parents=True, exist_ok=True)

    def tell(row: Row) -> None:
        if options.json:
            print(msgspec.json.encode(row).decode(), flush=True)
        mark = "ok  " if row.ok == row.asked else "FAIL"
        said = f": {row.said}" if row.said else ""
        line = f"{mark} {row.client}: {row.what}: {row.ok} of {row.asked} ({row.seconds:.0f} s){said}"
        print(line, file=sys.stderr, flush=True)

    build, parts = options.build.absolute(), options.only or PARTS
    rows = asyncio.run(perform(clients, build, count=options.questions, tell=tell, parts=parts))
    return 0 if rows and all(row.ok == row.asked for row in rows) else 1

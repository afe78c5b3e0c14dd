"""``kvbaton serve``: one model behind an OpenAI API: whole (null), or one half of a pair (prefill, decode)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import get_args

from kvbaton.cli.settings import (
    add_allowed_host,
    add_allowed_origin,
    add_api_keys,
    add_grace_period,
    add_log_level,
    add_strict_fields,
    config_of,
    natural,
    port,
    positive,
    seconds,
    transfer_costs,
)
from kvbaton.cli.signals import exit_on_sigterm
from kvbaton.discovery.placement import LoadBalance
from kvbaton.errors import ConfigError

DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _add_model(parser.add_argument_group("model"))
    _add_http(parser.add_argument_group("HTTP"))
    _add_engine(parser.add_argument_group("engine"))
    disaggregation = parser.add_argument_group("disaggregation")
    _add_disaggregation(disaggregation)
    _add_timeouts(disaggregation)
    _add_staging(disaggregation)
    disaggregation.add_argument(
        "--secret-file", type=Path, default=None, help="file with the shared secret; required beyond loopback"
    )
    add_log_level(parser)


def _add_model(model: argparse._ArgumentGroup) -> None:
    model.add_argument("--model", "--model-path", required=True, help="directory, hub id or bundled name of the model")
    model.add_argument("--served-model-name", default="", help="model name in the API; empty: that of --model")
    model.add_argument(
        "--trust-remote-code", action="store_true", help="run the code that a model directory or hub repository brings"
    )
    model.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="element type of weights and KV cache",
    )
    model.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="device of weights and KV cache")
    model.add_argument(
        "--tensor-parallel-size",
        "--tp-size",
        "--tp",
        type=positive,
        default=1,
        help="tensor-parallel ranks: they share each layer",
    )
    model.add_argument(
        "--pipeline-parallel-size",
        "--pp-size",
        "--pp",
        type=positive,
        default=1,
        help="pipeline stages: they share the layers",
    )
    model.add_argument(
        "--data-parallel-size",
        "--dp-size",
        "--dp",
        type=positive,
        default=1,
        help="data-parallel replicas of the engine behind this port, each with a KV pool of its own",
    )
    model.add_argument(
        "--load-balance-method",
        choices=("auto", *get_args(LoadBalance)),
        default="auto",
        help="how a request is given to a replica: by its room modulo their number, in turn, or to the one with the "
        "fewest requests; auto: follow_bootstrap_room on prefill, else total_requests",
    )
    model.add_argument("--torch-threads", type=positive, default=None, help="CPU threads of one forward pass")


def _add_http(http: argparse._ArgumentGroup) -> None:
    http.add_argument("--host", default="127.0.0.1", help="address that the HTTP server listens on")
    http.add_argument("--port", type=port, default=30000, help="port of the HTTP server; 0: any free one")
    add_allowed_host(http)
    add_allowed_origin(http)
    add_strict_fields(http)
    add_api_keys(http)
    add_grace_period(http)


def _add_engine(engine: argparse._ArgumentGroup) -> None:
    engine.add_argument("--page-size", type=positive, default=16, help="tokens of a page of the KV pool")
    engine.add_argument("--max-total-tokens", type=positive, default=16384, help="capacity of the KV pool in tokens")
    engine.add_argument(
        "--chunked-prefill-size", type=positive, default=512, help="most prompt tokens of one forward pass"
    )
    engine.add_argument("--max-running-requests", type=positive, default=32, help="most requests in one batch")


def _add_disaggregation(pd: argparse._ArgumentGroup) -> None:
    pd.add_argument(
        "--disaggregation-mode",
        choices=("null", "prefill", "decode"),
        default="null",
        help="role of this server; null: it prefills and decodes by itself",
    )
    pd.add_argument(
        "--disaggregation-transfer-backend",
        choices=("nixl", "memory"),
        default="nixl",
        help="data plane of the hand-off; memory: between processes of one host",
    )
    pd.add_argument(
        "--disaggregation-bootstrap-host",
        default="",
        help="address that prefill's registry and control links listen on; empty: --host",
    )
    pd.add_argument("--disaggregation-bootstrap-port", type=port, default=8998, help="port of prefill's registry")
    pd.add_argument(
        "--disaggregation-bootstrap-allow",
        action="append",
        metavar="HOST[:PORT]",
        help="registry that decode may look prefill ranks up in, repeatable (default: those on loopback)",
    )
    pd.add_argument(
        "--disaggregation-control-port",
        type=port,
        default=0,
        help="port of the control links; rank r listens r ports above it; 0: any free one",
    )
    pd.add_argument(
        "--disaggregation-control-advertise",
        default="",
        metavar="tcp://IP:PORT",
        help="address of the control links as decode reaches it, if they listen on another (--host 0.0.0.0, address "
        "translation); port 0: the one that is bound",
    )
    pd.add_argument(
        "--disaggregation-decode-enable-radix-cache",
        action="store_true",
        help="keep a prefix cache on decode; only what follows the prefix is transferred",
    )


def _add_timeouts(pd: argparse._ArgumentGroup) -> None:
    pd.add_argument(
        "--disaggregation-handshake-timeout",
        type=seconds,
        default=10.0,
        help="seconds until a dialled peer must have completed the handshake",
    )
    pd.add_argument(
        "--disaggregation-bootstrap-timeout",
        type=seconds,
        default=120.0,
        help="seconds until both sides must have opened a room",
    )
    pd.add_argument(
        "--disaggregation-waiting-timeout",
        type=seconds,
        default=300.0,
        help="seconds that an open room may go without progress",
    )
    pd.add_argument(
        "--disaggregation-heartbeat-interval",
        type=seconds,
        default=5.0,
        help="seconds between heartbeats; a peer that misses two is lost",
    )


def _add_staging(pd: argparse._ArgumentGroup) -> None:
    pd.add_argument(
        "--staging",
        choices=("auto", "always", "never"),
        default="auto",
        help="gather small blocks into one write through a staging buffer: by the cost model, always, or never",
    )
    pd.add_argument(
        "--staging-mib",
        type=natural,
        default=None,
        help="size of the staging buffer of each rank in MiB; 0: none (default: 64, on a GPU 256; at least a slot)",
    )
    pd.add_argument(
        "--staging-slot-bytes",
        type=natural,
        default=0,
        help="size of a staging slot, equal on both sides; 0: the largest page or state, and at least 4 MiB",
    )
    pd.add_argument(
        "--layers-ahead",
        choices=("auto", "always", "never"),
        default="auto",
        help="prefill hands over layers of a chunk while it computes the others: by the cost model, always, or never",
    )
    pd.add_argument(
        "--transfer-costs",
        type=Path,
        default=None,
        metavar="FILE",
        help="cost model of what is auto, written by `kvbaton bench calibrate`; none: the default one",
    )


def run(options: argparse.Namespace) -> int:
    exit_on_sigterm()
    try:
        from kvbaton.serving.server.launch import ServeConfig, serve
    except ModuleNotFoundError as error:
        raise ConfigError(f"serving needs the package {error.name!r}", hint="pip install 'kvbaton[serve]'") from None
    options.transfer_costs = transfer_costs(options.transfer_costs)
    config = config_of(ServeConfig, options)
    serve(config, listening=lambda bound: _announce(options.host, bound, options.disaggregation_mode))
    return 0


def _announce(host: str, bound: int, mode: str) -> None:
    print(f"kvbaton serve: {mode} listens at http://{host}:{bound}", file=sys.stderr, flush=True)

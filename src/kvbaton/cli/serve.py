"""``kvbaton serve``: one model behind an OpenAI API: whole (null), or one half of a pair (prefill, decode)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import get_args

from kvbaton.cli.settings import add_log_level, config_of, natural, port, positive, seconds, transfer_costs
from kvbaton.cli.signals import exit_on_sigterm
from kvbaton.discovery.placement import LoadBalance
from kvbaton.errors import ConfigError

DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("--model", "--model-path", required=True, help="a directory, a bundled model, or a hub id")
    model.add_argument("--served-model-name", default="", help="the name clients use; empty: that of --model")
    model.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of weights and cache"
    )
    model.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where weights and cache live")
    model.add_argument(
        "--tensor-parallel-size", "--tp-size", type=positive, default=1, help="ranks that share each layer"
    )
    model.add_argument(
        "--pipeline-parallel-size", "--pp-size", type=positive, default=1, help="stages that share the layers"
    )
    model.add_argument(
        "--data-parallel-size", "--dp-size", type=positive, default=1, help="copies of all that, each with its own pool"
    )
    model.add_argument(
        "--load-balance-method",
        choices=("auto", *get_args(LoadBalance)),
        default="auto",
        help="which copy a request goes to: the room modulo their number, each in turn, or the one with the fewest "
        "requests; auto: the first on prefill, else the last",
    )
    model.add_argument("--torch-threads", type=positive, default=None, help="threads of one forward pass")
    http = parser.add_argument_group("HTTP")
    http.add_argument("--host", default="127.0.0.1", help="where to listen")
    http.add_argument("--port", type=port, default=30000, help="where to listen")
    http.add_argument("--grace-period-secs", type=seconds, default=30.0, help="time to finish requests after SIGTERM")
    engine = parser.add_argument_group("engine")
    engine.add_argument("--page-size", type=positive, default=16, help="tokens per page")
    engine.add_argument("--max-total-tokens", type=positive, default=16384, help="tokens that the whole pool holds")
    engine.add_argument("--chunked-prefill-size", type=positive, default=512, help="prompt tokens per forward pass")
    engine.add_argument("--max-running-requests", type=positive, default=32, help="requests in one batch")
    pd = parser.add_argument_group("disaggregation")
    pd.add_argument("--disaggregation-mode", choices=("null", "prefill", "decode"), default="null", help="which half")
    pd.add_argument(
        "--disaggregation-transfer-backend", choices=("nixl", "memory"), default="nixl", help="how bytes travel"
    )
    pd.add_argument(
        "--disaggregation-bootstrap-host", default="", help="where prefill's registry listens; empty: --host"
    )
    pd.add_argument("--disaggregation-bootstrap-port", type=port, default=8998, help="where prefill's registry listens")
    pd.add_argument(
        "--disaggregation-bootstrap-allow",
        action="append",
        metavar="HOST[:PORT]",
        help="a registry that decode may ask, repeatable (default: loopback only)",
    )
    pd.add_argument(
        "--disaggregation-control-port", type=port, default=0, help="where this rank takes control links; 0: any"
    )
    pd.add_argument(
        "--disaggregation-control-advertise",
        default="",
        metavar="tcp://IP:PORT",
        help="where decode finds this rank's control port, if that is not where it listens (--host 0.0.0.0, address "
        "translation); port 0: as bound",
    )
    pd.add_argument(
        "--disaggregation-handshake-timeout", type=seconds, default=10.0, help="a dialled peer has answered by then"
    )
    pd.add_argument(
        "--disaggregation-bootstrap-timeout", type=seconds, default=120.0, help="both halves have met by then"
    )
    pd.add_argument(
        "--disaggregation-waiting-timeout", type=seconds, default=300.0, help="longest wait of a room for progress"
    )
    pd.add_argument(
        "--disaggregation-heartbeat-interval", type=seconds, default=5.0, help="two silent ones: the peer is lost"
    )
    pd.add_argument(
        "--disaggregation-decode-enable-radix-cache",
        action="store_true",
        help="decode keeps prefixes and asks only for what follows them",
    )
    pd.add_argument(
        "--staging",
        choices=("auto", "always", "never"),
        default="auto",
        help="whether small pieces travel together through a buffer: where that costs less, always, or never",
    )
    pd.add_argument(
        "--staging-mib",
        type=natural,
        default=None,
        help="that buffer's size on each rank; 0: none (default: 64, and at least one slot)",
    )
    pd.add_argument(
        "--staging-slot-bytes",
        type=natural,
        default=0,
        help="what travels at once, alike on both sides; 0: the largest page or state, and at least 4 MiB",
    )
    pd.add_argument(
        "--transfer-costs",
        type=Path,
        default=None,
        metavar="FILE",
        help="what --staging auto reckons with, from `kvbaton bench calibrate`; none: the defaults",
    )
    pd.add_argument("--secret-file", type=Path, default=None, help="shared secret; needed beyond loopback")
    add_log_level(parser)


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

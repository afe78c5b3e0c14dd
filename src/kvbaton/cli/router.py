"""``kvbaton router``: one address in front of prefill and decode servers."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING

from kvbaton.cli.settings import (
    add_allowed_host,
    add_allowed_origin,
    add_api_keys,
    add_grace_period,
    add_log_level,
    add_strict_fields,
    config_of,
    factor,
    natural,
    port,
    positive,
    seconds,
    share,
)
from kvbaton.cli.signals import exit_on_sigterm
from kvbaton.errors import ConfigError

if TYPE_CHECKING:
    from kvbaton.serving.router.router import RouterConfig
    from kvbaton.serving.router.workers import Workers

POLICIES = ("round_robin", "random", "power_of_two", "least_load", "cache_aware")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _add_workers(parser)
    _add_policies(parser)
    _add_clients(parser)
    _add_health(parser)
    _add_circuit_breaker(parser)
    _add_limits(parser)
    add_log_level(parser)


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pd-disaggregation", action="store_true", help="accepted for compatibility: this router has no other mode"
    )
    parser.add_argument(
        "--prefill",
        nargs="+",
        action="append",
        metavar=("URL", "BOOTSTRAP_PORT"),
        help="URL of a prefill server and the port of its registry (8998 if left out), repeatable",
    )
    parser.add_argument("--decode", nargs=1, action="append", metavar="URL", help="URL of a decode server, repeatable")
    parser.add_argument(
        "--workers-file",
        type=Path,
        default=None,
        metavar="FILE",
        help="file that names further servers, `prefill URL [PORT]` or `decode URL` a line; read again when it changes",
    )
    parser.add_argument(
        "--ca-cert-path",
        type=Path,
        default=None,
        help="file with the certificates (PEM) by which https servers are trusted; if left out the system's",
    )
    parser.add_argument(
        "--worker-startup-timeout-secs",
        type=seconds,
        default=None,
        help="seconds within which a prefill and a decode server must have been ready together, or the router ends; "
        "if left out it waits for them for ever",
    )
    parser.add_argument(
        "--engine",
        choices=("kvbaton", "vllm", "sglang"),
        default="kvbaton",
        help="what the servers are: kvbaton's, vLLM's with kvbaton.engines.vllm.KVBatonConnector, or SGLang's",
    )
    parser.add_argument(
        "--secret-file",
        type=Path,
        default=None,
        help="file with the shared secret of the servers; required where they have one",
    )


def _add_policies(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--policy", choices=POLICIES, default="round_robin", help="how a server of each role is chosen")
    parser.add_argument("--prefill-policy", choices=POLICIES, default=None, help="for prefill servers, if another one")
    parser.add_argument("--decode-policy", choices=POLICIES, default=None, help="for decode servers, if another one")
    parser.add_argument(
        "--cache-threshold",
        type=share,
        default=0.3,
        help="cache_aware: the part of a prompt, 0 to 1, that a server must have seen to be preferred",
    )
    parser.add_argument(
        "--balance-abs-threshold",
        type=natural,
        default=64,
        help="cache_aware: a server with more than so many requests above the one with the fewest is left out, ...",
    )
    parser.add_argument(
        "--balance-rel-threshold",
        type=factor,
        default=1.5,
        help="cache_aware: ... if it also has more than so many times the fewest",
    )


def _add_clients(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="address that the HTTP server listens on")
    parser.add_argument("--port", type=port, default=8000, help="port of the HTTP server; 0: any free one")
    add_allowed_host(parser)
    add_allowed_origin(parser)
    parser.add_argument(
        "--forward-header",
        action="append",
        metavar="NAME",
        help="header that passes from clients to servers and back, repeatable; X-Request-Id, traceparent and "
        "tracestate always do",
    )
    add_strict_fields(parser)
    add_api_keys(parser)


def _add_health(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--health-check-interval-secs", type=seconds, default=1.0, help="seconds between health checks of a server"
    )
    parser.add_argument(
        "--health-check-timeout-secs", type=seconds, default=2.0, help="seconds that a server may take to answer one"
    )
    parser.add_argument(
        "--health-failure-threshold",
        type=positive,
        default=2,
        help="unanswered health checks in a row that make a server silent: what it was asked is asked elsewhere",
    )
    parser.add_argument(
        "--health-check-endpoint",
        default="",
        help="route of a health check; if left out /ready, of vLLM's /health, of SGLang's /model_info",
    )


def _add_circuit_breaker(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cb-failure-threshold",
        type=positive,
        default=10,
        help="failures of one kind in a row that open a server's circuit: it gets requests where there is no other one",
    )
    parser.add_argument(
        "--cb-timeout-duration-secs", type=seconds, default=10.0, help="seconds until one request tries it again"
    )
    parser.add_argument(
        "--cb-window-duration-secs", type=seconds, default=120.0, help="a failure counts if the last one is as recent"
    )
    parser.add_argument("--disable-circuit-breaker", action="store_true", help="circuits never open")


def _add_limits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--request-timeout-secs", type=seconds, default=1800.0, help="longest time of one request in seconds"
    )
    parser.add_argument(
        "--sse-keep-alive-secs",
        type=seconds,
        default=15.0,
        help="seconds after which a stream that has nothing to say gets a comment, for proxies that close silent ones",
    )
    parser.add_argument(
        "--max-concurrent-requests",
        type=positive,
        default=1024,
        help="most requests at a time; further ones are refused",
    )
    add_grace_period(parser)


def run(options: argparse.Namespace) -> int:
    exit_on_sigterm()
    try:
        asyncio.run(_route(options))
    except ModuleNotFoundError as error:
        raise ConfigError(f"routing needs the package {error.name!r}", hint="pip install 'kvbaton[serve]'") from None
    return 0


def router_config(options: argparse.Namespace) -> RouterConfig:
    """What the flags say. Raises ConfigError."""
    from kvbaton.discovery.access import read_secret
    from kvbaton.discovery.names import ServerNames
    from kvbaton.serving.router.router import RouterConfig
    from kvbaton.serving.router.worker_file import parse, read
    from kvbaton.serving.router.workers import parse_worker
    from kvbaton.serving.server.api_keys import ApiKeys

    if options.health_check_endpoint and not options.health_check_endpoint.startswith("/"):
        raise ConfigError(f"--health-check-endpoint {options.health_check_endpoint!r} must begin with /")
    if options.workers_file is not None:
        parse(read(options.workers_file), options.workers_file)  # a mistake at the start is one of the start
    prefill = [parse_worker("prefill", values) for values in options.prefill or ()]
    decode = [parse_worker("decode", values) for values in options.decode or ()]
    options.workers = (*prefill, *decode)
    options.secret = read_secret(options.secret_file) if options.secret_file is not None else None
    options.keys = ApiKeys.of(options.api_key or (), options.api_key_file)
    options.names = ServerNames.of(
        options.host, allowed=options.allowed_host or (), origins=options.allowed_origin or ()
    )
    return config_of(RouterConfig, options)


async def _route(options: argparse.Namespace) -> None:
    from kvbaton.discovery.connections import raise_file_limit
    from kvbaton.serving.router.router import Router
    from kvbaton.serving.server.lifecycle import keep_what_is_loaded, reserve
    from kvbaton.serving.server.lifecycle import run as run_server

    config = router_config(options)
    raise_file_limit()  # before the router asks how many requests it can afford
    with reserve(options.host, options.port) as bound:
        router = Router(config)
        keep_what_is_loaded()
        serving = run_server(
            router.app,
            router.admission,
            bound,
            grace_period_secs=options.grace_period_secs,
            listening=lambda chosen: _announce(options.host, chosen),
        )
        await _with_workers(router.workers, serving, options.worker_startup_timeout_secs)


async def _with_workers(workers: Workers, serving: Coroutine[None, None, None], seconds_to_start: float | None) -> None:
    """Serve until the end. Raises PeerLostError where no pair of workers was ready within ``seconds_to_start``."""
    if seconds_to_start is None:
        await serving
        return
    server = asyncio.create_task(serving)
    started = asyncio.create_task(workers.started(seconds_to_start))
    try:
        await asyncio.wait({server, started}, return_when=asyncio.FIRST_COMPLETED)
        if started.done():
            started.result()
        await server
    finally:
        for task in (server, started):
            task.cancel()
        await asyncio.gather(server, started, return_exceptions=True)


def _announce(host: str, bound: int) -> None:
    print(f"kvbaton router: listens at http://{host}:{bound}", file=sys.stderr, flush=True)

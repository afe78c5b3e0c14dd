"""Assembles one server: ports, engine (see ``build``), registry, HTTP; runs it until a signal; takes it down.

Order up: ports (cheap to fail), engine, registry, HTTP. Order down: admission ends and the requests in flight are
drained, HTTP and the registry end, and then the engine. The server's own ranks are in its registry from the start:
nothing that others register there ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec
from aiohttp import web

from kvbaton import __version__
from kvbaton.control.address import Address
from kvbaton.discovery.access import is_loopback, read_secret, require_secret
from kvbaton.discovery.client import RegistryClient
from kvbaton.discovery.listening import CLEANUP_SECONDS
from kvbaton.discovery.names import ServerNames
from kvbaton.discovery.placement import LoadBalance, Placements
from kvbaton.discovery.registry import Registry, Route
from kvbaton.discovery.server import registry_app
from kvbaton.errors import ConfigError, KVBatonError
from kvbaton.plan.costs import Costs, LayersPolicy
from kvbaton.plan.staging import StagingPolicy
from kvbaton.protocol.settings import Settings
from kvbaton.serving.engine.model import LoadedModel, check_device, read_config
from kvbaton.serving.engine.scheduler import STOPPING
from kvbaton.serving.engine.shard import RankShard
from kvbaton.serving.engine.sharding import check_sizes
from kvbaton.serving.server.allow import AllowList
from kvbaton.serving.server.api import ApiServer
from kvbaton.serving.server.api_keys import ApiKeys
from kvbaton.serving.server.build import build, link_hosts, load, start_replicas
from kvbaton.serving.server.data_network import data_addresses
from kvbaton.serving.server.failure import DrainingError
from kvbaton.serving.server.lifecycle import (
    Signals,
    drain,
    keep_what_is_loaded,
    listen,
    port_of,
    reserve,
)
from kvbaton.serving.server.metrics import Gauge
from kvbaton.serving.server.rank import ServerRank
from kvbaton.serving.server.replica import Replica, gauges_of
from kvbaton.serving.server.replicas import Replicas
from kvbaton.serving.server.request_parsing import ApiConfig, Mode
from kvbaton.serving.server.tokens import ServerTokenizer
from kvbaton.transports.interfaces import restrict

BOOTSTRAP_FLAG = "--disaggregation-bootstrap-port"
_DEFAULTS = Settings()
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """Everything that ``kvbaton serve`` can be told.

    ``max_total_tokens`` is what the pool of one data-parallel rank holds. ``staging_mib`` of each rank, 0: none, None:
    the engine's choice; ``staging_slot_bytes`` 0: likewise.
    """

    model: str
    served_model_name: str = ""
    trust_remote_code: bool = False
    host: str = "127.0.0.1"
    port: int = 30000
    mode: Mode = "null"
    transfer_backend: Literal["nixl", "memory"] = "nixl"
    bootstrap_host: str = ""
    bootstrap_port: int = 8998
    bootstrap_allow: tuple[str, ...] = ()
    page_size: int = 16
    max_total_tokens: int = 16384
    chunked_prefill_size: int = 512
    max_running_requests: int = 32
    dtype: str = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    load_balance_method: LoadBalance | Literal["auto"] = "auto"
    decode_enable_radix_cache: bool = False
    allowed_host: tuple[str, ...] = ()
    allowed_origin: tuple[str, ...] = ()
    strict_fields: bool = False
    secret_file: Path | None = None
    api_key: tuple[str, ...] = field(default=(), repr=False)
    api_key_file: Path | None = None
    torch_threads: int | None = None
    grace_period_secs: float = 30.0
    control_port: int = 0
    control_advertise: str = ""
    handshake_timeout: float = _DEFAULTS.handshake_timeout
    bootstrap_timeout: float = _DEFAULTS.bootstrap_timeout
    waiting_timeout: float = _DEFAULTS.waiting_timeout
    heartbeat_interval: float = _DEFAULTS.heartbeat_interval
    staging: StagingPolicy = _DEFAULTS.staging
    staging_mib: int | None = None
    staging_slot_bytes: int = 0
    layers_ahead: LayersPolicy = _DEFAULTS.layers_ahead
    transfer_costs: Costs | None = None

    def settings(self) -> Settings:
        """The protocol's deadlines, and how it chooses between staging and direct writes, layers and whole chunks."""
        return Settings(
            handshake_timeout=self.handshake_timeout,
            bootstrap_timeout=self.bootstrap_timeout,
            waiting_timeout=self.waiting_timeout,
            heartbeat_interval=self.heartbeat_interval,
            staging=self.staging,
            layers_ahead=self.layers_ahead,
            costs=self.transfer_costs,
        )

    @property
    def staging_bytes(self) -> int | None:
        """Staging memory of each rank; 0: none, None: the engine's choice."""
        if self.mode == "null" or self.staging == "never":
            return 0
        return None if self.staging_mib is None else self.staging_mib << 20

    @property
    def pool_tokens(self) -> int:
        """Tokens that the pool of one data-parallel rank holds."""
        return self.max_total_tokens // self.page_size * self.page_size

    @property
    def load_balance(self) -> LoadBalance:
        """How requests are spread over the data-parallel ranks."""
        if self.load_balance_method != "auto":
            return self.load_balance_method
        return "follow_bootstrap_room" if self.mode == "prefill" else "total_requests"

    @property
    def registry_host(self) -> str:
        return self.bootstrap_host or self.host

    @property
    def hands_over(self) -> bool:
        """Whether other decode servers may take answers over from this one's ranks: not where only those of this host
        could dial them."""
        dialled = bool(self.control_advertise) or is_loopback(self.host)
        return self.mode == "decode" and dialled

    def __post_init__(self) -> None:
        if self.decode_enable_radix_cache and self.mode != "decode":
            raise ConfigError("--disaggregation-decode-enable-radix-cache is for --disaggregation-mode decode")
        if self.load_balance_method == "follow_bootstrap_room" and self.mode != "prefill":
            raise ConfigError("--load-balance-method follow_bootstrap_room is for --disaggregation-mode prefill")
        if self.control_advertise and Address.parse(self.control_advertise, any_port=True).is_wildcard:
            raise ConfigError(f"--disaggregation-control-advertise {self.control_advertise} is every interface")
        self._check_staging()
        if self.page_size < 1 or self.max_total_tokens < self.page_size:
            raise ConfigError(
                f"--max-total-tokens {self.max_total_tokens} must hold a page of --page-size {self.page_size} tokens"
            )

    def _check_staging(self) -> None:
        if self.staging == "always" and self.staging_mib == 0:
            raise ConfigError("--staging always needs memory: set --staging-mib to at least 1")
        if self.staging_mib and self.staging_slot_bytes > self.staging_mib << 20:
            raise ConfigError(
                f"--staging-mib {self.staging_mib} holds no slot of --staging-slot-bytes {self.staging_slot_bytes}; "
                f"set --staging-mib to at least {-(-self.staging_slot_bytes >> 20)}"
            )


def serve(config: ServeConfig, *, listening: Callable[[int], None] = lambda _port: None) -> None:
    """Run one server until SIGTERM or SIGINT. ``listening`` is told the port. Raises KVBatonError."""
    secret = read_secret(config.secret_file) if config.secret_file is not None else None
    keys = ApiKeys.of(config.api_key, config.api_key_file)
    allow = AllowList.parse(config.bootstrap_allow)
    if config.mode != "null":
        require_secret(config.registry_host, secret, what="the control plane")
        require_secret(config.host, secret, what=f"a {config.mode} server")
        listens, advertised = link_hosts(config)  # refused before a model is loaded
        if config.transfer_backend == "nixl":  # before anything is forked, and before UCX is loaded
            restrict(data_addresses(config.mode, allow, listens, advertised))
    check_device(config.device)
    shard = RankShard(tp_size=config.tensor_parallel_size, pp_size=config.pipeline_parallel_size)
    if shard.ranks > 1:
        model_config = read_config(config.model, trust_remote_code=config.trust_remote_code)
        if model_config is not None:
            check_sizes(model_config, shard)
    rank = ServerRank(shard=shard, dp_size=config.data_parallel_size)
    placements = Placements()
    with ExitStack() as closing:
        port = closing.enter_context(reserve(config.host, config.port))
        registry = None
        if config.mode == "prefill":
            registry = closing.enter_context(reserve(config.registry_host, config.bootstrap_port, flag=BOOTSTRAP_FLAG))
        model = load(config, rank)
        keep_what_is_loaded()  # before anything is forked
        replica: Replica
        if rank.dp_size == 1:
            replica = build(config, rank, model, secret, closing, leave=(port, registry))
        else:
            ranks = start_replicas(config, rank, model, secret, closing, leave=(port, registry))
            replica = Replicas(
                ranks, config.load_balance, lambda room, to: placements.place(room, to, time.monotonic())
            )
        server = _Server(config, rank, secret, keys, allow, model, replica, placements)
        asyncio.run(server.run(port, registry, listening))


class _Server:
    """The event loop's part of one server."""

    def __init__(
        self,
        config: ServeConfig,
        rank: ServerRank,
        secret: str | None,
        keys: ApiKeys,
        allow: AllowList,
        model: LoadedModel,
        replica: Replica,
        placements: Placements,
    ) -> None:
        self._config = config
        self._rank = rank
        self._secret = secret
        self._keys = keys
        self._allow = allow
        self._model = model
        self._replica = replica
        self._placements = placements
        self._failure: KVBatonError | None = None

    async def run(self, port: socket.socket, registry: socket.socket | None, listening: Callable[[int], None]) -> None:
        async with AsyncExitStack() as closing:
            signals = closing.enter_context(Signals())
            loop = asyncio.get_running_loop()
            self._replica.watch(lambda error: _post(loop, self._fail, error, signals))
            client = await closing.enter_async_context(RegistryClient(secret=self._secret))
            api = self._api(client)
            if registry is not None:
                table = await listen(self._registry_app(port_of(port)), registry, flag=BOOTSTRAP_FLAG)
                closing.push_async_callback(table.cleanup)
            runner = await listen(api.app, port)
            closing.push_async_callback(runner.cleanup)
            keep_what_is_loaded()
            listening(port_of(port))
            await signals.stop.wait()
            if not await drain(api.admission, grace_period_secs=self._config.grace_period_secs, hurry=signals.hurry):
                self._replica.end_all(DrainingError(STOPPING))  # so that each client hears of it
                await api.admission.emptied(CLEANUP_SECONDS)
        if self._failure is not None:
            raise self._failure.again()

    def _api(self, client: RegistryClient) -> ApiServer:
        model, config, replica = self._model, self._config, self._replica
        tokenizer = ServerTokenizer(model.tokenizer) if model.tokenizer is not None else None
        api = ApiServer(
            replica,
            tokenizer,
            ApiConfig(
                model=config.served_model_name or model.name,
                max_positions=model.geometry.max_positions,
                pool_tokens=config.pool_tokens,
                page_size=config.page_size,
                mode=config.mode,
                bootstrap_allow=self._allow,
                bootstrap_timeout=config.bootstrap_timeout,
                data_parallel_size=config.data_parallel_size,
                load_balance=config.load_balance,
                strict_fields=config.strict_fields,
            ),
            registry=client if config.mode == "decode" else None,
            info=self._info,
            timeline=replica.timeline if config.mode != "null" else None,
            layouts=replica.layouts,
            sources=_by_data_parallel_rank(replica.routes) if config.hands_over else (),
            instance=self._instance,
            secret=self._secret,
            keys=self._keys,
            names=ServerNames.of(config.host, allowed=config.allowed_host, origins=config.allowed_origin),
        )
        if config.mode != "null":
            api.metrics.counters(
                "kvbaton_handoff_events", "What the hand-off counted on rank 0, by event.", "event", self._counters
            )
            api.metrics.gauges(self._handoff_gauges)
        return api

    @property
    def _instance(self) -> str:
        """What peers call this server: the first rank of each group."""
        places = [(route.coordinates.pp, route.coordinates.tp, route.instance) for route in self._replica.routes]
        return ", ".join(name for pp, tp, name in places if (pp, tp) == (0, 0)) or self._rank.instance

    def _counters(self) -> Mapping[str, float]:
        handoffs = self._replica.handoffs()
        return handoffs.counters if handoffs is not None else {}

    def _handoff_gauges(self) -> list[Gauge]:
        handoffs = self._replica.handoffs()
        return gauges_of(handoffs) if handoffs is not None else []

    def _info(self) -> Mapping[str, object]:
        model, config = self._model, self._config
        facts: dict[str, object] = {
            "version": __version__,
            "instance": self._instance,
            "model_fingerprint": model.fingerprint,
            "dtype": model.geometry.dtype,
            "page_size": config.page_size,
            "max_total_tokens": config.pool_tokens,
            "chunked_prefill_size": config.chunked_prefill_size,
            "max_running_requests": config.max_running_requests,
            "tensor_parallel_size": config.tensor_parallel_size,
            "pipeline_parallel_size": config.pipeline_parallel_size,
            "data_parallel_size": config.data_parallel_size,
            "load_balance_method": config.load_balance,
        }
        handoffs = self._replica.handoffs()
        if handoffs is not None:
            facts["handoff"] = {"backend": config.transfer_backend, **msgspec.to_builtins(handoffs)}
        return facts

    def _registry_app(self, http_port: int) -> web.Application:
        """The registry of this server's ranks, which are there from the start."""
        routes = [msgspec.structs.replace(route, http_port=http_port) for route in self._replica.routes]
        _, advertised = link_hosts(self._config)
        names = ServerNames.of(self._config.registry_host, advertised, allowed=self._config.allowed_host)
        return registry_app(Registry(own=routes), self._placements, secret=self._secret, names=names)

    def _fail(self, error: KVBatonError, signals: Signals) -> None:
        """Stop the server, with this as the reason."""
        self._failure = self._failure or error
        signals.stop.set()
        signals.hurry.set()


def _by_data_parallel_rank(routes: Sequence[Route]) -> list[list[str]]:
    """The control addresses of the ranks of each."""
    found: dict[int, list[str]] = {}
    for route in routes:
        found.setdefault(route.coordinates.dp, []).append(route.address)
    return [found[rank] for rank in sorted(found)]


def _post(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *arguments: object) -> None:
    """From another thread; after the loop has ended there is nobody left to tell."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call, *arguments)

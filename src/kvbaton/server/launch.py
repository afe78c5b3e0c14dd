"""Assembles one server: model, pools, manager, scheduler, registry, HTTP; runs it until a signal; takes it down.

Order up: ports (cheap to fail), model, pools, manager, scheduler, registry, HTTP, registration. Order down: the gate is
shut and drained, the registration withdrawn, HTTP ended, scheduler, manager, and only then the pools' memory.

:func:`build_manager` is the one place that knows which transport and which links a name stands for.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from kvbaton import __version__
from kvbaton.control.access import read_secret, require_secret
from kvbaton.control.address import Address
from kvbaton.control.registry import Registered, Registry, Route
from kvbaton.control.registry_client import RegistryClient
from kvbaton.control.registry_server import registry_app
from kvbaton.control.zmq import ZmqLinks
from kvbaton.engine.decode import decode_scheduler
from kvbaton.engine.model import LoadedModel, load_model
from kvbaton.engine.pool import PoolConfig, Pools
from kvbaton.engine.prefill import prefill_scheduler
from kvbaton.engine.scheduler import Scheduler, SchedulerConfig
from kvbaton.engine.unified import unified_scheduler
from kvbaton.errors import ConfigError, KVBatonError
from kvbaton.manager import KVManager, new_instance
from kvbaton.protocol.settings import Settings
from kvbaton.server.allow import AllowList
from kvbaton.server.api import ApiServer
from kvbaton.server.intake import ApiConfig, Mode
from kvbaton.server.lifecycle import Signals, drain, listen, port_of, reserve
from kvbaton.server.tokens import ServerTokenizer
from kvbaton.transports import make_transport

#: How long the scheduler may take to end what was aborted, leases included.
CLOSE_SECONDS = 10.0
WITHDRAW_SECONDS = 2.0
BOOTSTRAP_FLAG = "--disaggregation-bootstrap-port"
_DEFAULTS = Settings()
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """Everything that ``kvbaton serve`` can be told. ``max_total_tokens`` is the pool's size."""

    model: str
    served_model_name: str = ""
    host: str = "127.0.0.1"
    port: int = 30000
    mode: Mode = "null"
    backend: Literal["nixl", "memory"] = "nixl"
    bootstrap_host: str = ""
    bootstrap_port: int = 8998
    bootstrap_allow: tuple[str, ...] = ()
    page_size: int = 16
    max_total_tokens: int = 16384
    chunked_prefill_size: int = 512
    max_running_requests: int = 32
    dtype: str = "float32"
    secret_file: Path | None = None
    torch_threads: int | None = None
    grace_seconds: float = 30.0
    control_port: int = 0
    control_advertise: str = ""
    handshake_seconds: float = _DEFAULTS.handshake_seconds
    bootstrap_seconds: float = _DEFAULTS.bootstrap_seconds
    waiting_seconds: float = _DEFAULTS.transfer_seconds
    heartbeat_seconds: float = _DEFAULTS.heartbeat_seconds

    def settings(self) -> Settings:
        """The protocol's deadlines."""
        return Settings(
            handshake_seconds=self.handshake_seconds,
            bootstrap_seconds=self.bootstrap_seconds,
            transfer_seconds=self.waiting_seconds,
            heartbeat_seconds=self.heartbeat_seconds,
        )

    @property
    def registry_host(self) -> str:
        return self.bootstrap_host or self.host

    def __post_init__(self) -> None:
        if self.control_advertise:
            Address.parse(self.control_advertise)
        if self.page_size < 1 or self.max_total_tokens < self.page_size:
            raise ConfigError(
                f"--max-total-tokens {self.max_total_tokens} must hold a page of --page-size {self.page_size} tokens"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """What a process is to its peers. ``group`` is minted per launch: a restart is a new group."""

    instance: str = field(default_factory=new_instance)
    group: str = field(default_factory=new_instance)


def build_manager(config: ServeConfig, pools: Pools, rank: Rank, *, secret: str | None) -> KVManager:
    """The hand-off manager of this rank: transport by ``config.backend``, links bound to ``config.registry_host``.

    With ``secret`` the links are authenticated. The caller starts and closes the manager. Raises ConfigError.
    """
    host = config.registry_host
    shown = f"[{host}]" if ":" in host else host
    links = ZmqLinks(f"tcp://{shown}:{config.control_port}", secret=secret)
    try:
        transport = make_transport(config.backend, rank.instance)
        return KVManager(
            pools.layout, transport, links, instance=rank.instance, group=rank.group, settings=config.settings()
        )
    except KVBatonError:
        links.close()
        raise


@dataclass(frozen=True, slots=True)
class Stack:
    """A running engine and what it stands on."""

    model: LoadedModel
    pools: Pools
    scheduler: Scheduler
    manager: KVManager | None


def serve(config: ServeConfig, *, listening: Callable[[int], None] = lambda _port: None) -> None:
    """Run one server until SIGTERM or SIGINT. ``listening`` is told the port. Raises KVBatonError."""
    secret = read_secret(config.secret_file) if config.secret_file is not None else None
    allow = AllowList.parse(config.bootstrap_allow)
    if config.mode != "null":
        require_secret(config.registry_host, secret, what="the control plane")
        require_secret(config.host, secret, what=f"a {config.mode} server")
    rank = Rank()
    with ExitStack() as closing:
        port = closing.enter_context(reserve(config.host, config.port))
        registry = None
        if config.mode == "prefill":
            registry = closing.enter_context(reserve(config.registry_host, config.bootstrap_port, flag=BOOTSTRAP_FLAG))
        stack = _build(config, rank, secret, closing)
        asyncio.run(_Server(config, rank, secret, allow, stack).run(port, registry, listening))


def _build(config: ServeConfig, rank: Rank, secret: str | None, closing: ExitStack) -> Stack:
    """Model, pools, manager and scheduler, started; ``closing`` ends them in the right order."""
    model = load_model(config.model, dtype=config.dtype, threads=config.torch_threads)
    _log.info("loaded %r", model)
    pools = Pools(
        model.geometry,
        PoolConfig(
            pages=config.max_total_tokens // config.page_size,
            page_size=config.page_size,
            aux_slots=2 * config.max_running_requests,
            chunk_tokens=1 if config.mode == "decode" else config.chunked_prefill_size,
        ),
        model=model.fingerprint,
    )
    manager = None
    limits = SchedulerConfig(chunked_prefill_size=config.chunked_prefill_size, max_batch=config.max_running_requests)
    if config.mode == "null":
        scheduler = unified_scheduler(model, pools, limits)
    else:
        manager = build_manager(config, pools, rank, secret=secret)
        closing.callback(manager.close)
        manager.start()
        make = prefill_scheduler if config.mode == "prefill" else decode_scheduler
        scheduler = make(model, pools, manager, limits)
    closing.callback(_close_scheduler, scheduler)
    scheduler.start()
    return Stack(model, pools, scheduler, manager)


def _close_scheduler(scheduler: Scheduler) -> None:
    if not scheduler.close(CLOSE_SECONDS):
        _log.warning("pages were still leased %g s after everything was aborted", CLOSE_SECONDS)


class _Server:
    """The event loop's part of one server."""

    def __init__(self, config: ServeConfig, rank: Rank, secret: str | None, allow: AllowList, stack: Stack) -> None:
        self._config = config
        self._rank = rank
        self._secret = secret
        self._allow = allow
        self._stack = stack
        self._registered = config.mode != "prefill"
        self._failure: KVBatonError | None = None

    async def run(self, port: socket.socket, registry: socket.socket | None, listening: Callable[[int], None]) -> None:
        async with AsyncExitStack() as closing:
            signals = closing.enter_context(Signals())
            client = await closing.enter_async_context(RegistryClient(secret=self._secret))
            api = self._api(client)
            runner = await listen(api.app, port)
            closing.push_async_callback(runner.cleanup)
            if registry is not None:
                table = await listen(registry_app(Registry(), secret=self._secret), registry, flag=BOOTSTRAP_FLAG)
                closing.push_async_callback(table.cleanup)
                where = (_reachable(self._config.registry_host), port_of(registry))
                await closing.enter_async_context(self._registration(client, where, port_of(port), signals))
            listening(port_of(port))
            await signals.stop.wait()
            await drain(api.gate, grace_seconds=self._config.grace_seconds, hurry=signals.hurry)
        if self._failure is not None:
            raise self._failure

    def _api(self, client: RegistryClient) -> ApiServer:
        stack, config = self._stack, self._config
        tokenizer = ServerTokenizer(stack.model.tokenizer) if stack.model.tokenizer is not None else None
        api = ApiServer(
            stack.scheduler,
            tokenizer,
            ApiConfig(
                model=config.served_model_name or stack.model.name,
                max_positions=stack.model.geometry.max_positions,
                pool_tokens=stack.pools.tokens,
                mode=config.mode,
                bootstrap_allow=self._allow,
            ),
            registry=client if config.mode == "decode" else None,
            readiness=lambda: "" if self._registered else "not registered with the bootstrap registry yet",
            info=self._info,
            timeline=stack.manager.timeline if stack.manager is not None else None,
            instance=self._rank.instance,
            secret=self._secret,
        )
        manager = stack.manager
        if manager is not None:
            api.metrics.counters(
                "kvbaton_handoff_events", "What the hand-off counted, by event.", "event", manager.counters
            )
        return api

    def _info(self) -> Mapping[str, object]:
        stack, config = self._stack, self._config
        facts: dict[str, object] = {
            "version": __version__,
            "instance": self._rank.instance,
            "model_fingerprint": stack.model.fingerprint,
            "dtype": stack.model.geometry.dtype,
            "page_size": stack.pools.page_size,
            "max_total_tokens": stack.pools.tokens,
            "chunked_prefill_size": config.chunked_prefill_size,
            "max_running_requests": config.max_running_requests,
        }
        manager = stack.manager
        if manager is not None:
            facts["handoff"] = {
                "backend": config.backend,
                "evidence": manager.evidence(),
                "address": manager.address,
                "group": self._rank.group,
                "layout_digest": manager.layout.digest(),
                "live_rooms": manager.live_rooms,
                "leased_rooms": manager.leased_rooms,
                "counters": manager.counters(),
            }
        return facts

    @asynccontextmanager
    async def _registration(
        self, client: RegistryClient, where: tuple[str, int], http_port: int, signals: Signals
    ) -> AsyncIterator[None]:
        """Be registered for the length of the block; a refusal that waiting cannot cure stops the server."""
        manager = self._stack.manager
        assert manager is not None  # noqa: S101 - _build gives prefill one
        route = Route(
            instance=self._rank.instance,
            group=self._rank.group,
            address=self._config.control_advertise or manager.address,
            layout_digest=manager.layout.digest(),
            http_port=http_port,
        )

        async def keep() -> None:
            try:
                await client.register_forever(*where, route, registered=self._on_registered)
            except KVBatonError as error:
                self._failure = error
                signals.stop.set()

        task = asyncio.create_task(keep())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            try:
                async with asyncio.timeout(WITHDRAW_SECONDS):
                    await client.unregister(*where, self._rank.instance)
            except (KVBatonError, TimeoutError) as error:
                _log.info("not withdrawn from the registry: %s", error)

    def _on_registered(self, _answer: Registered) -> None:
        self._registered = True


def _reachable(host: str) -> str:
    """Where this machine itself finds what listens at ``host``."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)

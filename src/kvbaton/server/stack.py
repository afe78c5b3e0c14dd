"""What a server's engine stands on, put together: model, pools, manager, scheduler, and the other ranks of its group.

Order up: model, followers, collective, pools, manager, scheduler. Order down: scheduler, followers, manager, and only
then the pools' memory. :func:`build_manager` is the one place that knows which transport and which links a name stands
for.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from kvbaton.control.address import Address
from kvbaton.control.registry import Coordinates as Place
from kvbaton.control.registry import Route, Sizes
from kvbaton.control.zmq import ZmqLinks
from kvbaton.engine.collective import Collective
from kvbaton.engine.cutting import check_fits, cut
from kvbaton.engine.decode import decode_scheduler
from kvbaton.engine.follower import Follower
from kvbaton.engine.group import READY_SECONDS, Group, GroupManager
from kvbaton.engine.memory import PoolConfig
from kvbaton.engine.model import LoadedModel, load_model, use_threads
from kvbaton.engine.pool import Pools
from kvbaton.engine.prefill import prefill_scheduler
from kvbaton.engine.runner import ModelRunner
from kvbaton.engine.scheduler import Scheduler, SchedulerConfig
from kvbaton.engine.shard import Shard
from kvbaton.engine.unified import unified_scheduler
from kvbaton.errors import ConfigError, KVBatonError
from kvbaton.layout_file import RankLayout
from kvbaton.manager import KVManager, new_instance
from kvbaton.messages import Coordinates
from kvbaton.server.ranks import Forked, fork_followers
from kvbaton.transports import make_transport

if TYPE_CHECKING:
    from kvbaton.server.launch import ServeConfig

#: How long the scheduler may take to end what was aborted, leases included.
CLOSE_SECONDS = 10.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """What a process is to its peers. ``group`` is minted per launch: a restart is a new group."""

    instance: str = field(default_factory=new_instance)
    group: str = field(default_factory=new_instance)
    shard: Shard = field(default_factory=Shard)


def link_hosts(config: ServeConfig) -> tuple[str, str]:
    """The address where a rank's links listen, and the one that peers dial if it is another; IP addresses.

    Prefill listens where its registry does. Decode dials and nobody dials it: its links listen on loopback. Raises
    ConfigError.
    """
    if config.mode == "decode":
        return "127.0.0.1", ""
    here = _resolved(config.registry_host)
    if config.control_advertise:
        return here.host, Address.parse(config.control_advertise, any_port=True).host
    if here.is_wildcard:
        raise ConfigError(
            f"{config.registry_host} is every interface and says not where decode finds this server",
            hint="add --disaggregation-control-advertise tcp://IP:0, or an IP as --disaggregation-bootstrap-host",
        )
    return here.host, ""


def _resolved(host: str) -> Address:
    """A name as the first address that the system has for it, as :func:`kvbaton.server.lifecycle.reserve` takes it."""
    if host == "localhost":
        return Address("127.0.0.1", 0)
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        raise ConfigError(f"{host} cannot be found: {error.strerror or error}") from None
    return Address(str(found), 0)


def build_manager(
    config: ServeConfig, pools: Pools, rank: Rank, *, secret: str | None, wakeup: threading.Event | None = None
) -> KVManager:
    """The hand-off manager of one rank: transport by ``config.backend``, links where :func:`link_hosts` says.

    With ``secret`` the links are authenticated. The caller starts and closes the manager. Raises ConfigError.
    """
    shard = rank.shard
    host, advertise = link_hosts(config)
    port = config.control_port + shard.rank if config.control_port else 0
    links = ZmqLinks(str(Address(host, port)), secret=secret, advertise=advertise)
    try:
        transport = make_transport(config.backend, rank.instance)
        return KVManager(
            pools.layout,
            transport,
            links,
            instance=rank.instance,
            group=rank.group,
            group_size=shard.ranks,
            coordinates=Coordinates(pp=shard.pp_rank, tp=shard.tp_rank),
            settings=config.settings(),
            wakeup=wakeup,
        )
    except KVBatonError:
        links.close()
        raise


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """A running engine and what it stands on. ``routes``: where each rank is found, for the registry; ``layouts``:
    the memory of each rank, for operators."""

    model: LoadedModel
    pools: Pools
    scheduler: Scheduler
    manager: KVManager | None
    group: Group | None
    routes: tuple[Route, ...]
    layouts: tuple[RankLayout, ...]


def build(
    config: ServeConfig, rank: Rank, secret: str | None, closing: ExitStack, *, ports: Iterable[socket.socket | None]
) -> Stack:
    """Everything, started; ``closing`` ends it in order. ``ports`` are the leader's own. Raises KVBatonError."""
    shard = rank.shard
    alone = shard.ranks == 1
    model = load_model(config.model, dtype=config.dtype, threads=config.torch_threads if alone else 1)
    _log.info("loaded %r", model)
    check_fits(model.network, model.geometry, shard)
    forked, collective = None, None
    if not alone:
        forked, collective = _gather(config, rank, secret, model, ports, closing)
    model = _own_part(config, model, shard, collective)
    pools = _pools(config, model)
    group = Group(forked.members) if forked is not None else None
    manager = None
    if config.mode != "null":
        manager = build_manager(config, pools, rank, secret=secret, wakeup=group.wakeup if group else None)
        closing.callback(manager.close)
        manager.start()
    if group is not None and forked is not None:
        for member in group.members:
            member.await_ready(READY_SECONDS)
        group.start()
        closing.callback(forked.wait)
        closing.callback(group.close)
    scheduler = _scheduler(config, model, pools, manager, group, collective)
    closing.callback(_close_scheduler, scheduler)
    scheduler.start()
    routes = _routes(config, rank, manager, group) if manager is not None else ()
    return Stack(
        model=model,
        pools=pools,
        scheduler=scheduler,
        manager=manager,
        group=group,
        routes=routes,
        layouts=_layouts(rank, manager, group) if manager is not None else (),
    )


def _gather(
    config: ServeConfig,
    rank: Rank,
    secret: str | None,
    model: LoadedModel,
    ports: Iterable[socket.socket | None],
    closing: ExitStack,
) -> tuple[Forked, Collective]:
    """Fork the followers and meet them."""
    place = Path(tempfile.mkdtemp(prefix="kvbaton-group-"))
    closing.callback(shutil.rmtree, place, ignore_errors=True)
    meeting = place / "meeting"

    def live(shard: Shard, pipe: Connection) -> None:
        _follow(config, dataclasses.replace(rank, instance=new_instance(), shard=shard), secret, model, pipe, meeting)

    forked = fork_followers(rank.shard, live, leave=ports)
    collective = Collective(rank.shard, meeting, _device(config, rank.shard))
    closing.callback(collective.close)
    return forked, collective


def _follow(
    config: ServeConfig, rank: Rank, secret: str | None, model: LoadedModel, pipe: Connection, meeting: Path
) -> None:
    """The life of a follower."""
    collective = Collective(rank.shard, meeting, _device(config, rank.shard))
    part = _own_part(config, model, rank.shard, collective)
    pools = _pools(config, part)
    runner = ModelRunner(part, pools, collective=collective)
    if config.mode == "null":
        Follower(pipe, runner, pools, None).run()
        return
    with build_manager(config, pools, rank, secret=secret) as manager:
        Follower(pipe, runner, pools, manager).run()


def _own_part(config: ServeConfig, model: LoadedModel, shard: Shard, collective: Collective | None) -> LoadedModel:
    """This rank's share of the network, on its device."""
    if collective is not None:
        cut(model.network, shard, collective.add_up)
        use_threads(config.torch_threads or 1)
    network = model.network.to(_device(config, shard))
    return dataclasses.replace(model, network=network, shard=shard)


def _device(config: ServeConfig, shard: Shard) -> str:
    if config.device == "cuda" and shard.ranks > 1:
        return f"cuda:{shard.rank}"
    return config.device


def _pools(config: ServeConfig, model: LoadedModel) -> Pools:
    return Pools(
        model.geometry,
        PoolConfig(
            pages=config.max_total_tokens // config.page_size,
            page_size=config.page_size,
            aux_slots=2 * config.max_running_requests,
            chunk_tokens=1 if config.mode == "decode" else config.chunked_prefill_size,
            staging_bytes=config.staging_bytes,
            staging_slot_bytes=config.staging_slot_bytes,
        ),
        model=model.fingerprint,
        device=_device(config, model.shard),
        shard=model.shard,
    )


def _scheduler(
    config: ServeConfig,
    model: LoadedModel,
    pools: Pools,
    manager: KVManager | None,
    group: Group | None,
    collective: Collective | None,
) -> Scheduler:
    limits = SchedulerConfig(
        chunked_prefill_size=config.chunked_prefill_size,
        max_batch=config.max_running_requests,
        prefix_cache=config.decode_radix_cache,
    )
    runner = ModelRunner(model, pools)
    if group is not None:
        runner = ModelRunner(
            model, pools, collective=collective, announce=group.announce, announce_copy=group.announce_copy
        )
    if manager is None:
        return unified_scheduler(model, pools, limits, runner=runner)
    rooms = manager if group is None else GroupManager(manager, group, pools)
    make = prefill_scheduler if config.mode == "prefill" else decode_scheduler
    return make(model, pools, rooms, limits, runner=runner)


def _close_scheduler(scheduler: Scheduler) -> None:
    if not scheduler.close(CLOSE_SECONDS):
        _log.warning("pages were still leased %g s after everything was aborted", CLOSE_SECONDS)


def _routes(config: ServeConfig, rank: Rank, manager: KVManager, group: Group | None) -> tuple[Route, ...]:
    """Every rank, as the registry is to know it; the port for HTTP is set when it is known."""
    shard = rank.shard
    found = {shard.rank: (manager.instance, manager.address, manager.layout.digest())}
    for member in group.members if group is not None else ():
        if member.ready is not None:
            found[member.rank] = (member.ready.instance, member.ready.address, member.ready.layout_digest)
    return tuple(
        Route(
            instance=found[one.rank][0],
            group=rank.group,
            address=_advertised(config, one, found[one.rank][1]),
            layout_digest=found[one.rank][2],
            http_port=0,
            coordinates=Place(pp=one.pp_rank, tp=one.tp_rank),
            sizes=Sizes(pp=one.pp_size, tp=one.tp_size),
        )
        for one in shard.all()
    )


def _layouts(rank: Rank, manager: KVManager, group: Group | None) -> tuple[RankLayout, ...]:
    """The memory of every rank of the group."""
    found = {rank.shard.rank: manager.layout}
    for member in group.members if group is not None else ():
        if member.ready is not None and member.ready.layout is not None:
            found[member.rank] = member.ready.layout
    return tuple(
        RankLayout(
            layout=found[one.rank],
            coordinates=Coordinates(pp=one.pp_rank, tp=one.tp_rank),
            group_size=one.ranks,
            group=rank.group,
        )
        for one in rank.shard.all()
        if one.rank in found
    )


def _advertised(config: ServeConfig, shard: Shard, bound: str) -> str:
    """What peers are told to dial. Where a port is told rank r is found r ports above it, else at the one it has."""
    if not config.control_advertise:
        return bound
    told = Address.parse(config.control_advertise, any_port=True)
    return str(Address(told.host, told.port + shard.rank if told.port else Address.parse(bound).port))

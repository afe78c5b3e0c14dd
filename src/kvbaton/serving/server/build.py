"""Puts together what a server's engine stands on: model, pools, manager, scheduler, and the other ranks of its group.

Order up: model, followers, collective, pools, manager, scheduler. Order down: scheduler, followers, manager, and only
then the pools' memory.
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
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from kvbaton.control.address import Address
from kvbaton.discovery.registry import Route, Sizes
from kvbaton.errors import ConfigError
from kvbaton.manager import KVManager, new_instance
from kvbaton.plan.layout_file import RankLayout
from kvbaton.serving.engine.collective import Collective
from kvbaton.serving.engine.decode import decode_scheduler
from kvbaton.serving.engine.follower import Follower
from kvbaton.serving.engine.group import READY_SECONDS, Group, GroupManager, Member
from kvbaton.serving.engine.memory import PoolConfig
from kvbaton.serving.engine.model import LoadedModel, load_model
from kvbaton.serving.engine.pool import Pools
from kvbaton.serving.engine.prefill import prefill_scheduler
from kvbaton.serving.engine.runner import ModelRunner
from kvbaton.serving.engine.scheduler import Scheduler, SchedulerConfig
from kvbaton.serving.engine.shard import RankShard
from kvbaton.serving.engine.sharding import check_fits, shard_network
from kvbaton.serving.engine.threads import use_threads
from kvbaton.serving.engine.unified import unified_scheduler
from kvbaton.serving.server.local_replica import LocalReplica
from kvbaton.serving.server.rank import ServerRank
from kvbaton.serving.server.ranks import Children, Closable, fork_each
from kvbaton.serving.server.replica_process import ReplicaProcess
from kvbaton.serving.server.replicas import RemoteReplica

if TYPE_CHECKING:
    from kvbaton.serving.server.launch import ServeConfig

#: How long the scheduler may take to end what was aborted, leases included.
CLOSE_SECONDS = 10.0
_log = logging.getLogger(__name__)


def link_hosts(config: ServeConfig) -> tuple[str, str]:
    """The address where a rank's links listen, and the one that peers dial if it is another; IP addresses.

    Prefill listens where its registry does. Decode dials, and is dialled only by decode servers that take over what it
    has: its links listen on loopback, unless it is told what to advertise. Raises ConfigError.
    """
    if config.mode == "decode" and not config.control_advertise:
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
    """A name as the first address that the system has for it, as ``lifecycle.reserve`` takes it."""
    if host == "localhost":
        return Address("127.0.0.1", 0)
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        raise ConfigError(f"{host} cannot be found: {error.strerror or error}") from None
    return Address(str(found), 0)


def build_manager(
    config: ServeConfig, pools: Pools, rank: ServerRank, *, secret: str | None, wakeup: threading.Event | None = None
) -> KVManager:
    """The hand-off manager of one rank, started: its links listen where :func:`link_hosts` says. The server registers
    its ranks by itself, all at once. Raises ConfigError.
    """
    shard = rank.shard
    host, advertise = link_hosts(config)
    return KVManager.open(
        pools.layout,
        role="both" if config.mode == "decode" else "prefill",  # a decode server that stops hands on what it has
        backend=config.transfer_backend,
        host=host,
        port=config.control_port + rank.number if config.control_port else 0,
        advertise=advertise,
        secret=secret,
        instance=rank.instance,
        group=rank.launch,
        sizes=Sizes(dp=rank.dp_size, pp=shard.pp_size, tp=shard.tp_size),
        coordinates=rank.coordinates(shard),
        settings=config.settings(),
        wakeup=wakeup,
    )


def load(config: ServeConfig, rank: ServerRank) -> LoadedModel:
    """The whole model, in this process. Raises KVBatonError."""
    model = load_model(
        config.model,
        dtype=config.dtype,
        threads=config.torch_threads if rank.alone else 1,
        trust_remote_code=config.trust_remote_code,
    )
    _log.info("loaded %r", model)
    return model


def build(
    config: ServeConfig,
    rank: ServerRank,
    model: LoadedModel,
    secret: str | None,
    closing: ExitStack,
    *,
    leave: Iterable[Closable | None],
) -> LocalReplica:
    """Everything, started; ``closing`` ends it in order. ``leave``: what followers must not keep. Raises KVBatonError.

    ``model`` is cut to this rank's part.
    """
    shard = rank.shard
    check_fits(model.network, model.geometry, shard)
    group, processes, collective = None, None, None
    if shard.ranks > 1:
        group, processes, collective = _gather(config, rank, secret, model, leave, closing)
    model = _own_part(config, model, rank, collective)
    pools = _pools(config, model, rank)
    manager = None
    if config.mode != "null":
        manager = build_manager(config, pools, rank, secret=secret, wakeup=group.wakeup if group else None)
        closing.callback(manager.close)
    if group is not None and processes is not None:
        for member in group.members:
            member.await_ready(READY_SECONDS)
        group.start()
        closing.callback(processes.wait)
        closing.callback(group.close)
    scheduler = _scheduler(config, model, pools, manager, group, collective)
    closing.callback(_close_scheduler, scheduler)
    scheduler.start()
    return LocalReplica(
        scheduler=scheduler,
        manager=manager,
        group=group,
        rank=rank,
        policy=config.staging,
        routes=_routes(config, rank, manager, group) if manager is not None else (),
        layouts=_layouts(rank, manager, group) if manager is not None else (),
    )


def start_replicas(
    config: ServeConfig,
    first: ServerRank,
    model: LoadedModel,
    secret: str | None,
    closing: ExitStack,
    *,
    leave: Iterable[Closable | None],
) -> list[RemoteReplica]:
    """Every data-parallel rank, each in a process that builds its own replica. Raises KVBatonError."""

    def live(rank: ServerRank, pipe: Connection) -> None:
        with ExitStack() as ending:
            replica = build(config, rank, model, secret, ending, leave=(pipe,))
            ReplicaProcess(pipe, replica).run()

    ranks = [dataclasses.replace(first, instance=new_instance(), dp_rank=number) for number in range(first.dp_size)]
    children = fork_each(ranks, live, leave=leave)
    closing.callback(children.wait)
    replicas = [
        RemoteReplica(rank.dp_rank, child.pipe, child.kill) for rank, child in zip(ranks, children, strict=True)
    ]
    for replica in replicas:
        closing.callback(replica.close)
    for replica in replicas:  # all are told before one is waited for
        closing.callback(replica.stop)
    for replica in replicas:
        replica.start(READY_SECONDS)
    return replicas


def _gather(
    config: ServeConfig,
    rank: ServerRank,
    secret: str | None,
    model: LoadedModel,
    leave: Iterable[Closable | None],
    closing: ExitStack,
) -> tuple[Group, Children, Collective]:
    """Fork the followers and meet them."""
    place = Path(tempfile.mkdtemp(prefix="kvbaton-group-"))
    closing.callback(shutil.rmtree, place, ignore_errors=True)
    rendezvous = place / "rendezvous"

    def live(shard: RankShard, pipe: Connection) -> None:
        _follow(
            config, dataclasses.replace(rank, instance=new_instance(), shard=shard), secret, model, pipe, rendezvous
        )

    followers = [shard for shard in rank.shard.all() if shard.rank != rank.shard.rank]
    children = fork_each(followers, live, leave=leave)
    group = Group(
        [Member(shard.rank, child.pipe, child.kill) for shard, child in zip(followers, children, strict=True)]
    )
    collective = Collective(rank.shard, rendezvous, _device(config, rank))
    closing.callback(collective.close)
    return group, children, collective


def _follow(
    config: ServeConfig, rank: ServerRank, secret: str | None, model: LoadedModel, pipe: Connection, rendezvous: Path
) -> None:
    """The life of a follower."""
    collective = Collective(rank.shard, rendezvous, _device(config, rank))
    part = _own_part(config, model, rank, collective)
    pools = _pools(config, part, rank)
    runner = ModelRunner(part, pools, collective=collective)
    if config.mode == "null":
        Follower(pipe, runner, pools, None).run()
        return
    with build_manager(config, pools, rank, secret=secret) as manager:
        Follower(pipe, runner, pools, manager).run()


def _own_part(config: ServeConfig, model: LoadedModel, rank: ServerRank, collective: Collective | None) -> LoadedModel:
    """This rank's share of the network, on its device."""
    if collective is not None:
        shard_network(model.network, rank.shard, collective.add_up)
    if not rank.alone:  # the model was loaded with one thread, to be forked
        use_threads(config.torch_threads or 1)
    network = model.network.to(_device(config, rank))
    return dataclasses.replace(model, network=network, shard=rank.shard)


def _device(config: ServeConfig, rank: ServerRank) -> str:
    if config.device == "cuda" and not rank.alone:
        return f"cuda:{rank.number}"
    return config.device


def _pools(config: ServeConfig, model: LoadedModel, rank: ServerRank) -> Pools:
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
        device=_device(config, rank),
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
        prefix_cache=config.decode_enable_radix_cache,
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
        _log.warning("pages were still leased %g s after everything was ended", CLOSE_SECONDS)


def _routes(config: ServeConfig, rank: ServerRank, manager: KVManager, group: Group | None) -> tuple[Route, ...]:
    """Every rank, as the registry is to know it; the port for HTTP is set when it is known."""
    shard = rank.shard
    found = {shard.rank: (manager.instance, manager.address, manager.layout.digest())}
    for member in group.members if group is not None else ():
        if member.ready is not None:
            found[member.rank] = (member.ready.instance, member.ready.address, member.ready.layout_digest)
    return tuple(
        Route(
            instance=found[one.rank][0],
            group=rank.launch,
            address=_advertised(config, dataclasses.replace(rank, shard=one), found[one.rank][1]),
            layout_digest=found[one.rank][2],
            http_port=0,
            coordinates=rank.place(one),
            sizes=Sizes(dp=rank.dp_size, pp=one.pp_size, tp=one.tp_size),
            load_balance=config.load_balance,
        )
        for one in shard.all()
    )


def _layouts(rank: ServerRank, manager: KVManager, group: Group | None) -> tuple[RankLayout, ...]:
    """The memory of every rank of the group."""
    found = {rank.shard.rank: manager.layout}
    for member in group.members if group is not None else ():
        if member.ready is not None and member.ready.layout is not None:
            found[member.rank] = member.ready.layout
    return tuple(
        RankLayout(layout=found[one.rank], coordinates=rank.coordinates(one), group_size=one.ranks, group=rank.group)
        for one in rank.shard.all()
        if one.rank in found
    )


def _advertised(config: ServeConfig, rank: ServerRank, bound: str) -> str:
    """What peers are told to dial. Where a port is told rank r is found r ports above it, else at the one it has."""
    if not config.control_advertise:
        return bound
    told = Address.parse(config.control_advertise, any_port=True)
    return str(Address(told.host, told.port + rank.number if told.port else Address.parse(bound).port))

"""SGLang's classes for a transfer backend: its calls to ours, our answers to its. No protocol of its own.

SGLang's base classes stay, for what its schedulers read of them (topology, data-parallel ranks, its bootstrap server);
their sockets, counts, heartbeats and deadlines are not used.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from sglang.srt.disaggregation.base.conn import KVTransferMetric
from sglang.srt.disaggregation.common.conn import (
    CommonKVBootstrapServer,
    CommonKVManager,
    CommonKVReceiver,
    CommonKVSender,
    KVTransferError,
    PrefillServerInfo,
)
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.runtime_context import get_observability

from kvbaton import ALWAYS_READY, KVBatonError, KVPoll
from kvbaton.control.address import Address
from kvbaton.discovery.names import ServerNames
from kvbaton.engines.sglang.bootstrap import Client, Groups
from kvbaton.engines.sglang.memory import cache_of
from kvbaton.engines.sglang.metrics import HandoffEvents
from kvbaton.engines.sglang.options import Options
from kvbaton.engines.sglang.rank import open_manager, rank_of, refuse
from kvbaton.engines.sglang.receiving import Receiving
from kvbaton.engines.sglang.sending import Sending
from kvbaton.errors import ConfigError, LocalProtocolError, RegistryError
from kvbaton.transports.interfaces import VARIABLE as UCX_DEVICES

logger = logging.getLogger("sglang.kvbaton")  # SGLang prints what is below its own name

#: How long SGLang's thread waits, at most, for rooms that end before the cache's memory goes.
SETTLE_SECONDS = 15.0


class KVBatonManager(CommonKVManager):  # type: ignore[misc]
    """One scheduler's rank. Raises what :meth:`kvbaton.KVManager.open` raises, and ConfigError for what is not done."""

    supports_deferred_decode_kv_release = True
    reports_transfer_latency = True
    proves_release = True  #: see :func:`kvbaton.engines.sglang.plugin.no_timer`

    def __init__(self, args: Any, disaggregation_mode: Any, server_args: Any, is_mla_backend: bool = False) -> None:
        prefill = disaggregation_mode == DisaggregationMode.PREFILL
        refuse(prefill)
        options = Options.from_environment(os.environ)
        rank = rank_of(args, server_args, bool(is_mla_backend), prefill, options.weights)
        self.cache = cache_of(args, rank)
        self.bootstrap = Client(options.secret())
        self.groups = Groups(self.bootstrap.ask)
        self.draining: dict[int, Receiving] = {}
        self._events = HandoffEvents() if get_observability().enable_metrics else None
        self.kv = open_manager(self.cache, rank, options, prefill)
        atexit.register(self.kv.close)
        with ExitStack() as failed:
            failed.callback(self.kv.close)
            super().__init__(args, disaggregation_mode, server_args, is_mla_backend)
            failed.pop_all()
        self.server_socket.close(linger=0)
        self.senders: dict[int, KVBatonSender] = {}
        if prefill and self.pp_size > 1:
            threading.Thread(target=self._tell_stages, name="kvbaton-stages", daemon=True).start()
        logger.info(
            "kvbaton hands over %s, listens at %s, UCX on %s",
            ", ".join(f"{pool.name} ({len(pool.planes)} x {pool.units})" for pool in self.cache.layout.pools),
            self.kv.address,
            os.environ.get(UCX_DEVICES, "every interface"),
        )

    def register_to_bootstrap(self) -> None:
        """The address that SGLang hands on is that of our control links."""
        address = Address.parse(self.kv.address)
        self.local_ip, self.rank_port = address.host, address.port
        super().register_to_bootstrap()

    def deregister_buffer_to_engine(self) -> None:
        """SGLang gives the cache's memory back for a while; what a peer may still write must not go before it cannot.

        Raises LocalProtocolError where that takes longer than :data:`SETTLE_SECONDS`."""
        until = time.monotonic() + SETTLE_SECONDS
        while self.kv.live_rooms and (left := until - time.monotonic()) > 0:
            self.kv.wait(left)
        self.kv.deregister()
        self.draining.clear()  # nothing drains any more, and SGLang has dropped what would ask

    def register_buffer_to_engine(self) -> None:
        """The memory is back, at the same addresses."""
        self.kv.register()

    def _register_topology_row(self, url: str, payload: dict[str, Any]) -> None:
        self.bootstrap.register(url, payload)

    def try_ensure_parallel_info(self, bootstrap_addr: str) -> bool:
        """Sizes of the prefill group. Whether it fits is found by the handshake, which tells both sides."""
        if bootstrap_addr in self.prefill_info_table:
            return True
        try:
            self.prefill_info_table[bootstrap_addr] = PrefillServerInfo(**self.groups.sizes(bootstrap_addr))
        except (KVBatonError, TypeError, ValueError) as error:
            logger.error("prefill at %s: %s", bootstrap_addr, error)
            return False
        return True

    def forget_lost_peers(self) -> None:
        """What is remembered of a prefill that is gone is asked anew."""
        for lost in self.kv.take_lost_peers():
            for server in self.groups.forget(lost.address):
                self.forget(server)
                logger.warning("prefill at %s: %s", server, lost.error)

    def forget(self, server: str) -> None:
        self.groups.forget_server(server)
        self.prefill_info_table.pop(server, None)

    def write_metrics(self) -> None:
        """A request has ended."""
        if self._events is not None:
            self._events.write(self.kv.counters())

    def is_abort_release_safe(self, bootstrap_room: int, required_acks: int) -> bool:  # noqa: ARG002
        """Proof, not a count: every writer has drained or is gone."""
        receiving = self.draining.get(bootstrap_room)
        return receiving is None or receiving.drained

    def clear_deferred_abort_state(self, bootstrap_room: int) -> None:
        self.draining.pop(bootstrap_room, None)

    def _tell_stages(self) -> None:
        """Pipeline stages agree through a store that the first one reads; it alone polls."""
        while True:
            self.kv.wait(0.05)
            for sender in list(self.senders.values()):
                sender.tell_stages()


class KVBatonSender(CommonKVSender):  # type: ignore[misc]
    """One request on the prefill side."""

    _early_send_wait_event: Any = None  #: set by SGLang before it sends what a forward pass may still be writing

    def __init__(
        self,
        mgr: KVBatonManager,
        bootstrap_addr: str,
        bootstrap_room: int,
        req_has_disagg_prefill_dp_rank: bool = False,
    ) -> None:
        super().__init__(mgr, bootstrap_addr, bootstrap_room, req_has_disagg_prefill_dp_rank)
        self.sending = Sending(mgr.kv, _room(bootstrap_room), mgr.cache)
        refused = mgr.failure_records.pop(bootstrap_room, None)  # SGLang's own: another rank has this room
        if refused is not None:
            self.sending.refuse(LocalProtocolError(refused, room=bootstrap_room))
        if mgr.pp_size > 1:
            mgr.senders[bootstrap_room] = self

    def _register_prefill_dp_rank(self) -> None:
        url = f"http://{self.bootstrap_server_url}/register_dp_rank"
        body = {"bootstrap_room": self.bootstrap_room, "dp_rank": self.kv_mgr.attn_dp_rank}
        try:
            self.kv_mgr.bootstrap.ask(url, body=body, method="POST")
        except KVBatonError as error:
            self.kv_mgr.record_failure(self.bootstrap_room, str(error))

    def pop_decode_prefix_len(self) -> int:
        return self.sending.prefix

    def init(self, num_kv_indices: int, aux_index: int | None = None) -> None:
        self.sending.begin(int(num_kv_indices), aux_index)

    def send(
        self,
        kv_indices: Any,
        state_indices: list[Any] | None = None,
        num_kv_tokens: int | None = None,  # noqa: ARG002
        indices_event: Any = None,  # noqa: ARG002
    ) -> None:
        event, self._early_send_wait_event = self._early_send_wait_event, None
        self.sending.send(kv_indices, state_indices, event.query if event is not None else ALWAYS_READY)

    def poll(self) -> int:
        return int(self.sending.poll())

    def poll_pp_consensus(self) -> int:
        self.tell_stages()
        return int(self.kv_mgr.check_status_pp_consensus(self.bootstrap_room))

    def tell_stages(self) -> None:
        poll = int(self.sending.poll())
        store = self.kv_mgr.request_status
        if store.get(self.bootstrap_room) != poll:
            store[self.bootstrap_room] = poll

    def get_transfer_metric(self) -> Any:
        return KVTransferMetric(transfer_latency_s=self.sending.seconds, transfer_total_bytes=self.sending.bytes)

    def abort(self) -> None:
        self.sending.give_up("SGLang aborted the request on the prefill side")

    def clear(self) -> None:
        self.kv_mgr.senders.pop(self.bootstrap_room, None)
        self.kv_mgr.request_status.pop(self.bootstrap_room, None)
        self.kv_mgr.write_metrics()

    def failure_exception(self) -> None:
        error = self.sending.error
        self.sending.give_up("another prefill rank failed")
        self.clear()
        raise _failure(self.bootstrap_room, error)


class KVBatonReceiver(CommonKVReceiver):  # type: ignore[misc]
    """One request on the decode side."""

    def __init__(self, mgr: KVBatonManager, bootstrap_addr: str, bootstrap_room: int | None = None) -> None:
        mgr.forget_lost_peers()
        super().__init__(mgr, bootstrap_addr, bootstrap_room)
        self.receiving = Receiving(mgr.kv, _room(bootstrap_room), mgr.cache)
        self.bootstrap_infos: list[Any] = []  # SGLang counts them; nothing of ours is counted

    def init(self, prefill_dp_rank: int) -> None:
        info = self.kv_mgr.prefill_info_table.get(self.bootstrap_addr)
        try:
            if info is None:
                raise RegistryError(f"the prefill at {self.bootstrap_addr} is gone")
            if info.attn_cp_size != 1:
                raise ConfigError(f"the prefill at {self.bootstrap_addr} has context parallelism")
            self.receiving.begin(
                self.kv_mgr.groups.sources(
                    self.bootstrap_addr, prefill_dp_rank, tp_size=info.attn_tp_size, pp_size=info.pp_size
                )
            )
        except KVBatonError as error:
            self.kv_mgr.forget(self.bootstrap_addr)
            self.receiving.refuse(error)

    def send_metadata(
        self,
        kv_indices: Any,
        aux_index: int | None = None,
        state_indices: list[Any] | None = None,
        decode_prefix_len: int | None = None,
        **_: Any,
    ) -> None:
        self.receiving.publish(kv_indices, aux_index, state_indices, decode_prefix_len or 0)

    def poll(self) -> int:
        return int(self.receiving.poll())

    def abort(self) -> None:
        self.receiving.give_up("SGLang aborted the request on the decode side")
        self.ensure_abort_notified()

    def ensure_abort_notified(self, *, force_arm: bool = False) -> None:  # noqa: ARG002
        """From here on SGLang asks :meth:`KVBatonManager.is_abort_release_safe` before it frees anything."""
        self.receiving.give_up("another decode rank failed")
        self.abort_notified = True
        if not self.receiving.drained:
            self.kv_mgr.draining[self.bootstrap_room] = self.receiving

    def clear(self) -> None:
        self.receiving.give_up("SGLang has no use for the request any more")
        super().clear()
        self.kv_mgr.write_metrics()

    def failure_exception(self) -> None:
        error = self.receiving.error
        self.clear()
        if error is not None and error.code not in ("aborted", "declined"):
            self.kv_mgr.forget(self.bootstrap_addr)  # it may have been started anew at other ports
        raise _failure(self.bootstrap_room, error)


class KVBatonBootstrapServer(CommonKVBootstrapServer):  # type: ignore[misc]
    """SGLang's own; with a secret, who asks or registers has to know it."""

    def _setup_routes(self) -> None:
        super()._setup_routes()
        secret = Options.from_environment(os.environ).secret()
        if secret is not None:
            from kvbaton.discovery.server import middlewares

            self.app.middlewares.extend(middlewares(secret, ServerNames.of(self.host)))


def query_prefill_dp_ranks(original: Callable[..., Any], bootstrap_addr: str, bootstrap_rooms: list[int]) -> Any:
    """Around SGLang's question of which data-parallel rank has a room: with a secret, with a token."""
    secret = Options.from_environment(os.environ).secret()
    if secret is None:
        return original(bootstrap_addr, bootstrap_rooms)
    url = f"http://{bootstrap_addr}/query_dp_ranks"
    try:
        return Client(secret).ask(url, body={"bootstrap_rooms": bootstrap_rooms}, method="POST")
    except KVBatonError as error:
        logger.error("%s", error)
        return {}


def _room(given: object) -> int:
    """What a request names, or what is no room at all and is refused as such."""
    return given if isinstance(given, int) else -1


def _failure(room: int | None, error: KVBatonError | None) -> Exception:
    reason = f"{error.code}: {error}" if error is not None else "another rank failed"
    found: Exception = KVTransferError(room, reason, is_from_another_rank=error is None)
    return found


__all__ = ["KVBatonBootstrapServer", "KVBatonManager", "KVBatonReceiver", "KVBatonSender", "KVPoll"]

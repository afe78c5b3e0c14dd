"""What vLLM calls: its types to ours and back, nothing else. What happens stands in ``scheduler`` and ``worker``.

A worker opens its manager when vLLM has allocated the cache; its address goes to the scheduler half by vLLM's own
handshake metadata.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvbaton.engines.vllm.metrics import KVBatonMetrics, KVBatonStats
from kvbaton.engines.vllm.options import Options
from kvbaton.engines.vllm.orders import Orders
from kvbaton.errors import ConfigError

if TYPE_CHECKING:
    from kvbaton import KVManager
    from kvbaton.engines.vllm.memory import CacheMemory
    from kvbaton.engines.vllm.scheduler import SchedulerHalf
    from kvbaton.engines.vllm.worker import WorkerHalf

logger = logging.getLogger("vllm.kvbaton")


@dataclass
class StepMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """Scheduler to workers."""

    orders: Orders = field(default_factory=Orders)


@dataclass
class RankAddress(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """Worker to scheduler, once: where decode dials this rank."""

    address: str


@dataclass
class WorkerNews(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """Workers to scheduler: failed requests whose blocks a write may still touch (None: as before), and requests of
    prefill for which decode has blocks."""

    leased: frozenset[str] | None = None
    met: frozenset[str] = frozenset()

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        known = [news.leased for news in (self, other) if news.leased is not None]
        return WorkerNews(frozenset().union(*known) if known else None, self.met | other.met)


class KVBatonConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """See the module; made once in the scheduler's process and once in every worker."""

    _cache_hit_source = CacheHitSource.P2P

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._check(vllm_config)
        self._options = Options.from_mapping(self._kv_transfer_config.kv_connector_extra_config or {})
        self._orders = Orders()
        self._scheduler: SchedulerHalf | None = None
        self._worker: WorkerHalf | None = None
        self._manager: KVManager | None = None
        self._memory: CacheMemory | None = None
        if role is KVConnectorRole.SCHEDULER:
            self._scheduler = self._make_scheduler()

    @staticmethod
    def _check(vllm_config: Any) -> None:
        parallel = vllm_config.parallel_config
        if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
            raise ConfigError("context parallelism splits blocks over ranks in a way that is not handed over yet")

    # Both halves

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """Heads outside of tokens: a head is then one run. Latents have no heads."""
        model = vllm_config.model_config
        return None if model is None or model.use_mla else "LBHNC"

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVBatonStats:
        return KVBatonStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]
    ) -> KVBatonMetrics:
        return KVBatonMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        if self._manager is not None:
            self._manager.close("the engine shuts down")

    # Scheduler

    def _make_scheduler(self) -> SchedulerHalf:
        from kvbaton.engines.vllm.memory import admission, cache_groups
        from kvbaton.engines.vllm.scheduler import SchedulerHalf

        transfer = self._kv_transfer_config
        return SchedulerHalf(
            cache_groups(self._kv_cache_config),
            produces=transfer.is_kv_producer,
            consumes=transfer.is_kv_consumer,
            group=str(transfer.engine_id),
            tp_size=self._vllm_config.parallel_config.tensor_parallel_size,
            admission=admission(
                self._kv_cache_config, self._vllm_config, both=transfer.is_kv_producer and transfer.is_kv_consumer
            ),
            recomputes_all=lambda request: bool(request.skip_reading_prefix_cache),  # type: ignore[attr-defined]
            shorten=shorten,
        )

    @property
    def _half(self) -> SchedulerHalf:
        if self._scheduler is None:
            raise ConfigError("this is a worker's connector")
        return self._scheduler

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], RankAddress]) -> None:
        self._half.set_sources([metadata[place].address for place in sorted(metadata)])

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        self._half.quarantine.bind(gpu_block_pool)

    def on_new_request(self, request: Any) -> None:
        self._half.add(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._half.matched(request, num_computed_tokens)

    def get_loaded_kv_cache_group_ids(self, request: Any) -> tuple[int, ...]:  # noqa: ARG002 - vLLM's signature
        return tuple(self._kv_cache_config.transfer_group_ids)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._half.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        state = scheduler_output.kv_connector_block_state
        return StepMetadata(
            self._half.step(
                scheduler_output.num_scheduled_tokens,
                scheduler_output.preempted_req_ids or (),
                state.get_block_ids if state is not None else lambda _: None,
            )
        )

    def update_connector_output(self, connector_output: Any) -> None:
        meta = connector_output.kv_connector_worker_meta
        news = meta if isinstance(meta, WorkerNews) else WorkerNews()
        self._half.update(
            connector_output.finished_recving or (),
            connector_output.failed_recving or (),
            news.leased,
            met=news.met,
            sent=connector_output.finished_sending or (),
        )

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:  # noqa: ARG002
        return self._half.finished(request)

    def request_finished_all_groups(
        self,
        request: Any,
        block_ids: tuple[list[int], ...],  # noqa: ARG002
    ) -> tuple[bool, dict[str, Any] | None]:
        return self._half.finished(request)

    def has_pending_push_work(self) -> bool:
        return self._scheduler is not None and self._scheduler.busy

    # Worker

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        from vllm.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_rank

        from kvbaton import Coordinates, KVManager, Settings
        from kvbaton.discovery.registry import Sizes
        from kvbaton.engines.vllm.memory import cache_memory
        from kvbaton.engines.vllm.worker import WorkerHalf, unit_maker

        parallel, options = self._vllm_config.parallel_config, self._options
        place = Coordinates(pp=get_pp_group().rank_in_group, tp=get_tensor_model_parallel_rank())
        sizes = Sizes(pp=parallel.pipeline_parallel_size, tp=parallel.tensor_parallel_size)
        rank = place.pp * sizes.tp + place.tp
        self._memory = memory = cache_memory(
            kv_caches, self._kv_cache_config, self._vllm_config, tp_rank=place.tp, weights=options.weights
        )
        role = self._manager_role()
        options.place_data_plane(receives=role != "prefill")
        self._manager = manager = KVManager.open(
            memory.layout,
            role=role,
            backend=options.backend,
            host=options.host,
            port=options.port + parallel.data_parallel_index * sizes.ranks + rank if options.port else 0,
            advertise=options.advertise,
            secret=options.secret(),
            group=str(self._kv_transfer_config.engine_id),
            sizes=sizes,
            coordinates=place,
            settings=Settings.from_mapping(options.settings),
            collect_finished=True,
        )
        self._worker = WorkerHalf(
            manager,
            units=unit_maker(memory.pages),
            clear=memory.clear_behind,
            quarantine=options.quarantine,
        )
        logger.info(
            "kvbaton rank pp %d tp %d at %s hands over %s", place.pp, place.tp, manager.address, describe(memory)
        )

    def _manager_role(self) -> Any:
        transfer = self._kv_transfer_config
        if transfer.is_kv_producer and transfer.is_kv_consumer:
            return "both"
        return "prefill" if transfer.is_kv_producer else "decode"

    def get_handshake_metadata(self) -> RankAddress | None:
        return RankAddress(self._manager.address) if self._manager is not None else None

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        if self._worker is not None:
            self._worker.preempt(kv_connector_metadata.orders)

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        super().bind_connector_metadata(connector_metadata)
        self._orders = connector_metadata.orders
        if self._worker is not None:
            self._worker.begin(self._orders)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Blocks are granted before the forward pass, in :meth:`bind_connector_metadata`: vLLM calls this after it."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Requests are parked until all their layers are here."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """On exit of an attention layer, whose keys and values are in the cache by then."""
        if self._worker is not None and self._worker.sends_ahead(self._orders):
            from kvbaton.engines.vllm.memory import fence_for, layer_number

            self._worker.layer_done(self._orders, layer_number(layer_name), fence_for(kv_layer.device))

    def wait_for_save(self) -> None:
        if self._worker is not None and self._memory is not None:
            from kvbaton.engines.vllm.memory import fence_for

            busy = self._orders.chunks or self._worker.holding
            fence = fence_for(next(iter(self._memory.tensors.values()))[0].device) if busy else None
            self._worker.end(self._orders, fence)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:  # noqa: ARG002
        if self._worker is None:
            return KVConnectorTransferResults()
        results = self._worker.results(idle=self._orders.idle)
        return KVConnectorTransferResults(
            finished_sending=results.sent, finished_recving=results.received, failed_recving=results.failed
        )

    def get_kv_connector_stats(self) -> KVBatonStats | None:
        if self._worker is None:
            return None
        tallied = self._worker.tally
        news = tallied.now(**self._worker.gauges())
        return KVBatonStats(tallied.take()) if news or not tallied.empty else None

    def build_connector_worker_meta(self) -> WorkerNews | None:
        if self._worker is None:
            return None
        leased, met = self._worker.leased(), self._worker.met()
        return WorkerNews(leased, met) if leased is not None or met else None


def shorten(request: Any, tokens: int) -> bool:
    """Take ``tokens`` off the end of a prompt that was just added; whether that could be done. Nothing is generated
    from the shorter prompt but the one token that vLLM needs in order to finish."""
    if tokens == 0:
        return True
    if request.prompt_token_ids is None or request.num_prompt_tokens <= tokens:
        return False
    del request.prompt_token_ids[-tokens:]
    del request._all_token_ids[-tokens:]
    request.num_prompt_tokens -= tokens
    request.max_tokens = 1
    return True


def describe(memory: CacheMemory) -> str:
    """The pools for one line of the log."""
    found = []
    for pool in memory.layout.pools:
        what = f"{pool.units} units, {len({plane.layer for plane in pool.planes})} layers, {pool.dtype}"
        paged = f", pages of {pool.page_size}" if pool.paged else ""
        window = f", window {pool.window}" if pool.window else ""
        packing = f", {pool.packing}" if pool.packing else ""
        found.append(f"{pool.name} ({what}{paged}{window}{packing})")
    return "; ".join(found)

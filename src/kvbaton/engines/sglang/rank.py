"""What SGLang says of the rank that this process is, and our manager for it.

Of its arguments nothing is guessed: what a schedule, a parallel layout or an environment asks for and is not done ends
the start by its name.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.environ import envs
from sglang.srt.runtime_context import get_device, get_disagg, get_parallel, get_serving
from sglang.srt.utils.network import get_local_ip_auto

from kvbaton import Coordinates, KVManager, Settings, Sizes, launch_id, new_instance
from kvbaton.discovery.access import is_loopback
from kvbaton.engines.model import model_text
from kvbaton.engines.sglang.memory import Cache, Rank
from kvbaton.engines.sglang.options import Options
from kvbaton.errors import ConfigError


def refuse(prefill: bool) -> None:
    """What SGLang can be asked for and is not done. Raises ConfigError."""
    parallel, disagg = get_parallel(), get_disagg()
    wrong = {
        "context parallelism": parallel.attn_cp_size > 1,
        "decode context parallelism": parallel.attn_dcp_size > 1,
        "a KV cache that is sharded by pages": parallel.enable_kv_cache_sharding,
        "--disaggregation-decode-allocation-policy prefill_complete": (
            disagg.disaggregation_decode_allocation_policy != "early"
        ),
        "--enable-pd-role-switch": disagg.enable_pd_role_switch,
        "SGLANG_DISAGG_STAGING_BUFFER": envs.SGLANG_DISAGG_STAGING_BUFFER.get(),
        "SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE=false": (
            not prefill and not envs.SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE.get()
        ),
    }
    for what, found in wrong.items():
        if found:
            raise ConfigError(f"{what} does not work with the transfer backend kvbaton")


def rank_of(args: Any, server_args: Any, latent: bool, prefill: bool, weights: str) -> Rank:
    """What ``args``, SGLang's ``KVArgs``, do not say of the rank."""
    parallel, device = get_parallel(), get_device()
    model = ModelConfig.from_server_args(server_args)
    return Rank(
        heads=int(model.get_total_num_kv_heads()),
        latent=latent or bool(getattr(args, "is_hybrid_mla_backend", False)),
        tp_size=parallel.attn_tp_size,
        tp_rank=parallel.attn_tp_rank,
        pp_size=parallel.pp_size,
        pp_rank=int(args.pp_rank or 0),
        memory="DRAM" if device.device == "cpu" else "VRAM",
        device=0 if device.device == "cpu" else int(device.gpu_id),
        model=model_text(
            "sglang",
            model,
            weights=weights,
            cache_dtype=args.kv_cache_dtype_str,
            page_size=int(args.page_size),
            cache_layout=str(args.kv_layout or ""),
            states=",".join(str(getattr(kind, "value", kind)) for kind in args.state_types),
        ),
        prefill=prefill,
    )


def open_manager(cache: Cache, rank: Rank, options: Options, prefill: bool) -> KVManager:
    """Raises what :meth:`kvbaton.KVManager.open` raises."""
    parallel = get_parallel()
    dp_size = parallel.attn_dp_size if parallel.dp_size == 1 else parallel.dp_size
    sizes = Sizes(dp=dp_size, pp=rank.pp_size, tp=rank.tp_size)
    dp_rank = parallel.attn_dp_rank if parallel.dp_size == 1 else int(parallel.dp_rank or 0)
    world = parallel.world_group
    group = launch_id(world.cpu_group) if world.world_size > 1 else new_instance()
    number = (dp_rank * rank.pp_size + rank.pp_rank) * rank.tp_size + rank.tp_rank
    settings = {
        "bootstrap_timeout": float(envs.SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT.get()),
        "waiting_timeout": float(envs.SGLANG_DISAGGREGATION_WAITING_TIMEOUT.get()),
        **options.settings,
    }
    host = options.host or _host()
    options.keep_to(host)
    return KVManager.open(
        cache.layout,
        role="prefill" if prefill else "decode",
        backend=options.backend,
        host=host if prefill else "127.0.0.1",
        port=options.port + number if options.port and prefill else 0,
        secret=options.secret(),
        group=group,
        sizes=sizes,
        coordinates=Coordinates(dp=dp_rank, pp=rank.pp_rank, tp=rank.tp_rank),
        staging_bytes=options.staging_mib << 20,
        settings=Settings.from_mapping(settings),
    )


def _host() -> str:
    return "127.0.0.1" if is_loopback(str(get_serving().host)) else str(get_local_ip_auto())

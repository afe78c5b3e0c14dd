"""kvbaton under vLLM: a KV connector, loaded by name.

``--kv-transfer-config '{"kv_connector": "KVBatonConnector", "kv_connector_module_path": "kvbaton.engines.vllm", …}'``

- :mod:`kvbaton.engines.vllm.connector`: what vLLM calls; nothing but vLLM's types to ours and back
- :mod:`kvbaton.engines.vllm.scheduler`: its half in the scheduler: rooms, counts, block ids; no socket, memory, thread
- :mod:`kvbaton.engines.vllm.worker`: its half in each worker: one manager, senders and receivers
- :mod:`kvbaton.engines.vllm.orders`: what the halves tell each other in every step
- :mod:`kvbaton.engines.vllm.groups`: which blocks hold which tokens, for every kind of cache
- :mod:`kvbaton.engines.vllm.params`: ``kv_transfer_params`` of requests, from clients: validated
- :mod:`kvbaton.engines.vllm.options`: ``kv_connector_extra_config``
- :mod:`kvbaton.engines.vllm.quarantine`: blocks of a failed request that a silent peer may still write
- :mod:`kvbaton.engines.vllm.memory`: vLLM's tensors as a layout
- :mod:`kvbaton.engines.vllm.metrics`: stats and Prometheus metrics
- :mod:`kvbaton.engines.vllm.versions`: which vLLM this was written for

Only ``connector``, ``memory`` and ``metrics`` import vLLM. The class is imported in every process of vLLM, the API
server included: what costs (links, transports) is imported in the worker, when it opens its manager.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvbaton.engines.vllm.connector import KVBatonConnector

__all__ = ["KVBatonConnector"]


def __getattr__(name: str) -> Any:
    if name != "KVBatonConnector":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kvbaton.engines.vllm.versions import check_version

    check_version()
    from kvbaton.engines.vllm.connector import KVBatonConnector

    return KVBatonConnector

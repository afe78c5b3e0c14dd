"""The connector, with every call that vLLM makes of it written down: what the contract test replays.

Loaded by vLLM in place of the connector; lines go to files in the directory that the environment names, one for each
half. Only the order of calls and what they carry in small is kept, so that two runs of one version are alike.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from kvbaton.engines.vllm import KVBatonConnector
from lab.vllm.contract import DIRECTORY

#: What vLLM calls, by half.
SCHEDULER = (
    "set_xfer_handshake_metadata_pp_aware",
    "bind_gpu_block_pool",
    "on_new_request",
    "get_num_new_matched_tokens",
    "get_loaded_kv_cache_group_ids",
    "update_state_after_alloc",
    "build_connector_meta",
    "update_connector_output",
    "request_finished",
    "request_finished_all_groups",
)
WORKER = (
    "register_kv_caches",
    "get_handshake_metadata",
    "handle_preemptions",
    "bind_connector_metadata",
    "start_load_kv",
    "wait_for_save",
    "get_transfer_results",
    "get_kv_connector_stats",
    "build_connector_worker_meta",
    "clear_connector_metadata",
)


class RecordingConnector(KVBatonConnector):
    """See the module."""


def _note(half: str, name: str, carried: Any) -> None:
    directory = os.environ.get(DIRECTORY)
    if directory:
        with (Path(directory) / f"{half}.jsonl").open("ab") as file:
            file.write(msgspec.json.encode([name, carried]) + b"\n")


def _carried(name: str, arguments: tuple[Any, ...], result: Any) -> Any:
    """In small: numbers that the contract fixes, no ids, addresses or times."""
    if name == "get_num_new_matched_tokens":
        return [arguments[1], list(result)]
    if name == "update_state_after_alloc":
        return [arguments[2], [len(table) for table in arguments[1].get_block_ids()]]
    if name == "build_connector_meta":
        return sorted(arguments[0].num_scheduled_tokens.values())
    if name == "update_connector_output":
        output = arguments[0]
        return [
            len(output.finished_sending or ()),
            len(output.finished_recving or ()),
            len(output.failed_recving or ()),
        ]
    if name in ("request_finished", "request_finished_all_groups"):
        return [arguments[0].status.name, result[0], sorted(result[1] or ())]
    if name == "get_transfer_results":
        return [len(result.finished_sending), len(result.finished_recving), len(result.failed_recving)]
    return None


def _recorded(half: str, name: str) -> Any:
    method = getattr(KVBatonConnector, name)

    def call(self: Any, *arguments: Any, **more: Any) -> Any:
        result = method(self, *arguments, **more)
        _note(half, name, _carried(name, arguments, result))
        return result

    return call


for _half, _names in (("scheduler", SCHEDULER), ("worker", WORKER)):
    for _name in _names:
        setattr(RecordingConnector, _name, _recorded(_half, _name))

"""The calls that vLLM makes, as they were recorded from real processes: the stand-in makes the same, with the same
numbers, and the halves do with them what they did there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from test_vllm_engines import asks_decode, asks_prefill, prompt
from vllm_stand_in import Request, StandIn, run

from kvbaton.engines.vllm.groups import CacheGroup, CacheGroups
from lab.vllm.contract import KEPT, any_of

#: The engine of the record: blocks of 128 tokens, steps of at most 512.
GROUPS = CacheGroups((CacheGroup(pool="full0", index=0, kind="full", block_size=128),))


@pytest.fixture(scope="module")
def record() -> Any:
    return msgspec.json.decode(KEPT.read_bytes())


@pytest.fixture
def pair() -> Iterator[tuple[StandIn, StandIn]]:
    engines = (
        StandIn(GROUPS, produces=True, consumes=False, chunk=512),
        StandIn(GROUPS, produces=False, consumes=True, chunk=512),
    )
    yield engines
    for engine in engines:
        engine.close()


def life(engine: StandIn) -> list[Any]:
    return [call for call in msgspec.json.decode(msgspec.json.encode(engine.calls)) if any_of(call[1])]


def test_one_hand_off_and_one_failure(pair: tuple[StandIn, StandIn], record: Any) -> None:
    prefill, decode = pair
    first = prefill.add(Request("p", prompt(700), asks_prefill()))
    run(prefill, until=lambda: first.answer is not None)
    decode.add(Request("d", prompt(700), first.answer))
    run(prefill, decode)
    decode.add(Request("dead", prompt(300), asks_decode(5)))
    run(prefill, decode)
    assert life(prefill) == record["prefill"]["scheduler"]["life"]
    assert life(decode) == record["decode"]["scheduler"]["life"]


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_what_the_connector_builds_on(record: Any, side: str) -> None:
    """Orders of calls that its code takes for granted."""
    scheduler, worker = record[side]["scheduler"], record[side]["worker"]
    assert worker["start"] == ["register_kv_caches", "get_handshake_metadata"]
    assert scheduler["start"] == ["bind_gpu_block_pool", "set_xfer_handshake_metadata_pp_aware"]
    for step in scheduler["steps"]:
        assert step[0] == "build_connector_meta"
        if "request_finished_all_groups" in step:
            assert step.index("request_finished_all_groups") < step.index("update_connector_output")
    for step in worker["steps"]:
        assert step.index("handle_preemptions") < step.index("bind_connector_metadata") < step.index("wait_for_save")
        assert step.index("wait_for_save") < step.index("get_transfer_results")
        assert step.index("get_transfer_results") < step.index("build_connector_worker_meta")

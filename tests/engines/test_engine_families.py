"""Every family of models: tokens of one process and of a hand-off equal those of transformers' own loop."""

from __future__ import annotations

import pytest
from engine_kit import call, generate, greedy, make_pools, make_prompt, poison
from test_engine_handoff import CONFIG, pair

from kvbaton.serving.engine.model import LoadedModel
from kvbaton.serving.engine.unified import unified_scheduler

LENGTHS = (1, 16, 17, 33, 64, 100)
POOLS = {
    "qwen3": {"kv"},
    "llama": {"kv"},
    "qwen3_moe": {"kv"},
    "deepseek_v2": {"mla"},
    "deepseek_v3": {"mla"},
    "deepseek_v32": {"mla", "index"},
    "gpt_oss": {"kv", "swa"},
    "gemma3": {"kv", "swa"},
    "mistral": {"swa"},
    "qwen3_next": {"kv", "state"},
    "bamba": {"kv", "state"},
    "falcon_h1": {"kv", "state"},
}


def test_each_family_has_its_pools(each_family: LoadedModel) -> None:
    names = {pool.name for pool in make_pools(each_family).layout.pools}
    assert names == POOLS[each_family.path.name] | {"aux", "prompt_logprobs"}


def test_one_process_equals_generate(each_family: LoadedModel) -> None:
    pools = make_pools(each_family, order="NHD", chunk_tokens=32)
    poison(pools)
    with unified_scheduler(each_family, pools, CONFIG) as engine:
        requests = [greedy(make_prompt(length), 20, f"r{length}") for length in LENGTHS]
        callers = [call(engine, request) for request in requests]
        for request, caller in zip(requests, callers, strict=True):
            assert caller.wait().tokens == generate(each_family, request.prompt_tokens, 20)


@pytest.mark.parametrize(("source_page", "target_page"), [(16, 64), (64, 16)])
def test_a_hand_off_equals_generate(each_family: LoadedModel, source_page: int, target_page: int) -> None:
    sizes = {"chunk_tokens": 32}, {"chunk_tokens": 1}
    with pair(
        each_family,
        source={"page_size": source_page, **sizes[0]},
        target={"page_size": target_page, **sizes[1]},
    ) as both:
        requests = [both.request(room, length, 12) for room, length in enumerate(LENGTHS, start=1)]
        callers = [both.ask(request) for request in requests]
        for request, (first, answer) in zip(requests, callers, strict=True):
            expected = generate(each_family, request.prompt_tokens, 12)
            assert answer.wait().tokens == expected
            assert first.wait().tokens == expected[:1]
        both.assert_nothing_held()

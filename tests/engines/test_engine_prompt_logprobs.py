"""The logprobs of a prompt's own tokens: those of the model, and a pair's are those of one process."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from engine_kit import VOCABULARY, call, make_pools, make_prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine_handoff import CONFIG, pair

from kvbaton.errors import CapacityError, ConfigError, InternalError, KVBatonError, RemoteProtocolError
from kvbaton.serving.engine.limits import Limits
from kvbaton.serving.engine.model import LoadedModel
from kvbaton.serving.engine.pool import LEADER_POOLS
from kvbaton.serving.engine.prompt_logprobs import (
    check_records,
    checksum,
    no_records,
    prompt_tokens_of,
    records_of,
)
from kvbaton.serving.engine.request import MAX_TOP_LOGPROBS, PromptToken, Request, Sampling
from kvbaton.serving.engine.scheduler import SchedulerConfig
from kvbaton.serving.engine.unified import unified_scheduler

ROOMS = count(1)


def request_of(length: int, alternatives: int | None, **fields: object) -> Request:
    room = next(ROOMS)
    sampling = Sampling(**{"max_tokens": 3, "temperature": 0.0, "prompt_logprobs": alternatives, **fields})  # type: ignore[arg-type]
    return Request(request_id=f"r{room}", prompt_tokens=make_prompt(length, room), sampling=sampling)


def expected(model: LoadedModel, prompt: tuple[int, ...], alternatives: int) -> list[PromptToken]:
    with torch.inference_mode():
        logits = model.network(input_ids=torch.tensor([prompt])).logits[0].float()
    told = []
    for row, token in zip(logits.log_softmax(-1)[:-1], prompt[1:], strict=True):
        values, tokens = row.topk(alternatives)
        rank = int((row > row[token]).sum()) + 1
        told.append(PromptToken(float(row[token]), rank, tuple(zip(tokens.tolist(), values.tolist(), strict=True))))
    return told


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 100])
def test_they_are_the_models_own(model: LoadedModel, length: int) -> None:
    with unified_scheduler(model, make_pools(model), CONFIG) as alone:
        request = request_of(length, 3)
        outputs = call(alone, request).wait().outputs
    told, wanted = outputs[0].prompt_logprobs or (), expected(model, request.prompt_tokens, 3)
    assert [one.rank for one in told] == [one.rank for one in wanted]
    assert [[token for token, _ in one.top] for one in told] == [[token for token, _ in one.top] for one in wanted]
    assert [one.logprob for one in told] == pytest.approx([one.logprob for one in wanted], abs=1e-4)
    for one, token in zip(told, request.prompt_tokens[1:], strict=True):
        assert dict(one.top).get(token, one.logprob) == one.logprob, "one number, wherever it is told"
    assert not any(output.prompt_logprobs for output in outputs[1:])


def test_a_pair_tells_what_one_process_tells(model: LoadedModel) -> None:
    cached = SchedulerConfig(chunked_prefill_size=32, prefix_cache=True)
    with (
        unified_scheduler(model, make_pools(model), CONFIG) as alone,
        pair(model, source={"page_size": 16}, target={"page_size": 8}, decode_config=cached) as both,
    ):

        @settings(max_examples=20, deadline=None)
        @given(
            length=st.integers(1, 70),
            alternatives=st.sampled_from([None, 0, 1, 5, MAX_TOP_LOGPROBS]),
            choices=st.integers(1, 3),
        )
        def equal(length: int, alternatives: int | None, choices: int) -> None:
            request = request_of(length, alternatives, choices=choices, temperature=1.0, seed=1)
            theirs = call(alone, request).wait()
            for _ in range(2):  # the second time decode has the prompt in its prefix cache
                room = next(ROOMS)
                asked = replace(request, request_id=f"r{room}", room=room, sources=(both.source.address,))
                first, ours = both.ask(asked)
                assert ours.wait().answers() == theirs.answers()
                assert ours.outputs[0].prompt_logprobs == theirs.outputs[0].prompt_logprobs
                told = ours.outputs[0].prompt_logprobs
                assert told is None if alternatives is None else len(told or ()) == length - 1
                assert not first.wait().outputs[0].prompt_logprobs, "routers of SGLang put both halves' together"

        equal()


@pytest.mark.parametrize("family", ["gpt_oss", "falcon_h1", "deepseek_v3"])
def test_other_kinds_of_cache(loaded_models: dict[str, LoadedModel], family: str) -> None:
    model = loaded_models[family]
    with (
        unified_scheduler(model, make_pools(model, chunk_tokens=32), CONFIG) as alone,
        pair(model, source={"chunk_tokens": 32}, target={"chunk_tokens": 32}) as both,
    ):
        request = request_of(50, 2)
        theirs = call(alone, request).wait().outputs[0].prompt_logprobs
        _, ours = both.ask(replace(request, room=1, sources=(both.source.address,)))
        assert ours.wait().outputs[0].prompt_logprobs == theirs
        both.assert_nothing_held()


def test_requests_wait_for_record_pages_and_give_them_back(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvbaton.serving.engine.pool.MAX_RECORDS", 64)
    with pair(model) as both:
        asked = [replace(request_of(60, 1), room=100 + i, sources=(both.source.address,)) for i in range(6)]
        callers = [both.ask(request) for request in asked]
        for request, (_, answer) in zip(asked, callers, strict=True):
            assert [len(one.top) for one in answer.wait().outputs[0].prompt_logprobs or ()] == [1] * 59, request
        with pytest.raises(CapacityError, match=r"^prompt_logprobs: those of 65 tokens"):
            both.ask(replace(request_of(65, 1), room=99, sources=(both.source.address,)))
        both.assert_nothing_held()


def test_halves_that_were_asked_different_things_fail(model: LoadedModel) -> None:
    for asked, other in ((None, 1), (1, None)):
        with pair(model) as both:
            request = replace(request_of(40, other), room=7, sources=(both.source.address,))
            first = call(both.prefill, replace(request, sampling=replace(request.sampling, prompt_logprobs=asked)))
            last = call(both.decode, request).wait().last
            if other is not None:
                assert isinstance(last.error, KVBatonError)
                assert "prompt_logprobs" in last.error.message
            first.wait()
            both.assert_nothing_held()


def test_followers_are_given_what_the_leader_writes(model: LoadedModel) -> None:
    leader, follower = (make_pools(model, pages=8, page_size=4) for _ in range(2))
    table = leader.allocate(10, recorded=10)
    assert table is not None
    logits = torch.randn((9, VOCABULARY))
    records = records_of(logits, list(range(9)), 3)
    leader.write_records(table, 0, records[:4])
    leader.write_records(table, 4, records[4:])
    spans = leader.spans(table, 0, 10)
    for span in spans:
        for unit in span.units if span.pool in LEADER_POOLS else ():
            follower.write_unit(span.pool, unit, leader.read_unit(span.pool, unit))
    assert follower.read_records(table, 9).tobytes() == records.tobytes()
    leader.free(table)
    assert leader.record_pages.used == 0


def test_records_are_judged() -> None:
    def close(value: float) -> Any:
        return pytest.approx(value, abs=1e-3)

    logits = torch.tensor([[0.0, 2.0, 1.0], [float("-inf"), 0.0, -1.0]])
    records = records_of(logits, [2, 0], 2)
    assert prompt_tokens_of(records, 2)[0] == PromptToken(close(-1.4076), 2, ((1, close(-0.4076)), (2, close(-1.4076))))
    assert prompt_tokens_of(records, 0)[1] == PromptToken(-9999.0, 3), "JSON has no infinity"
    check_records(records, checksum(records), 3, 1)
    assert checksum(no_records(0)) == 0
    with pytest.raises(RemoteProtocolError, match="damaged"):
        check_records(records, checksum(records) ^ 1, 3, 1)
    for field in (records["rank"], records["top"]["token"]):
        before = field.flat[0]
        field.flat[0] = 4
        with pytest.raises(RemoteProtocolError, match="outside the vocabulary"):
            check_records(records, checksum(records), 3, 1)
        field.flat[0] = before
    with pytest.raises(InternalError, match="not finite"):
        records_of(torch.full((1, 3), np.nan), [1], 0)


@pytest.mark.parametrize("alternatives", [-1, MAX_TOP_LOGPROBS + 1])
def test_out_of_bounds_is_refused_by_name(alternatives: int) -> None:
    limits = Limits(max_positions=512, vocab_size=VOCABULARY, pool_tokens=512)
    with pytest.raises(ConfigError, match=r"^prompt_logprobs: "):
        limits.validate(request_of(3, alternatives))

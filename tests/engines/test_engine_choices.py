"""Several answers to one prompt, and what is told of alternatives: streams of their own, one hand-off, no page lost."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from engine_kit import PATIENCE_SECONDS, LoadedModels, call, generate, make_pools, make_prompt, poison
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine_handoff import CONFIG, Pair, pair

from kvbaton.errors import AbortedError, CapacityError, RemoteProtocolError
from kvbaton.serving.engine.decode import Decode
from kvbaton.serving.engine.generation import Generation
from kvbaton.serving.engine.model import LoadedModel
from kvbaton.serving.engine.request import Request, Sampling
from kvbaton.serving.engine.sampling import LEAST_LOGPROB, Draw, InternalError, first_tokens, pick_tokens
from kvbaton.serving.engine.scheduler import SchedulerConfig
from kvbaton.serving.engine.seed import seed_of_choice
from kvbaton.serving.engine.sequence_group import SequenceGroup, allocate_group, missing_pages, most_choices
from kvbaton.serving.engine.unified import unified_scheduler

#: A prompt within a page, one that fills its pages, several chunks and a part of a page.
LENGTHS = (3, 32, 75)


def sampled(room: int, length: int, count: int, choices: int, **fields: object) -> Request:
    given_: dict = {"temperature": 1.0, "seed": 40 + room, "ignore_eos": True, "max_tokens": count}
    sampling = Sampling(**{**given_, "choices": choices, **fields})
    return Request(request_id=f"r{room}", prompt_tokens=make_prompt(length, room), sampling=sampling)


def over(both: Pair, request: Request, room: int) -> Request:
    return replace(request, room=room, sources=(both.source.address,))


def alone(request: Request, index: int) -> Request:
    """One answer with the seed of answer ``index``, as a request by itself."""
    assert request.sampling.seed is not None
    seed = seed_of_choice(request.sampling.seed, index)
    return replace(request, request_id=f"alone{index}", sampling=replace(request.sampling, choices=1, seed=seed))


def test_seeds_of_choices_are_fixed_and_differ() -> None:
    assert [seed_of_choice(5, index) for index in range(3)] == [5, 16600579752620532860, 9299524258990887131]
    assert len({seed_of_choice(seed, index) for seed in range(50) for index in range(16)}) == 50 * 16


@pytest.mark.parametrize("length", LENGTHS)
def test_each_choice_is_what_its_seed_gives_alone(each_family: LoadedModel, length: int) -> None:
    pools = make_pools(each_family)
    poison(pools)
    with unified_scheduler(each_family, pools, CONFIG) as engine:
        request = sampled(1, length, 40, 4)
        singles = [call(engine, alone(request, index)).wait().tokens for index in range(4)]
        together = call(engine, request).wait()
        assert together.answers() == singles
        assert len(set(singles)) == 4
        ends = [output for output in together.outputs if output.ends_choice]
        assert [output.unfinished for output in ends] == [3, 2, 1, 0]
        assert {output.finish_reason for output in ends} == {"length"}
        assert engine.wait_quiet(PATIENCE_SECONDS)
        assert (engine.stats().pages_used, engine.stats().slots_used) == (0, 0)


@pytest.mark.parametrize("page_sizes", [(16, 16), (16, 8)])
def test_a_hand_off_gives_the_answers_of_one_process(each_family: LoadedModel, page_sizes: tuple[int, int]) -> None:
    pools = make_pools(each_family)
    sizes = [{"page_size": size} for size in page_sizes]
    with (
        unified_scheduler(each_family, pools, CONFIG) as engine,
        pair(each_family, source=sizes[0], target=sizes[1]) as both,
    ):
        for room, length in enumerate(LENGTHS, start=1):
            request = sampled(room, length, 20, 3, logprobs=True, top_logprobs=5)
            expected = call(engine, request).wait()
            first, answer = both.ask(over(both, request, room))
            assert answer.wait().answers() == expected.answers()
            assert first.wait().answers() == [tokens[:1] for tokens in expected.answers()]
            for index in range(3):
                ours, theirs = answer.choice(index), expected.choice(index)
                for mine, other in zip(ours, theirs, strict=True):
                    assert mine.logprobs == pytest.approx(other.logprobs, abs=1e-4)
                    assert len(mine.top_logprobs[0]) == 5
                    own, others = ([value for _, value in side.top_logprobs[0]] for side in (mine, other))
                    assert own == pytest.approx(others, abs=1e-4)
            assert [output.handoff is not None for output in answer.outputs[:2]] == [True, False]
        both.assert_nothing_held()


def test_greedy_choices_are_all_the_same(model: LoadedModel) -> None:
    with pair(model) as both:
        request = sampled(1, 50, 12, 4, temperature=0.0)
        _, answer = both.ask(over(both, request, 1))
        assert answer.wait().answers() == [generate(model, request.prompt_tokens, 12)] * 4
        both.assert_nothing_held()


def test_choices_that_end_with_the_hand_off(model: LoadedModel) -> None:
    with pair(model) as both:
        first, answer = both.ask(over(both, sampled(1, 20, 1, 16), 1))
        assert answer.wait().answers() == first.wait().answers()
        assert [len(tokens) for tokens in answer.answers()] == [1] * 16
        both.assert_nothing_held()


def test_the_two_sides_must_be_asked_the_same(model: LoadedModel) -> None:
    with pair(model) as both:
        for room, changed in enumerate(({"choices": 2}, {"logprobs": True, "top_logprobs": 2}), start=1):
            request = over(both, sampled(room, 20, 5, 3), room)
            call(both.prefill, request)
            answer = call(both.decode, replace(request, sampling=replace(request.sampling, **changed))).wait()
            assert isinstance(answer.last.error, RemoteProtocolError)
            assert "send both the same request" in answer.last.error.message
            assert answer.last.final
        both.assert_nothing_held()


def test_many_through_nearly_full_pools(model: LoadedModel) -> None:
    """Each needs most of decode's pool, so that they take turns; none fails and none waits for ever."""
    requests = [sampled(room, 20 + 7 * room, 20 + 3 * room, 2 + room % 3) for room in range(8)]
    with unified_scheduler(model, make_pools(model), CONFIG) as engine:
        expected = [call(engine, request).wait().answers() for request in requests]
    with pair(model, source={"pages": 8, "aux_slots": 2}, target={"pages": 16, "aux_slots": 3}) as both:
        callers = [both.ask(over(both, request, room)) for room, request in enumerate(requests)]
        for (_, answer), answers in zip(callers, expected, strict=True):
            assert answer.wait().answers() == answers
        both.assert_nothing_held()
        with pytest.raises(CapacityError, match=r"^n: 16 answers"):
            call(both.decode, over(both, sampled(99, 30, 30, 16), 99))


def test_states_and_rings_bound_the_choices(loaded_models: LoadedModels) -> None:
    for family in ("gpt_oss", "qwen3_next"):
        pools = make_pools(loaded_models[family], aux_slots=3, chunk_tokens=16)
        with unified_scheduler(loaded_models[family], pools, SchedulerConfig(chunked_prefill_size=16)) as engine:
            assert len(call(engine, sampled(1, 100, 4, 3)).wait().answers()) == 3
            with pytest.raises(CapacityError, match=r"^n: 4 answers .* room for 3"):
                call(engine, sampled(2, 100, 4, 4))


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_abort_at_any_moment_returns_everything(model: LoadedModel, side: str) -> None:
    with pair(model, target={"pages": 64}) as both:
        schedulers = [both.prefill, both.decode] if side == "prefill" else [both.decode, both.prefill]
        for room in range(8):
            first, answer = both.ask(over(both, sampled(room, 100, 200, 4), room))
            if room % 2:
                assert answer.first.wait(PATIENCE_SECONDS)
            for scheduler in schedulers:
                scheduler.abort(f"r{room}")
            assert first.wait().last.final
            assert answer.wait().last.final
        both.assert_nothing_held()


def test_abort_in_one_process_returns_everything(model: LoadedModel) -> None:
    pools = make_pools(model, pages=64)
    with unified_scheduler(model, pools, CONFIG) as engine:
        running, waiting = call(engine, sampled(1, 40, 200, 4)), call(engine, sampled(2, 40, 200, 4))
        assert running.first.wait(PATIENCE_SECONDS)
        assert waiting.outputs == []  # there is no room for both
        engine.abort("r2")
        engine.abort("r1")
        for caller in (waiting, running):
            assert isinstance(caller.wait().last.error, AbortedError)
        assert engine.wait_quiet(PATIENCE_SECONDS)
        assert engine.stats().pages_used == 0


def test_one_choice_that_fails_ends_them_all(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    push = Generation.push

    def failing(self: Generation, *arguments: object) -> object:
        if self._index == 1 and len(self.cached_tokens) > 25:
            raise InternalError("no text for this token")
        return push(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Generation, "push", failing)
    with pair(model) as both:
        _, answer = both.ask(over(both, sampled(1, 20, 30, 3), 1))
        assert isinstance(answer.wait().last.error, InternalError)
        both.assert_nothing_held()


def test_a_prefix_cache_keeps_the_answers_of_choices(model: LoadedModel) -> None:
    """Choices share what the tree has, add what they have, and nothing is lost or evicted under one of them."""
    config = replace(CONFIG, prefix_cache=True)
    with pair(model, target={"pages": 24}, decode_config=config) as both:
        role = both.decode._role
        assert isinstance(role, Decode)
        assert role._prefixes is not None
        with unified_scheduler(model, make_pools(model), CONFIG) as engine:
            for room in range(12):
                request = sampled(room, 40 + 3 * room, 24, 1 + room % 4)
                if room % 3 == 2:  # what was asked before
                    request = replace(sampled(room - 1, 40 + 3 * (room - 1), 24, 3), request_id=f"r{room}")
                expected = call(engine, request).wait().answers()
                _, answer = both.ask(over(both, request, room))
                assert answer.wait().answers() == expected
            assert role._prefixes.hit_tokens > 0
            longer = (*request.prompt_tokens, *expected[-1])
            before = role._prefixes.hit_tokens
            again = Request(request_id="again", prompt_tokens=longer, sampling=Sampling(max_tokens=3, seed=1))
            _, answer = both.ask(over(both, again, 99))
            answer.wait()
            assert role._prefixes.hit_tokens - before >= len(longer) // 16 * 16 - 16, "an answer was not kept"
        both.assert_nothing_held()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 70), st.integers(1, 40), st.integers(1, 6)), min_size=1, max_size=8),
    st.integers(0, 99),
)
def test_forks_take_all_or_nothing_and_give_all_back(
    loaded_models: LoadedModels, asked: list[tuple[int, int, int]], seed: int
) -> None:
    rng = random.Random(seed)
    pools = make_pools(loaded_models["gpt_oss"], pages=24, aux_slots=6, page_size=8, chunk_tokens=8)
    live: list[tuple[SequenceGroup, list]] = []
    for prompt, answer, choices in asked:
        tokens = prompt + answer - 1
        if pools.pages_for(tokens) > 24 or choices > most_choices(pools, prompt, tokens):
            continue
        used, missing = pools.pages_used, missing_pages(pools, prompt, tokens, choices)
        sequences = allocate_group(pools, prompt, tokens, choices)
        if sequences is None:
            assert pools.pages_used == used
            assert live, "an empty pool has room for what most_choices allows"
        else:
            assert missing == 0
            own = [set(block_table.pages[sequences.common :]) for block_table in sequences.block_tables]
            assert sum(map(len, own)) == len(set().union(*own))
            assert len({block_table.pages[: sequences.common] for block_table in sequences.block_tables}) == 1
            live.append((sequences, list(sequences.block_tables)))
        if live and rng.random() < 0.5:
            sequences, block_tables = rng.choice(live)
            sequences.end(pools, block_tables.pop(rng.randrange(len(block_tables))))
            live = [each for each in live if each[1]]
    for sequences, block_tables in live:
        for block_table in block_tables:
            sequences.end(pools, block_table)
    assert (pools.pages_used, pools.pages_free) == (0, 24 + pools.rings.units if pools.rings else 24)


def test_alternatives_are_the_likeliest() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    logits[2, 10:] = -torch.inf
    draws = [Draw(Sampling(temperature=0.0, logprobs=True, top_logprobs=count), 1, 9) for count in (0, 4, 20)]
    picks = pick_tokens(logits, draws)
    expected = logits.log_softmax(-1).sort(descending=True)
    for row, (pick, count) in enumerate(zip(picks, (0, 4, 20), strict=True)):
        assert not isinstance(pick, InternalError)
        assert [token for token, _ in pick.top][:10] == expected.indices[row, : min(count, 10)].tolist()
        assert [value for _, value in pick.top][:10] == pytest.approx(expected.values[row, : min(count, 10)].tolist())
        assert len(pick.top) == count
    last = picks[2]
    assert not isinstance(last, InternalError)
    assert {value for _, value in last.top[10:]} == {LEAST_LOGPROB}


def test_more_alternatives_than_there_are_tokens() -> None:
    draws = [Draw(Sampling(logprobs=True, top_logprobs=20), seed, 1) for seed in range(3)]
    assert [len(pick.top) for pick in first_tokens(torch.zeros(1, 5), draws)] == [5, 5, 5]
    with pytest.raises(InternalError, match="not finite"):
        first_tokens(torch.full((1, 5), torch.nan), draws)

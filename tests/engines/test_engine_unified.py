"""The unified engine against transformers' own generate(), and against itself in other company."""

from __future__ import annotations

import threading

import pytest
from engine_kit import Caller, call, generate, greedy, make_pools, make_prompt, poison

from kvbaton.errors import AbortedError, ConfigError, InternalError
from kvbaton.serving.engine.model import LoadedModel
from kvbaton.serving.engine.request import Output, Request, Sampling
from kvbaton.serving.engine.scheduler import SchedulerConfig
from kvbaton.serving.engine.unified import unified_scheduler

PAGE = 16
#: One token, k pages, k pages and one, several chunks, and what lies between.
LENGTHS = (1, 5, PAGE, PAGE + 1, 3 * PAGE, 3 * PAGE + 1, 100, 2 * 32, 5 * 32 + 7)
SMALL_CHUNKS = SchedulerConfig(chunked_prefill_size=32)


@pytest.mark.parametrize("order", ["HND", "NHD"])
def test_greedy_tokens_equal_generate(any_model: LoadedModel, order: str) -> None:
    pools = make_pools(any_model, order=order)
    with unified_scheduler(any_model, pools, SMALL_CHUNKS) as engine:
        for length in LENGTHS:
            prompt = make_prompt(length)
            assert call(engine, greedy(prompt, 20)).wait().tokens == generate(any_model, prompt, 20), length


@pytest.mark.parametrize("page_size", [1, 7, 64])
def test_page_size_does_not_change_tokens(model: LoadedModel, page_size: int) -> None:
    pools = make_pools(model, page_size=page_size, pages=512 // page_size + 8)
    with unified_scheduler(model, pools, SMALL_CHUNKS) as engine:
        for length in (1, 63, 64, 65):
            prompt = make_prompt(length)
            assert call(engine, greedy(prompt, 12)).wait().tokens == generate(model, prompt, 12), length


def test_sixteen_at_once_equal_their_single_runs(any_model: LoadedModel) -> None:
    prompts = {f"r{i}": make_prompt(1 + i * 11, i) for i in range(16)}
    with unified_scheduler(any_model, make_pools(any_model), SMALL_CHUNKS) as engine:
        callers = {name: call(engine, greedy(prompt, 4 + i, name)) for i, (name, prompt) in enumerate(prompts.items())}
        for i, (name, prompt) in enumerate(prompts.items()):
            assert callers[name].wait().tokens == generate(any_model, prompt, 4 + i), name
            assert callers[name].last.finish_reason == "length"
        assert engine.wait_quiet(5)
        assert engine.stats().pages_used == 0


def test_short_prompts_share_a_round_and_equal_ones_a_pass(
    any_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = {f"r{i}": make_prompt(length, i) for i, length in enumerate((12, 12, 12, 9, 11, 40, 40))}
    engine = unified_scheduler(any_model, make_pools(any_model), SMALL_CHUNKS)
    runner, passes = engine._role._runner, []
    forward = runner.forward
    monkeypatch.setattr(
        runner, "forward", lambda rows, *rest, **named: passes.append(rows) or forward(rows, *rest, **named)
    )
    callers = {name: call(engine, greedy(prompt, 3, name)) for name, prompt in prompts.items()}
    with engine:  # it starts when all have come
        for name, prompt in prompts.items():
            assert callers[name].wait().tokens == generate(any_model, prompt, 3), name
    rounds = [[12, 12], [1, 1], [12], [9], [11], [1] * 5, [32], [1] * 3, [8], [1], [32], [1], [8], [1], [1]]
    assert [[len(row) for row in rows] for rows in passes] == rounds


def test_a_prompt_that_fails_does_not_disturb_those_beside_it(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = unified_scheduler(model, make_pools(model))
    callers = [call(engine, greedy(make_prompt(20, i), 4, f"r{i}")) for i in range(4)]
    runner, bad = engine._role._runner, make_prompt(20, 2)[-1]
    stage = runner._stage

    def poisoned(tokens: list[list[int]], *rest: object, **named: object) -> object:
        if any(row[-1] == bad for row in tokens):
            raise ValueError("poisoned")
        return stage(tokens, *rest, **named)

    monkeypatch.setattr(runner, "_stage", poisoned)
    with engine:
        assert isinstance(callers[2].wait().last.error, InternalError)
        for i in (0, 1, 3):
            assert callers[i].wait().tokens == generate(model, make_prompt(20, i), 4)
        assert engine.wait_quiet(5)
        assert engine.stats().pages_used == 0


def test_more_requests_than_the_batch_holds(model: LoadedModel) -> None:
    prompts = {f"r{i}": make_prompt(3 + i, i) for i in range(7)}
    with unified_scheduler(model, make_pools(model), SchedulerConfig(max_batch=2)) as engine:
        callers = {name: call(engine, greedy(prompt, 9, name)) for name, prompt in prompts.items()}
        for name, prompt in prompts.items():
            assert callers[name].wait().tokens == generate(model, prompt, 9)


def test_sampled_tokens_do_not_depend_on_the_company(model: LoadedModel) -> None:
    def request(i: int) -> Request:
        sampling = Sampling(max_tokens=16, temperature=0.9, top_p=0.8, seed=i, ignore_eos=True, logprobs=True)
        return Request(request_id=f"r{i}", prompt_tokens=make_prompt(4 + 9 * i, i), sampling=sampling)

    with unified_scheduler(model, make_pools(model), SMALL_CHUNKS) as engine:
        alone = [call(engine, request(i)).wait() for i in range(12)]
        together = [call(engine, request(i)) for i in range(12)]
        for one, other in zip(alone, together, strict=True):
            assert other.wait().tokens == one.tokens
            assert other.logprobs == pytest.approx(one.logprobs, abs=1e-4)
    assert len({caller.tokens for caller in alone}) == 12


def test_without_a_seed_the_request_id_is_the_seed(model: LoadedModel) -> None:
    def ask(name: str) -> tuple[int, ...]:
        sampling = Sampling(max_tokens=12, ignore_eos=True)
        return call(engine, Request(request_id=name, prompt_tokens=(1, 2, 3), sampling=sampling)).wait().tokens

    with unified_scheduler(model, make_pools(model)) as engine:
        assert ask("a") == ask("a") != ask("b")


def test_eos_ends_an_answer_unless_ignored(model: LoadedModel) -> None:
    prompt = make_prompt(20)
    expected = generate(model, prompt, 12)
    end = expected[6]
    ending = LoadedModel(
        **{name: getattr(model, name) for name in model.__slots__ if name != "eos_tokens"}, eos_tokens=frozenset([end])
    )
    with unified_scheduler(ending, make_pools(model)) as engine:
        sampling = Sampling(max_tokens=12, temperature=0.0)
        caller = call(engine, Request(request_id="x", prompt_tokens=prompt, sampling=sampling)).wait()
        assert caller.tokens == expected[: expected.index(end) + 1]
        assert caller.last.finish_reason == "stop"
        ignoring = call(engine, greedy(prompt, 12)).wait()
        assert ignoring.tokens == expected
        assert ignoring.last.finish_reason == "length"


def test_stop_string_ends_an_answer_and_is_not_shown(model: LoadedModel) -> None:
    prompt = make_prompt(20)
    with unified_scheduler(model, make_pools(model)) as engine:
        whole = call(engine, greedy(prompt, 30)).wait().text
        stop = whole[8:11]
        sampling = Sampling(max_tokens=30, temperature=0.0, ignore_eos=True, stop=("never there", stop))
        caller = call(engine, Request(request_id="s", prompt_tokens=prompt, sampling=sampling)).wait()
    assert caller.text == whole[: whole.index(stop)]
    assert caller.last.finish_reason == "stop"
    assert len(caller.tokens) < 30


def test_logprobs_only_where_asked(model: LoadedModel) -> None:
    with unified_scheduler(model, make_pools(model)) as engine:
        assert call(engine, greedy((1, 2), 5)).wait().logprobs == ()
        sampling = Sampling(max_tokens=5, temperature=0.0, ignore_eos=True, logprobs=True)
        caller = call(engine, Request(request_id="l", prompt_tokens=(1, 2), sampling=sampling)).wait()
    assert len(caller.logprobs) == 5
    assert all(value <= 0 for value in caller.logprobs)


def test_abort_ends_at_every_stage_and_returns_all_pages(model: LoadedModel) -> None:
    pools = make_pools(model, pages=32)
    with unified_scheduler(model, pools, SMALL_CHUNKS) as engine:
        running = Caller()
        engine.submit(greedy(make_prompt(20), 480, "running"), running)  # 499 tokens: all of the pool
        assert running.first.wait(30)
        waiting = call(engine, greedy(make_prompt(30), 10, "waiting"))
        engine.abort("waiting")
        assert isinstance(waiting.wait().last.error, AbortedError)
        assert waiting.tokens == ()
        engine.abort("running")
        engine.abort("nobody")
        assert isinstance(running.wait().last.error, AbortedError)
        assert engine.wait_quiet(5)
        assert (engine.stats().pages_used, engine.stats().pages_free) == (0, 32)


def test_full_pool_makes_requests_wait_not_fail(model: LoadedModel) -> None:
    pools = make_pools(model, pages=6)
    prompts = {f"r{i}": make_prompt(40 + i, i) for i in range(6)}
    with unified_scheduler(model, pools, SMALL_CHUNKS) as engine:
        callers = {name: call(engine, greedy(prompt, 20, name)) for name, prompt in prompts.items()}
        for name, prompt in prompts.items():
            assert callers[name].wait().tokens == generate(model, prompt, 20)
        assert engine.stats().pages_used == 0


def test_used_pages_do_not_leak_into_the_next_request(model: LoadedModel) -> None:
    pools = make_pools(model, pages=4)
    poison(pools)
    with unified_scheduler(model, pools) as engine:
        for length in (60, 3, 17):
            prompt = make_prompt(length)
            assert call(engine, greedy(prompt, 4)).wait().tokens == generate(model, prompt, 4)


def test_a_failing_request_does_not_disturb_the_others(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with unified_scheduler(model, make_pools(model)) as engine:
        runner = engine._role._runner
        decode = runner.decode

        def poisoned(batch: list) -> object:
            if any(step.position == 66 for step in batch):
                raise InternalError("poisoned")
            return decode(batch)

        monkeypatch.setattr(runner, "decode", poisoned)
        good = [call(engine, greedy(make_prompt(4 + i, i), 20, f"good{i}")) for i in range(3)]
        bad = call(engine, greedy(make_prompt(60), 20, "bad"))
        assert isinstance(bad.wait().last.error, InternalError)
        assert len(bad.tokens) == 7
        for i, caller in enumerate(good):
            assert caller.wait().tokens == generate(model, make_prompt(4 + i, i), 20)
        assert engine.wait_quiet(5)
        assert engine.stats().pages_used == 0


def test_a_model_that_raises_ends_one_request(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with unified_scheduler(model, make_pools(model)) as engine:
        monkeypatch.setattr(engine._role._runner, "_network", lambda **_: 1 / 0)
        failed = call(engine, greedy((1, 2), 4, "a")).wait()
        assert isinstance(failed.last.error, InternalError)
        monkeypatch.undo()
        assert call(engine, greedy((1, 2), 4, "b")).wait().tokens == generate(model, (1, 2), 4)
        assert engine.stats().pages_used == 0


def test_a_caller_that_raises_is_dropped(model: LoadedModel, caplog: pytest.LogCaptureFixture) -> None:
    called = threading.Event()

    def gone(_: Output) -> None:
        called.set()
        raise RuntimeError("event loop is closed")

    with unified_scheduler(model, make_pools(model)) as engine:
        engine.submit(greedy((1, 2, 3), 200, "gone"), gone)
        assert called.wait(30)
        assert engine.wait_quiet(30)
        assert engine.stats().pages_used == 0
        assert call(engine, greedy((1, 2), 4, "b")).wait().tokens == generate(model, (1, 2), 4)
    assert caplog.text.count("cannot be reached") == 1


def test_a_request_id_is_free_again_when_its_answer_has_ended(model: LoadedModel) -> None:
    with unified_scheduler(model, make_pools(model)) as engine:
        first = call(engine, greedy((1, 2), 300, "same"))
        with pytest.raises(ConfigError, match="request_id"):
            call(engine, greedy((1, 2), 3, "same"))
        engine.abort("same")
        first.wait()
        assert call(engine, greedy((1, 2), 3, "same")).wait().tokens == generate(model, (1, 2), 3)

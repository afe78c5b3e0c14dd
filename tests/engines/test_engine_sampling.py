"""A pair picks what one process picks, first token included, however it is asked to."""

from __future__ import annotations

from dataclasses import replace
from itertools import count

import pytest
from engine_kit import EOS, VOCABULARY, call, make_pools, make_prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine_handoff import CONFIG, Pair, pair

from kvbaton.errors import ConfigError
from kvbaton.serving.engine.limits import Limits
from kvbaton.serving.engine.model import LoadedModel
from kvbaton.serving.engine.request import Request, Sampling
from kvbaton.serving.engine.scheduler import Scheduler
from kvbaton.serving.engine.unified import unified_scheduler

tokens = st.integers(0, VOCABULARY - 1)
samplings = st.builds(
    Sampling,
    max_tokens=st.integers(8, 20),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_p=st.sampled_from([0.2, 0.9, 1.0]),
    seed=st.integers(0, 1000),
    stop=st.lists(st.sampled_from(["a", "ab", "\n"]), max_size=2).map(tuple),
    ignore_eos=st.booleans(),
    logprobs=st.just(True),
    choices=st.integers(1, 3),
    top_k=st.sampled_from([0, 1, 4, 50, 1000]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 0.7, 1.3, 3.0]),
    frequency_penalty=st.sampled_from([0.0, -1.0, 0.5, 2.0]),
    presence_penalty=st.sampled_from([0.0, -1.0, 1.5]),
    logit_bias=st.dictionaries(tokens, st.floats(-100, 100), max_size=3).map(lambda found: tuple(found.items())),
    min_tokens=st.integers(0, 8),
    stop_token_ids=st.lists(tokens, max_size=20).map(tuple),
    skip_special_tokens=st.booleans(),
    include_stop=st.booleans(),
)
ROOMS = count(1)
EXAMPLES = 25


def test_a_pair_equals_one_process(model: LoadedModel) -> None:
    with (
        unified_scheduler(model, make_pools(model), CONFIG) as alone,
        pair(model, source={"page_size": 16}, target={"page_size": 8}) as both,
    ):

        @settings(max_examples=EXAMPLES, deadline=None)
        @given(sampling=samplings, length=st.integers(1, 50))
        def equal(sampling: Sampling, length: int) -> None:
            compare(alone, both, sampling, length)

        equal()
        both.assert_nothing_held()


def compare(alone: Scheduler, both: Pair, sampling: Sampling, length: int) -> None:
    room = next(ROOMS)
    request = Request(request_id=f"r{room}", prompt_tokens=make_prompt(length, room), sampling=sampling)
    expected = call(alone, request).wait()
    first, answer = both.ask(replace(request, room=room, sources=(both.source.address,)))
    assert answer.wait().answers() == expected.answers()
    assert first.wait().answers() == [choice[:1] for choice in expected.answers()]
    for index in range(sampling.choices):
        ours, theirs = answer.choice(index), expected.choice(index)
        assert [output.text for output in ours] == [output.text for output in theirs]
        assert (ours[-1].finish_reason, ours[-1].matched) == (theirs[-1].finish_reason, theirs[-1].matched)


def ask(engine: Scheduler, **fields: object) -> tuple[int, ...]:
    sampling = Sampling(**{"temperature": 0.0, "max_tokens": 12, **fields})  # type: ignore[arg-type]
    return call(engine, Request(request_id="one", prompt_tokens=make_prompt(9), sampling=sampling)).wait().tokens


def test_each_setting_does_what_it_says(model: LoadedModel) -> None:
    with unified_scheduler(model, make_pools(model), CONFIG) as alone:
        plain = ask(alone, ignore_eos=True)
        assert ask(alone, logit_bias=((7, 100.0),)) == (7,) * 12
        late = ask(alone, logit_bias=((EOS, 100.0),), min_tokens=4)
        assert (EOS in late[:4], late[4:]) == (False, (EOS,))
        assert ask(alone, ignore_eos=True, stop_token_ids=(plain[2],)) == plain[: plain.index(plain[2]) + 1]
        assert ask(alone, ignore_eos=True, temperature=1.0, top_k=1, seed=3) == plain
        assert ask(alone, ignore_eos=True, temperature=1.0, min_p=1.0, seed=3) == plain


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("top_k", -1),
        ("min_p", 1.5),
        ("min_p", float("nan")),
        ("repetition_penalty", 0.0),
        ("frequency_penalty", 2.5),
        ("presence_penalty", -3.0),
        ("min_tokens", 17),
        ("stop_token_ids", (300,)),
        ("stop_token_ids", (1,) * 65),
        ("logit_bias", ((-1, 1.0),)),
        ("logit_bias", ((1, 101.0),)),
        ("logit_bias", ((1, 1.0),) * 1025),
    ],
)
def test_what_is_out_of_bounds_names_its_field(field: str, value: object) -> None:
    limits = Limits(max_positions=512, vocab_size=VOCABULARY, pool_tokens=512)
    sampling = Sampling(**{field: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=rf"^{field}: "):
        limits.validate(Request(request_id="r", prompt_tokens=(1,), sampling=sampling))

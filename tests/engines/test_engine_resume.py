"""An answer that goes on in another engine: the same tokens, text, logprobs and end as if nothing had happened.

The first engine's answer is cut at every place, and a fresh pair is given the prompt and what was answered.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from engine_kit import PATIENCE_SECONDS, Caller, call, make_pools, make_prompt
from stand_in import Wire
from test_engine_pair import CONFIG, SOURCES, ask_for, pair

from kvbaton.errors import AbortedError, ConfigError, PeerLostError, RemoteProtocolError
from kvbaton.serving.engine.decode import decode_scheduler
from kvbaton.serving.engine.model import LoadedModel
from kvbaton.serving.engine.prefill import prefill_scheduler
from kvbaton.serving.engine.request import HandedOnError, Request
from kvbaton.serving.engine.scheduler import Scheduler
from kvbaton.serving.engine.seed import seed_of, seed_of_choice
from kvbaton.serving.engine.unified import unified_scheduler

PENALTIES = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.3, "min_tokens": 6}
HOWS = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "top_p": 0.9, "seed": 42, "logprobs": True, "top_logprobs": 3},
    "unseeded": {"temperature": 1.5},
    "penalties": {"temperature": 0.7, "seed": 1, **PENALTIES},
    "greedy penalties": {**PENALTIES, "logit_bias": ((7, 2.0), (9, -50.0))},
}
_rooms = itertools.count(1000)


def whole(model: LoadedModel, request: Request) -> Caller:
    with unified_scheduler(model, make_pools(model), CONFIG) as engine:
        return call(engine, request).wait()


def rest_of(request: Request, told: tuple[int, ...], choice: int = 0) -> Request:
    """The request that goes on behind ``told``, in another room."""
    sampling = replace(request.sampling, seed=seed_of_choice(seed_of(request), choice), choices=1)
    room = next(_rooms)
    return replace(
        request,
        request_id=f"rest-{room}",
        prompt_tokens=(*request.prompt_tokens, *told),
        answered=len(told),
        sampling=sampling,
        room=room,
        sources=SOURCES,
    )


def assert_same_end(answer: Caller, expected: Caller, choice: int, cut: int) -> None:
    outputs = expected.choice(choice)
    assert answer.tokens == tuple(token for output in outputs for token in output.tokens)[cut:]
    assert answer.text == "".join(output.text for output in outputs[cut:])
    assert answer.logprobs == pytest.approx([v for output in outputs for v in output.logprobs][cut:], abs=1e-4)
    tops = [[token for token, _ in top] for output in outputs for top in output.top_logprobs]
    assert [[token for token, _ in top] for output in answer.outputs for top in output.top_logprobs] == tops[cut:]
    last = outputs[-1]
    assert (answer.last.finish_reason, answer.last.matched) == (last.finish_reason, last.matched)
    assert answer.last.error is None


@pytest.mark.parametrize("how", HOWS)
def test_an_answer_cut_anywhere_goes_on_as_it_would_have(model: LoadedModel, how: str) -> None:
    request = ask_for(1, 21, 9, **HOWS[how])
    expected = whole(model, request)
    with pair(model) as both:
        for cut in (1, 2, 5, 8):
            rest = rest_of(request, expected.tokens[:cut])
            first, answer = both.ask(rest)
            assert_same_end(answer.wait(), expected, 0, cut)
            assert first.wait().tokens == expected.tokens[cut : cut + 1]
        both.assert_nothing_held()


def test_a_stop_string_and_a_character_across_the_seam_are_found(model: LoadedModel) -> None:
    """A random model's bytes are unfinished characters more often than not, and the cuts fall into the stop string."""
    plain = whole(model, ask_for(2, 9, 24, temperature=1.0, seed=5))
    stop = plain.text[6:11]
    assert len(stop) == 5
    request = ask_for(2, 9, 24, temperature=1.0, seed=5, stop=(stop, "never said"))
    expected = whole(model, request)
    assert expected.last.matched == stop
    with pair(model) as both:
        for cut in range(4, len(expected.tokens)):  # among them those within the stop string
            answer = both.ask(rest_of(request, expected.tokens[:cut]))[1].wait()
            assert_same_end(answer, expected, 0, cut)


def test_each_of_several_choices_goes_on_by_itself(model: LoadedModel) -> None:
    request = ask_for(3, 30, 8, temperature=1.5, seed=9, choices=4, logprobs=True, top_logprobs=2)
    expected = whole(model, request)
    answers = expected.answers()
    assert len(set(answers)) == 4
    with pair(model) as both:
        parts = [rest_of(request, tokens[: 2 + choice], choice) for choice, tokens in enumerate(answers)]
        callers = [both.ask(part)[1] for part in parts]
        for choice, caller in enumerate(callers):
            assert_same_end(caller.wait(), expected, choice, 2 + choice)
        both.assert_nothing_held()


class Middle:
    """The manager of a decode engine that hands on: a target on one wire, a source on the next."""

    def __init__(self, before: Wire, after: Wire) -> None:
        self.wakeup = after.prefill.wakeup = before.decode.wakeup
        self.receiver = before.decode.receiver
        self.sender = after.prefill.sender


@contextmanager
def chain(model: LoadedModel, **target: object) -> Iterator[tuple[Scheduler, Scheduler, Scheduler, Wire]]:
    """Prefill, a decode engine, and another one that takes over from it; and the wire between those."""
    pools = make_pools(model), make_pools(model), make_pools(model, **target)
    before, after = Wire(*pools[:2]), Wire(*pools[1:])
    with (
        prefill_scheduler(model, pools[0], before.prefill, CONFIG) as prefill,
        decode_scheduler(model, pools[1], Middle(before, after), CONFIG) as old,
        decode_scheduler(model, pools[2], after.decode, CONFIG) as new,
    ):
        try:
            yield prefill, old, new, after
        finally:
            after.release()


def assert_at_rest(*engines: Scheduler) -> None:
    for engine in engines:
        assert engine.wait_quiet(10)
        stats = engine.stats()
        assert (stats.pages_used, stats.slots_used, sum(stats.queues.values())) == (0, 0, 0)


def test_an_answer_goes_on_in_another_engine_with_its_cache(any_model: LoadedModel) -> None:
    request = ask_for(6, 21, 40, **HOWS["penalties"])
    expected = whole(any_model, request)
    with chain(any_model, page_size=5) as (prefill, old, new, _):
        call(prefill, request)
        begun = call(old, request)
        assert begun.first.wait(10)
        old.hand_on([request.request_id], 7000)
        answer = rest_after(begun, request, new, 7000)
        assert isinstance(begun.wait().last.error, HandedOnError)
        assert_same_end(answer.wait(), expected, 0, len(begun.tokens))
        assert begun.tokens == expected.tokens[: len(begun.tokens)]
        assert_at_rest(prefill, old, new)


def rest_after(begun: Caller, request: Request, new: Scheduler, room: int, choice: int = 0) -> Caller:
    """Once the old engine says no more, ask the new one for the rest."""
    assert begun.departing.wait(PATIENCE_SECONDS), begun.outputs[-2:]
    told = tuple(token for output in begun.choice(choice) for token in output.tokens)
    return call(new, replace(rest_of(request, told, choice), room=room))


def test_choices_depart_each_in_a_room_of_its_own(model: LoadedModel) -> None:
    request = ask_for(8, 30, 50, temperature=1.5, seed=9, choices=3, logprobs=True, top_logprobs=2)
    expected = whole(model, request)
    with chain(model) as (prefill, old, new, _):
        call(prefill, request)
        begun = call(old, request)
        assert begun.first.wait(10)
        old.hand_on([request.request_id], 7100)
        rests = [rest_after(begun, request, new, 7100 + choice, choice) for choice in range(3)]
        for choice, rest in enumerate(rests):
            told = sum(len(output.tokens) for output in begun.choice(choice))
            assert_same_end(rest.wait(), expected, choice, told)
        assert isinstance(begun.wait().last.error, HandedOnError)
        assert_at_rest(prefill, old, new)


def test_who_takes_nothing_over_gets_nothing_and_the_pages_come_back(model: LoadedModel) -> None:
    """The new engine fails, or the caller leaves: the old one tells so, and holds nothing."""
    for number, ends in enumerate((True, False)):
        request = ask_for(20 + number, 21, 60)
        with chain(model) as (prefill, old, _new, wire):
            call(prefill, request)
            begun = call(old, request)
            assert begun.first.wait(10)
            old.hand_on([request.request_id], 7200)
            assert begun.departing.wait(PATIENCE_SECONDS)
            if ends:
                wire.fail(7200, PeerLostError("the new decode rank went away", room=7200))
            else:
                old.abort(request.request_id)
            assert isinstance(begun.wait().last.error, PeerLostError if ends else AbortedError)
            assert_at_rest(prefill, old)


def test_what_has_not_begun_stays(model: LoadedModel) -> None:
    request = ask_for(9, 21, 6)
    with chain(model) as (prefill, old, _new, _wire):
        begun = call(old, request)
        old.hand_on([request.request_id, "nobody"], 7300)
        call(prefill, request)
        assert begun.wait().tokens == whole(model, request).tokens
        assert_at_rest(prefill, old)


def test_what_cannot_go_on_is_refused(model: LoadedModel) -> None:
    request = ask_for(4, 10, 5)
    told = whole(model, request).tokens
    with pair(model) as both:
        for bad in (rest_of(request, told), replace(rest_of(request, told[:2]), answered=12)):
            with pytest.raises(ConfigError):
                both.decode.submit(bad, Caller())
        stop = make_prompt(1, 77)[0]
        ended = rest_of(ask_for(5, 10, 5, stop_token_ids=(stop,), ignore_eos=False), (stop,))
        assert isinstance(both.ask(ended)[1].wait().last.error, RemoteProtocolError)
        both.assert_nothing_held()

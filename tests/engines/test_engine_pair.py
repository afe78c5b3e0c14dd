"""The prefill and decode schedulers over a stand-in for the facade: tokens, queues, leases, failures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from engine_kit import Caller, call, generate, greedy, make_pools, make_prompt
from stand_in import End, Wire

from kvbaton.errors import (
    AbortedError,
    ConfigError,
    InternalError,
    LocalProtocolError,
    OverloadedError,
    PeerLostError,
    RemoteProtocolError,
)
from kvbaton.serving.engine.decode import decode_scheduler
from kvbaton.serving.engine.model import LoadedModel
from kvbaton.serving.engine.pool import Pools
from kvbaton.serving.engine.prefill import prefill_scheduler
from kvbaton.serving.engine.request import Handoff, Request, Sampling
from kvbaton.serving.engine.scheduler import Scheduler, SchedulerConfig
from kvbaton.serving.engine.unified import unified_scheduler

CONFIG = SchedulerConfig(chunked_prefill_size=32)
SOURCES = ("memory://prefill",)


@dataclass
class Pair:
    wire: Wire
    source: Pools
    target: Pools
    prefill: Scheduler
    decode: Scheduler

    def ask(self, request: Request) -> tuple[Caller, Caller]:
        return call(self.prefill, request), call(self.decode, request)

    def assert_nothing_held(self) -> None:
        for scheduler in (self.prefill, self.decode):
            assert scheduler.wait_quiet(10)
            stats = scheduler.stats()
            assert (stats.pages_used, stats.pages_leased, stats.slots_used) == (0, 0, 0)
            assert not any(stats.queues.values())


@contextmanager
def pair(
    model: LoadedModel, *, prefix_len: int = 0, source: dict | None = None, target: dict | None = None
) -> Iterator:
    pools = make_pools(model, **(source or {})), make_pools(model, **(target or {}))
    wire = Wire(*pools, prefix_len=prefix_len)
    with (
        prefill_scheduler(model, pools[0], wire.prefill, CONFIG) as prefill,
        decode_scheduler(model, pools[1], wire.decode, CONFIG) as decode,
    ):
        try:
            yield Pair(wire, *pools, prefill, decode)
        finally:
            wire.release()


def ask_for(room: int, length: int, count: int, **sampling: object) -> Request:
    fields: dict = {"temperature": 0.0, "ignore_eos": True, "max_tokens": count, **sampling}
    return Request(
        request_id=f"r{room}",
        prompt_tokens=make_prompt(length, room),
        sampling=Sampling(**fields),
        room=room,
        sources=SOURCES,
    )


def test_every_layer_goes_ahead_of_its_chunk(model: LoadedModel) -> None:
    """Also those of the last chunk; what arrives is what the layers were when they went."""
    with pair(model) as both:
        request = ask_for(1, 100, 12)
        _, answer = both.ask(request)
        assert answer.wait().tokens == generate(model, request.prompt_tokens, 12)
        sender = both.wire.senders[1]
        chunks = [span for spans, _ in sender.spans for span in spans if span.pool == "kv"]
        assert [(span.token_start, span.token_stop) for span in chunks] == [(0, 32), (32, 64), (64, 96), (96, 100)]
        assert list(sender.ahead) == [(span, layer) for span in chunks for layer in range(model.geometry.layers)]


@pytest.mark.parametrize("target_page_size", [16, 64, 5])
def test_tokens_equal_generate(any_model: LoadedModel, target_page_size: int) -> None:
    with pair(any_model, target={"page_size": target_page_size}) as both:
        for room, length in enumerate((1, 16, 17, 32, 33, 100), start=1):
            request = ask_for(room, length, 12)
            first, answer = both.ask(request)
            expected = generate(any_model, request.prompt_tokens, 12)
            assert answer.wait().tokens == expected, length
            assert answer.last.finish_reason == "length"
            assert answer.outputs[0].handoff == Handoff(bytes=4096, seconds=0.25, exposed_seconds=0.125)
            assert first.wait().tokens == expected[:1]
            assert first.last.finish_reason == "length"
        both.assert_nothing_held()


def test_many_rooms_at_once_with_small_pools(model: LoadedModel) -> None:
    requests = [ask_for(room, 3 + 13 * room, 5 + room) for room in range(12)]
    small = {"pages": 14, "aux_slots": 2}
    with pair(model, source=small, target=small) as both:
        callers = [both.ask(request) for request in requests]
        for request, (first, answer) in zip(requests, callers, strict=True):
            expected = generate(model, request.prompt_tokens, request.sampling.max_tokens)
            assert answer.wait().tokens == expected
            assert first.wait().tokens == expected[:1]
        both.assert_nothing_held()


@pytest.mark.parametrize("seed", [None, 42])
def test_sampled_tokens_equal_one_process(model: LoadedModel, seed: int | None) -> None:
    request = ask_for(3, 50, 20, temperature=1.0, top_p=0.9, seed=seed, logprobs=True)
    with unified_scheduler(model, make_pools(model), CONFIG) as engine:
        expected = call(engine, request).wait()
    with pair(model) as both:
        # The two legs of an unseeded request have ids of their own: decode goes on with prefill's sequence.
        fields = {"prompt_tokens": request.prompt_tokens, "sampling": request.sampling, "room": 3, "sources": SOURCES}
        call(both.prefill, request)
        answer = call(both.decode, Request(request_id="another", **fields)).wait()
        assert answer.tokens == expected.tokens
        assert answer.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


def test_one_token_answers_end_with_the_hand_off(model: LoadedModel) -> None:
    with pair(model) as both:
        request = ask_for(1, 20, 1)
        _, answer = both.ask(request)
        assert answer.wait().tokens == generate(model, request.prompt_tokens, 1)
        assert answer.last.finish_reason == "length"
        both.assert_nothing_held()


def test_chunks_leave_as_they_are_computed_and_end_on_pages(model: LoadedModel) -> None:
    with pair(model) as both:
        for caller in both.ask(ask_for(1, 100, 2)):
            caller.wait()
        sent = both.wire.senders[1].spans
    ranges = [(span.token_start, span.token_stop) for spans, _ in sent for span in spans if span.pool == "kv"]
    assert ranges == [(0, 32), (32, 64), (64, 96), (96, 100)]
    assert [[span.pool for span in spans] for spans, _ in sent] == [["kv"], ["kv"], ["kv"], ["kv", "aux"]]
    assert [last for _, last in sent] == [False, False, False, True]


@pytest.mark.parametrize(("prefix", "ranges"), [(40, [(40, 64), (64, 96), (96, 100)]), (100, [])])
def test_what_the_target_holds_is_not_sent(model: LoadedModel, prefix: int, ranges: list) -> None:
    with pair(model, prefix_len=prefix) as both:
        for caller in both.ask(ask_for(1, 100, 2)):
            caller.wait()
        sent: End = both.wire.senders[1]
    assert [(s.token_start, s.token_stop) for spans, _ in sent.spans for s in spans if s.pool == "kv"] == ranges
    assert sent.spans[-1][0][-1].pool == "aux"


def test_pages_stay_leased_after_a_failure_until_the_wire_is_quiet(model: LoadedModel) -> None:
    with pair(model) as both:
        both.wire.hold()
        callers = both.ask(ask_for(1, 40, 9))
        assert both.wire.sent.wait(30)
        assert both.decode.stats().pages_leased == 3
        both.wire.fail(1, PeerLostError("gone", room=1))
        for caller in callers:
            assert isinstance(caller.wait().last.error, PeerLostError)
        for scheduler in (both.prefill, both.decode):
            assert scheduler.stats().queues["draining"] == 1
            assert scheduler.stats().pages_used == scheduler.stats().pages_leased == 3
        both.wire.release()
        both.assert_nothing_held()


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_abort_in_flight_ends_both_sides(model: LoadedModel, side: str) -> None:
    with pair(model) as both:
        both.wire.hold()
        first, answer = both.ask(ask_for(1, 40, 9))
        assert both.wire.sent.wait(30)
        getattr(both, side).abort("r1")
        ours, theirs = (first, answer) if side == "prefill" else (answer, first)
        assert isinstance(ours.wait().last.error, AbortedError)
        assert isinstance(theirs.wait().last.error, AbortedError)
        both.wire.release()
        both.assert_nothing_held()


def test_abort_before_the_other_side_exists(model: LoadedModel) -> None:
    with pair(model) as both:
        first, answer = call(both.prefill, ask_for(1, 40, 9)), call(both.decode, ask_for(2, 40, 9))
        assert both.wire.opened.wait(30)
        assert both.wire.published.wait(30)
        assert both.prefill.stats().pages_used == 0
        both.prefill.abort("r1")
        both.decode.abort("r2")
        assert all(isinstance(one.wait().last.error, AbortedError) for one in (first, answer))
        both.assert_nothing_held()


def test_abort_while_decoding_and_while_waiting_for_pages(model: LoadedModel) -> None:
    with pair(model, target={"pages": 10}) as both:
        _, running = both.ask(ask_for(1, 20, 120))
        _, waiting = both.ask(ask_for(2, 60, 90))
        assert running.first.wait(30)
        both.decode.abort("r2")
        both.decode.abort("r1")
        assert all(isinstance(one.wait().last.error, AbortedError) for one in (waiting, running))
        both.prefill.abort("r2")
        both.assert_nothing_held()


def _torn(row: bytearray) -> None:
    row[44] ^= 1


def _never_written(row: bytearray) -> None:
    row[:] = bytes(len(row))


@pytest.mark.parametrize("spoil", [_torn, _never_written])
def test_a_wrong_aux_row_is_never_served(model: LoadedModel, spoil: object) -> None:
    with pair(model) as both:
        both.wire.spoil = spoil
        _, answer = both.ask(ask_for(1, 20, 5))
        assert isinstance(answer.wait().last.error, RemoteProtocolError)
        assert answer.tokens == ()
        both.assert_nothing_held()


def test_two_prompts_in_one_room_are_never_served(model: LoadedModel) -> None:
    with pair(model) as both:
        call(both.prefill, ask_for(1, 20, 5))
        fields = {"request_id": "x", "sampling": Sampling(max_tokens=5), "room": 1, "sources": SOURCES}
        answer = call(both.decode, Request(prompt_tokens=make_prompt(20, 77), **fields))
        assert isinstance(answer.wait().last.error, RemoteProtocolError)


def test_a_model_that_fails_tells_the_other_side(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pair(model) as both:
        monkeypatch.setattr(both.prefill._role._runner, "_network", lambda **_: 1 / 0)
        first, answer = both.ask(ask_for(1, 20, 5))
        assert isinstance(first.wait().last.error, InternalError)
        assert isinstance(answer.wait().last.error, InternalError), "the cause, not that it was given up"
        both.assert_nothing_held()


def test_a_room_in_use_is_refused(model: LoadedModel) -> None:
    with pair(model) as both:
        first = call(both.prefill, ask_for(1, 20, 5))
        again = Request(request_id="again", prompt_tokens=(1,), room=1, sources=SOURCES)
        assert isinstance(call(both.prefill, again).wait().last.error, LocalProtocolError)
        with pytest.raises(ConfigError, match="bootstrap_room"):
            call(both.prefill, greedy((1, 2), 3))
        both.prefill.abort("r1")
        first.wait()


def test_close_ends_all_and_says_whether_leases_are_left(model: LoadedModel) -> None:
    with pair(model) as both:
        both.wire.hold()
        first, answer = both.ask(ask_for(1, 40, 9))
        assert both.wire.sent.wait(30)
        assert not both.decode.close(0.05)
        assert isinstance(answer.wait().last.error, OverloadedError)
        both.wire.release()
        assert both.prefill.close()
        assert first.wait().last.final
        with pytest.raises(OverloadedError):
            call(both.prefill, ask_for(2, 4, 4))

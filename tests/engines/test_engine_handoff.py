"""Prefill and decode over the real facade: two managers in one process, memory links, memory transport."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import pytest
from engine_kit import PATIENCE_SECONDS, Caller, call, generate, make_pools, make_prompt

from kvbaton.control.memory import Network
from kvbaton.errors import AbortedError, KVBatonError
from kvbaton.layout import CacheLayout
from kvbaton.manager import KVManager, new_instance
from kvbaton.protocol.settings import Settings
from kvbaton.serving.engine.decode import decode_scheduler
from kvbaton.serving.engine.model import LoadedModel
from kvbaton.serving.engine.pool import Pools
from kvbaton.serving.engine.prefill import prefill_scheduler
from kvbaton.serving.engine.request import Request, Sampling
from kvbaton.serving.engine.scheduler import Scheduler, SchedulerConfig
from kvbaton.serving.engine.unified import unified_scheduler
from kvbaton.transports.memory import MemoryTransport

CONFIG = SchedulerConfig(chunked_prefill_size=32)
POLL_SECONDS = 0.001
#: Every layer is worth a post of its own, as it would be in a model of full size.
EACH_LAYER = Settings(layers_ahead="always")
#: A decode server that says nothing of a room is waited for this long.
HASTY = Settings(bootstrap_timeout=0.6, heartbeat_interval=0.1, heartbeat_misses=100)


@dataclass
class Pair:
    source: KVManager
    target: KVManager
    prefill: Scheduler
    decode: Scheduler
    model: LoadedModel
    target_pools: Pools
    pages: int  # of the decode side

    def request(self, room: int, length: int, count: int, **sampling: object) -> Request:
        fields: dict = {"temperature": 0.0, "ignore_eos": True, "max_tokens": count, **sampling}
        return Request(
            request_id=f"r{room}",
            prompt_tokens=make_prompt(length, room),
            sampling=Sampling(**fields),
            room=room,
            sources=(self.source.address,),
        )

    def ask(self, request: Request) -> tuple[Caller, Caller]:
        return call(self.prefill, request), call(self.decode, request)

    def assert_nothing_held(self) -> None:
        for scheduler, manager in ((self.prefill, self.source), (self.decode, self.target)):
            assert scheduler.wait_quiet(PATIENCE_SECONDS), scheduler
            assert (scheduler.stats().pages_used, scheduler.stats().slots_used) == (0, 0)
            assert manager.leased_rooms == 0


def until(condition: Callable[[], bool], what: str) -> None:
    pause = threading.Event()
    for _ in range(int(PATIENCE_SECONDS / POLL_SECONDS)):
        if condition():
            return
        pause.wait(POLL_SECONDS)
    raise AssertionError(f"never: {what}")


@contextmanager
def pair(
    model: LoadedModel,
    *,
    source: dict | None = None,
    target: dict | None = None,
    decode_config: SchedulerConfig = CONFIG,
    settings: Settings = EACH_LAYER,
) -> Iterator[Pair]:
    network = Network()

    def manager(layout: CacheLayout, group: str) -> KVManager:
        instance = new_instance()
        transport, links = MemoryTransport(instance), network.listen()
        return KVManager(layout, transport, links, instance=instance, group=group, settings=settings)

    pools = make_pools(model, **(source or {})), make_pools(model, **(target or {}))
    with (
        manager(pools[0].layout, "prefill") as sends,
        manager(pools[1].layout, "decode") as receives,
        prefill_scheduler(model, pools[0], sends, CONFIG) as prefill,
        decode_scheduler(model, pools[1], receives, decode_config) as decode,
    ):
        yield Pair(sends, receives, prefill, decode, model, pools[1], pools[1].pages_free)


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_a_decode_engine_is_the_source_of_what_it_hands_on(any_model: LoadedModel, prefix_cache: bool) -> None:
    """Windows, states and all: from decode to decode and on to a third, each in the role of both; and back again at the
    same time, another answer."""
    network = Network()
    config = SchedulerConfig(chunked_prefill_size=32, prefix_cache=prefix_cache)
    with ExitStack() as stack:

        def rank(group: str, **sizes: object) -> tuple[KVManager, Pools]:
            pools, instance = make_pools(any_model, **sizes), new_instance()
            transport, links = MemoryTransport(instance), network.listen()
            manager = KVManager(pools.layout, transport, links, instance=instance, group=group)
            return stack.enter_context(manager), pools

        source, pools = rank("prefill")
        prefill = stack.enter_context(prefill_scheduler(any_model, pools, source, CONFIG))
        ranks = [rank("one"), rank("two", page_size=8), rank("three")]
        engines = [stack.enter_context(decode_scheduler(any_model, pools, sends, config)) for sends, pools in ranks]
        addresses = [manager.address for manager, _ in ranks]
        requests = [
            Request(
                request_id=f"r{room}",
                prompt_tokens=make_prompt(37, room),
                sampling=Sampling(temperature=0.0, ignore_eos=True, max_tokens=90),
                room=room,
                sources=(source.address,),
            )
            for room in (1, 2)
        ]
        tokens: list[tuple[int, ...]] = [(), ()]
        at = [0, 1]
        for request in requests:
            call(prefill, request)
        for hop in range(3):
            callers = [call(engines[at[number]], request) for number, request in enumerate(requests)]
            for number, caller in enumerate(callers):
                assert caller.first.wait(PATIENCE_SECONDS)
                engines[at[number]].hand_on([requests[number].request_id], 100 * (hop + 1) + number)
            for number, caller in enumerate(callers):
                assert caller.departing.wait(PATIENCE_SECONDS), caller.outputs[-1]
                tokens[number] += caller.tokens
                asked = requests[number].asked_tokens
                requests[number] = replace(
                    requests[number],
                    request_id=f"r{number}-{hop}",
                    prompt_tokens=(*asked, *tokens[number]),
                    answered=len(tokens[number]),
                    room=100 * (hop + 1) + number,
                    sources=(addresses[at[number]],),
                )
            at = [(place + 1 + number) % 3 for number, place in enumerate(at)]
            if hop == 2:
                last = [call(engines[at[number]], request) for number, request in enumerate(requests)]
        for number, caller in enumerate(last):
            tokens[number] += caller.wait().tokens
            assert tokens[number] == generate(any_model, requests[number].asked_tokens, 90)
        for engine in engines:
            assert engine.wait_quiet(PATIENCE_SECONDS), engine
            assert engine.stats().queues["departing"] == engine.stats().pages_used == 0
        assert not any(manager.leased_rooms for manager, _ in ranks)


@pytest.mark.parametrize("target_page_size", [16, 64, 8])
def test_tokens_equal_generate(any_model: LoadedModel, target_page_size: int) -> None:
    with pair(any_model, target={"page_size": target_page_size}) as both:
        for room, length in enumerate((1, 16, 17, 32, 33, 100), start=1):
            request = both.request(room, length, 12)
            first, answer = both.ask(request)
            expected = generate(any_model, request.prompt_tokens, 12)
            assert answer.wait().tokens == expected, length
            assert first.wait().tokens == expected[:1]
            handoff = answer.outputs[0].handoff
            assert handoff is not None
            assert handoff.bytes >= length * any_model.geometry.token_bytes + 64  # whole pages may travel
            assert handoff.seconds >= handoff.exposed_seconds > 0
        assert both.source.counters()["chunks_of_layers"] >= 9 * any_model.geometry.layers  # chunks of 32 tokens
        both.assert_nothing_held()


def test_many_rooms_at_once_through_small_pools(model: LoadedModel) -> None:
    small = {"pages": 24, "aux_slots": 3}
    with pair(model, source=small, target=small) as both:
        requests = [both.request(room, 3 + 13 * room, 5 + room) for room in range(16)]
        callers = [both.ask(request) for request in requests]
        for request, (first, answer) in zip(requests, callers, strict=True):
            expected = generate(model, request.prompt_tokens, request.sampling.max_tokens)
            assert answer.wait().tokens == expected
            assert first.wait().tokens == expected[:1]
        both.assert_nothing_held()


def test_no_deadline_measures_the_queue_of_decode(model: LoadedModel) -> None:
    """Decode lives and has no memory: who waits there, waits, for many times as long as for a decode that is dead."""
    with pair(model, settings=HASTY) as both:
        held = both.target_pools.allocate(both.target_pools.tokens)
        assert held is not None
        requests = [both.request(room, 20, 4) for room in range(1, 4)]
        callers = [both.ask(request) for request in requests]
        assert not callers[-1][1].first.wait(4 * HASTY.bootstrap_timeout)
        assert both.decode.stats().queues["waiting"] == both.prefill.stats().queues["bootstrap"] == len(requests)
        both.decode.abort("r3")
        assert all(isinstance(caller.wait().last.error, AbortedError) for caller in callers[2])  # prefill hears of it
        both.target_pools.free(held)
        both.target.wakeup.set()
        for request, (first, answer) in zip(requests[:2], callers, strict=False):
            expected = generate(model, request.prompt_tokens, 4)
            assert answer.wait().tokens == expected
            assert first.wait().tokens == expected[:1]
        both.assert_nothing_held()


def test_sampled_tokens_equal_one_process(model: LoadedModel) -> None:
    with pair(model) as both, unified_scheduler(model, make_pools(model), CONFIG) as engine:
        for room in range(4):
            request = both.request(room, 20 + 30 * room, 20, temperature=1.0, top_p=0.9, seed=room, logprobs=True)
            expected = call(engine, request).wait()
            _, answer = both.ask(request)
            assert answer.wait().tokens == expected.tokens
            assert answer.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


def test_a_target_that_opens_before_the_sender_exists_is_served(model: LoadedModel) -> None:
    with pair(model) as both:
        for caller in both.ask(both.request(1, 4, 2)):
            caller.wait()
        request = both.request(2, 40, 6)
        answer = call(both.decode, request)
        until(lambda: bool(both.source.trace(2)), "the source has heard of room 2")
        call(both.prefill, request)
        assert answer.wait().tokens == generate(model, request.prompt_tokens, 6)
        both.assert_nothing_held()


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_abort_at_any_moment_returns_everything(model: LoadedModel, side: str) -> None:
    """One side first, then the other, as a router does: one that was aborted before it met its peer told nobody."""
    with pair(model) as both:
        schedulers = [both.prefill, both.decode] if side == "prefill" else [both.decode, both.prefill]
        for room in range(20):
            first, answer = both.ask(both.request(room, 100, 100))
            if room % 2:
                assert answer.first.wait(PATIENCE_SECONDS)
            for scheduler in schedulers:
                scheduler.abort(f"r{room}")
            assert first.wait().last.final
            assert answer.wait().last.final
        both.assert_nothing_held()


def test_a_lost_prefill_ends_what_waits_for_it(model: LoadedModel) -> None:
    with pair(model) as both:
        for caller in both.ask(both.request(1, 4, 2)):
            caller.wait()
        orphan = call(both.decode, both.request(2, 40, 6))
        assert both.prefill.close()
        both.source.close()
        assert isinstance(orphan.wait().last.error, KVBatonError)
        assert both.decode.wait_quiet(PATIENCE_SECONDS)
        assert both.decode.stats().pages_used == 0

"""Both halves in a stand-in of vLLM, a prefill and a decode engine over real managers."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from vllm_stand_in import BLOCK, DENSE, HASTY, HYBRID, Request, StandIn, Status, run

from kvbaton import KVPoll
from kvbaton.engines.vllm.groups import CacheGroups
from kvbaton.engines.vllm.orders import Orders

LENGTHS = (1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 15, 16, 17, 31, 40)
NAMES = ["dense", "hybrid"]


@pytest.fixture(params=[DENSE, HYBRID], ids=NAMES)
def groups(request: pytest.FixtureRequest) -> CacheGroups:
    found: CacheGroups = request.param
    return found


@pytest.fixture
def pair(groups: CacheGroups) -> Iterator[tuple[StandIn, StandIn]]:
    engines = StandIn(groups, produces=True, consumes=False), StandIn(groups, produces=False, consumes=True)
    yield engines
    for engine in engines:
        engine.close()
    assert not any(engine.worker.busy for engine in engines)
    assert [engine.in_use for engine in engines] == [0, 0]


def prompt(length: int, seed: int = 0) -> list[int]:
    chance = random.Random(f"{length} {seed}")
    return [chance.randrange(1, 1000) for _ in range(length)]


def asks_prefill(room: int | None = None) -> dict[str, object]:
    return {"do_remote_decode": True, **({} if room is None else {"kvbaton_room": str(room)})}


def asks_decode(room: int, *engines: StandIn) -> dict[str, object]:
    sources = [engine.manager.address for engine in engines] or ["tcp://127.0.0.1:9"]
    return {"do_remote_prefill": True, "kvbaton_room": str(room), "kvbaton_sources": sources}


def sequential(prefill: StandIn, decode: StandIn, tokens: list[int], name: str = "r", local: int = 0) -> Request:
    first = prefill.add(Request(f"p-{name}", list(tokens), asks_prefill()))
    run(prefill, until=lambda: first.status is Status.FINISHED_LENGTH_CAPPED)
    request = decode.add(Request(f"d-{name}", list(tokens), first.answer, local=local))
    run(prefill, decode)
    return request


@pytest.mark.parametrize("length", LENGTHS)
def test_sequential(pair: tuple[StandIn, StandIn], groups: CacheGroups, length: int) -> None:
    request = sequential(*pair, prompt(length))
    assert request.status is Status.FINISHED_LENGTH_CAPPED
    moved = groups.tokens(length)
    assert (request.received, request.failed) == (moved, False)
    assert request.correct is (True if min(moved, length - 1) else None)


@pytest.mark.parametrize("length", LENGTHS)
def test_concurrent(pair: tuple[StandIn, StandIn], groups: CacheGroups, length: int) -> None:
    prefill, decode = pair
    request = decode.add(Request("d", prompt(length), asks_decode(5, prefill)))
    prefill.add(Request("p", prompt(length), asks_prefill(5)))
    if groups.tokens(length):
        run(decode, until=lambda: request.status is Status.WAITING_FOR_REMOTE_KVS)
    else:
        decode.abort(request)  # nobody sends what is too short: vLLM computes it
        request.failed = False
    run(prefill, decode)
    assert not request.failed
    assert request.correct is not False


def test_layers_go_ahead_once_decode_has_opened_the_room(pair: tuple[StandIn, StandIn]) -> None:
    """Of the first chunks, too: only what was computed before decode was there is held back."""
    prefill, decode = pair
    request = decode.add(Request("d", prompt(40), asks_decode(5, prefill)))
    run(decode, until=lambda: request.status is Status.WAITING_FOR_REMOTE_KVS)
    prefill.add(Request("p", prompt(40), asks_prefill(5)))
    prefill.step()
    while prefill.worker.holding:
        prefill.manager.wait(0.01)
        prefill.step()
    run(prefill, decode)
    assert request.correct
    assert prefill.manager.counters()["chunks_of_layers"]


def test_many_at_once(pair: tuple[StandIn, StandIn]) -> None:
    prefill, decode = pair
    requests = []
    for i in range(6):
        requests.append(decode.add(Request(f"d{i}", prompt(9 + i, i), asks_decode(100 + i, prefill))))
        prefill.add(Request(f"p{i}", prompt(9 + i, i), asks_prefill(100 + i)))
    run(prefill, decode)
    assert all(request.correct is not False and not request.failed for request in requests)


@pytest.mark.parametrize("flow", ["concurrent", "sequential"])
def test_two_full_pools_do_not_wait_for_each_other(pair: tuple[StandIn, StandIn], flow: str) -> None:
    """Either pool holds a few of the prompts, and the two engines take them up in orders that are each other's
    reverse."""
    prefill, decode = pair
    several = [*range(100, 124)]
    prompts = {room: prompt(40, room) for room in several}
    if flow == "concurrent":
        for room in several:
            prefill.add(Request(f"p{room}", list(prompts[room]), asks_prefill(room)))
        requests = [
            decode.add(Request(f"d{room}", list(prompts[room]), asks_decode(room, prefill)))
            for room in reversed(several)
        ]
    else:
        first = {room: prefill.add(Request(f"p{room}", list(prompts[room]), asks_prefill())) for room in several}
        requests = []
        while first:
            run(prefill, decode, until=lambda: any(one.answer for one in first.values()))
            for room in [room for room, one in reversed(first.items()) if one.answer]:
                answer = first.pop(room).answer
                requests.append(decode.add(Request(f"d{room}", list(prompts[room]), answer)))
    run(prefill, decode, seconds=20.0)
    assert all(request.correct and not request.failed for request in requests)
    assert len(prefill.admission) == len(decode.admission) == prefill.admission.held == 0


def test_two_engines_of_both_roles_do_not_wait_for_each_other(groups: CacheGroups) -> None:
    """Each is full of blocks for prompts that the other is to compute."""
    engines = [StandIn(groups, produces=True, consumes=True) for _ in range(2)]
    requests = []
    for room in range(100, 132):
        prefill, decode = engines if room % 2 else reversed(engines)
        requests.append(decode.add(Request(f"d{room}", prompt(40, room), asks_decode(room, prefill))))
    for room in range(100, 132):
        prefill = engines[0 if room % 2 else 1]
        prefill.add(Request(f"p{room}", prompt(40, room), asks_prefill(room)))
    run(*engines, seconds=20.0)
    assert all(request.correct and not request.failed for request in requests)
    assert [engine.admission.held for engine in engines] == [0, 0]
    for engine in engines:
        engine.close()


def test_a_local_prefix_is_not_moved(pair: tuple[StandIn, StandIn]) -> None:
    request = sequential(*pair, prompt(30), local=2 * BLOCK)
    assert request.correct in (True, None)
    assert not request.failed


def test_a_full_local_hit_lets_prefill_go(pair: tuple[StandIn, StandIn], groups: CacheGroups) -> None:
    """A dense cache still lacks the last token, of which decode takes the block as well."""
    request = sequential(*pair, prompt(4 * BLOCK + 1), local=4 * BLOCK)
    assert request.loads == (0 if groups.backoff else 1)


def test_siblings_share_one_hand_off(pair: tuple[StandIn, StandIn]) -> None:
    prefill, decode = pair
    first = prefill.add(Request("p", prompt(30), asks_prefill()))
    run(prefill, until=lambda: first.answer is not None)
    siblings = [decode.add(Request(f"d{i}", prompt(30), dict(first.answer or {}))) for i in range(3)]
    run(prefill, decode)
    assert [sibling.loads for sibling in siblings] == [1, 0, 0]
    assert not any(sibling.failed for sibling in siblings)


def test_a_dead_address_is_computed_again(pair: tuple[StandIn, StandIn]) -> None:
    prefill, decode = pair
    request = decode.add(Request("d", prompt(20), asks_decode(7)))
    run(prefill, decode)
    assert request.failed
    assert request.status is Status.FINISHED_LENGTH_CAPPED


@pytest.mark.parametrize("params", [{"do_remote_prefill": True}, {"do_remote_prefill": True, "kvbaton_room": 3}])
def test_wrong_params_are_a_failure_like_any_other(pair: tuple[StandIn, StandIn], params: dict[str, object]) -> None:
    request = pair[1].add(Request("d", prompt(20), dict(params)))
    run(*pair)
    assert request.failed


def test_another_prompt_fails_by_name(pair: tuple[StandIn, StandIn]) -> None:
    prefill, decode = pair
    first = prefill.add(Request("p", prompt(20), asks_prefill()))
    run(prefill, until=lambda: first.answer is not None)
    request = decode.add(Request("d", prompt(27), first.answer))
    run(prefill, decode)
    assert request.failed


def test_decode_aborted_while_parked(pair: tuple[StandIn, StandIn]) -> None:
    prefill, decode = pair
    request = decode.add(Request("d", prompt(30), asks_decode(8, prefill)))
    run(decode, until=lambda: request.status is Status.WAITING_FOR_REMOTE_KVS)
    decode.abort(request)
    prefill.add(Request("p", prompt(30), asks_prefill(8)))
    run(prefill, decode)


def test_the_aborted_twin_changes_nothing(pair: tuple[StandIn, StandIn]) -> None:
    prefill, decode = pair
    request = decode.add(Request("d", prompt(30), asks_decode(9, prefill)))
    run(decode, until=lambda: request.status is Status.WAITING_FOR_REMOTE_KVS)
    twin = decode.add(Request("twin", [0], asks_decode(9, prefill)))
    decode.abort(twin)
    prefill.add(Request("p", prompt(30), asks_prefill(9)))
    run(prefill, decode)
    assert not request.failed


def test_rejected_before_it_was_scheduled_lets_prefill_go(pair: tuple[StandIn, StandIn]) -> None:
    prefill, decode = pair
    first = prefill.add(Request("p", prompt(30), asks_prefill()))
    run(prefill, until=lambda: first.answer is not None)
    decode.abort(decode.add(Request("d", [0], first.answer)))
    run(prefill, decode)  # before anybody's deadline


def test_prefill_aborted_between_chunks(pair: tuple[StandIn, StandIn]) -> None:
    prefill, decode = pair
    request = decode.add(Request("d", prompt(40), asks_decode(10, prefill)))
    first = prefill.add(Request("p", prompt(40), asks_prefill(10)))
    run(decode, until=lambda: request.status is Status.WAITING_FOR_REMOTE_KVS)
    prefill.step()
    prefill.step()
    prefill.abort(first)
    run(prefill, decode)
    assert request.failed


def test_prefill_aborted_before_it_began(pair: tuple[StandIn, StandIn]) -> None:
    prefill, decode = pair
    request = decode.add(Request("d", prompt(40), asks_decode(11, prefill)))
    run(decode, until=lambda: request.status is Status.WAITING_FOR_REMOTE_KVS)
    prefill.abort(prefill.add(Request("p", prompt(40), asks_prefill(11))))
    run(prefill, decode)
    assert request.failed


@pytest.mark.parametrize("early", [False, True], ids=["sequential", "concurrent"])
def test_preemption(pair: tuple[StandIn, StandIn], early: bool) -> None:
    """What was not submitted is computed again; what was is withdrawn, and decode notices nothing."""
    prefill, decode = pair
    first = prefill.add(Request("p", prompt(40), asks_prefill(12 if early else None)))
    request = None
    if early:
        request = decode.add(Request("d", prompt(40), asks_decode(12, prefill)))
        run(decode, until=lambda: request.status is Status.WAITING_FOR_REMOTE_KVS)
    prefill.step()
    prefill.step()
    prefill.preempt_next.append(first)
    run(prefill, until=lambda: first.answer is not None)
    if request is None:
        request = decode.add(Request("d", prompt(40), first.answer))
    run(prefill, decode)
    assert (request.failed, request.correct) == (False, True)


def test_preemption_does_not_wait_long_for_writes_that_do_not_settle(pair: tuple[StandIn, StandIn]) -> None:
    """What is read for too long ends its room, so that nobody looks at what is written."""
    prefill, decode = pair
    stuck = threading.Event()
    first = prefill.add(Request("p", prompt(40), asks_prefill(12)))
    request = decode.add(Request("d", prompt(40), asks_decode(12, prefill)))
    run(decode, until=lambda: request.status is Status.WAITING_FOR_REMOTE_KVS)
    prefill.step()
    (send,) = prefill.worker._sends.values()
    while send.sender.poll() is KVPoll.Bootstrapping:
        prefill.manager.wait(0.1)
    prefill.step()
    assert send.submitted
    prefill.worker._clock = iter([0.0, 2.0]).__next__
    send.sender.submit([], last=False, ready=stuck.wait)
    prefill.preempt_next.append(first)
    prefill.step()
    stuck.set()
    run(prefill, decode)
    assert (request.failed, prefill.in_use, decode.in_use) == (True, 0, 0)


def test_aborted_after_a_preemption(pair: tuple[StandIn, StandIn]) -> None:
    prefill, _ = pair
    first = prefill.add(Request("p", prompt(40), asks_prefill()))
    prefill.step()
    prefill.preempt_next.append(first)
    prefill._preempt()
    prefill.half.step({}, ["p"], lambda _: None)
    prefill.abort(first)
    run(prefill)
    assert not prefill.worker.busy


def test_the_room_is_there_before_the_pass_that_prefill_answers_with(pair: tuple[StandIn, StandIn]) -> None:
    """By the end of that pass another rank of prefill may have answered, and decode asks all of them."""
    prefill, decode = pair
    first = prefill.add(Request("p", prompt(20), asks_prefill()))
    rooms: list[tuple[bool, int]] = []
    compute = prefill._compute

    def watched(batch: dict[Request, int], orders: Orders) -> None:
        rooms.append((any(chunk.last for chunk in orders.chunks), prefill.manager.live_rooms))
        compute(batch, orders)

    prefill._compute = watched  # type: ignore[method-assign]
    run(prefill, until=lambda: first.answer is not None)
    assert rooms[-1] == (True, 1)
    assert set(rooms[:-1]) == {(False, 0)}
    request = decode.add(Request("d", prompt(20), first.answer))
    run(prefill, decode)
    assert request.correct


def test_prefill_keeps_a_prompt_while_decode_has_it_in_its_queue(groups: CacheGroups) -> None:
    """The time for which it is kept measures decode's life, not decode's queue."""
    settings = replace(HASTY, heartbeat_interval=0.05, heartbeat_misses=100)
    prefill = StandIn(groups, produces=True, consumes=False, settings=settings)
    decode = StandIn(groups, produces=False, consumes=True, settings=settings)
    others = decode.pool.take(len(decode.pool.free))
    first = prefill.add(Request("p", prompt(20), asks_prefill()))
    run(prefill, until=lambda: first.answer is not None)
    request = decode.add(Request("d", prompt(20), first.answer))
    later = time.monotonic() + 3 * settings.bootstrap_timeout
    run(prefill, decode, until=lambda: time.monotonic() > later)
    assert (request.status, decode.worker.busy) == (Status.WAITING, True)
    decode.pool.free_blocks([decode.pool.blocks[number] for number in others])
    run(prefill, decode)
    assert (request.failed, request.correct) == (False, True)
    for engine in (prefill, decode):
        engine.close()


def test_nobody_decodes(groups: CacheGroups) -> None:
    prefill = StandIn(groups, produces=True, consumes=False, settings=HASTY)
    decode = StandIn(groups, produces=False, consumes=True)
    first = prefill.add(Request("p", prompt(30), asks_prefill()))
    run(prefill)
    assert prefill.in_use == 0
    request = decode.add(Request("d", prompt(30), first.answer))
    run(prefill, decode)
    assert request.failed
    prefill.close()
    decode.close()


def test_policy_fail_ends_the_request(groups: CacheGroups) -> None:
    decode = StandIn(groups, produces=False, consumes=True, recompute=False)
    request = decode.add(Request("d", prompt(30), asks_decode(13)))
    run(decode)
    decode.close()
    assert request.status is Status.FINISHED_ERROR
    assert decode.in_use == 0


def test_an_engine_in_one_role_refuses_the_other(pair: tuple[StandIn, StandIn]) -> None:
    prefill, decode = pair
    wrong = prefill.add(Request("d", prompt(30), asks_decode(14, prefill)))
    first = decode.add(Request("p", prompt(30), asks_prefill()))
    run(prefill, decode)
    assert wrong.failed
    assert first.answer is None


def test_a_room_that_is_live_is_not_sent_twice(pair: tuple[StandIn, StandIn]) -> None:
    prefill, decode = pair
    first = prefill.add(Request("p", prompt(30), asks_prefill(15)))
    second = prefill.add(Request("q", prompt(30), asks_prefill(15)))
    request = decode.add(Request("d", prompt(30), asks_decode(15, prefill)))
    run(prefill, decode)
    assert first.answer is not None
    assert second.answer is None
    assert not request.failed

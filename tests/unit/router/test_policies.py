"""Who is chosen, by each policy."""

import random
from collections import Counter
from contextlib import AsyncExitStack

import pytest

from kvbaton.errors import ConfigError
from kvbaton.serving.router.policies import policy_of
from kvbaton.serving.router.policies.cache_aware import BLOCK_BYTES, CacheAware, CacheAwareSettings
from kvbaton.serving.router.policies.power_of_two import PowerOfTwo
from kvbaton.serving.router.policies.random_choice import RandomChoice
from kvbaton.serving.router.worker import State, Worker
from kvbaton.serving.router.workers import Workers
from kvbaton.serving.testing.http import run

NAMES = ("round_robin", "random", "power_of_two", "least_load", "cache_aware")


def workers(count: int, role: str = "decode") -> list[Worker]:
    return [Worker(role, f"http://{role}{number}", state=State.READY, trouble="") for number in range(count)]


def asked(name: str, prompts: list[bytes], decodes: list[Worker]) -> list[Worker]:
    """Which decode each prompt goes to, one after the other, none of them ever ending."""
    both = Workers(
        [*workers(1, "prefill"), *decodes], None, policies={"prefill": policy_of(name), "decode": policy_of(name)}
    )
    return [both.choose(prompt, both.pairs())[1] for prompt in prompts]


async def loaded(closing: AsyncExitStack, worker: Worker, legs: int) -> None:
    for _ in range(legs):
        await closing.enter_async_context(worker.leg())


@pytest.mark.parametrize("name", NAMES)
def test_one_candidate_is_taken(name: str) -> None:
    (only,) = workers(1)
    assert asked(name, [b"x"] * 3, [only]) == [only] * 3


@pytest.mark.parametrize("name", ["round_robin", "least_load", "cache_aware"])
def test_a_burst_is_spread_although_no_load_shows_yet(name: str) -> None:
    three = workers(3)
    assert Counter(asked(name, [b"x"] * 9, three)) == dict.fromkeys(three, 3)


@pytest.mark.parametrize("name", ["power_of_two", "least_load", "cache_aware"])
def test_the_less_loaded_is_taken(name: str) -> None:
    async def test() -> None:
        one, two = workers(2)
        async with AsyncExitStack() as closing:
            await loaded(closing, one, 2)
            assert asked(name, [b"x"] * 3, [one, two]) == [two] * 3

    run(test())


def test_turns_go_on_when_servers_come_and_go() -> None:
    three = workers(3)
    both = Workers([*workers(1, "prefill"), *three], None)
    first = [both.choose(b"", both.pairs())[1] for _ in range(2)]
    three[2].become(State.GONE, "x")
    second = [both.choose(b"", both.pairs())[1] for _ in range(2)]
    three[2].become(State.READY)
    third = both.choose(b"", both.pairs())[1]
    assert (first, second, third) == (three[:2], three[:2], three[2])


def test_two_random_choices_are_far_more_even_than_one() -> None:
    """The gap between the fullest of n servers and the average is about log n / log log n against log log n."""

    async def test(policy) -> int:
        many = workers(16)
        async with AsyncExitStack() as closing:
            for _ in range(16 * 16):
                await loaded(closing, policy.choose(many, b""), 1)
            return max(worker.legs for worker in many) - 16

    one = run(test(RandomChoice(random.Random(1))))
    two = run(test(PowerOfTwo(random.Random(1))))
    assert two <= 2 < one


SHARED = [bytes([65 + number]) * (4 * BLOCK_BYTES) for number in range(3)]


def test_equal_beginnings_go_to_the_server_that_has_seen_them() -> None:
    three, policy = workers(3), CacheAware()
    first = [policy.choose(three[number:] + three[:number], prompt) for number, prompt in enumerate(SHARED)]
    assert first == three
    for number, prompt in enumerate(SHARED):
        for tail in (b"", b"tail" * 50):
            assert policy.choose(three, prompt + tail) is three[number]


def test_a_short_match_does_not_count() -> None:
    one, two = workers(2)
    policy = CacheAware(CacheAwareSettings(cache_threshold=0.5))
    policy.choose([one, two], b"a" * 4 * BLOCK_BYTES)
    assert policy.choose([two, one], b"a" * BLOCK_BYTES + b"b" * 3 * BLOCK_BYTES) is two
    assert policy.choose([two, one], b"a" * 2 * BLOCK_BYTES + b"c" * 2 * BLOCK_BYTES) is one


def test_only_the_server_that_is_loaded_too_much_loses_its_prompts() -> None:
    """sglang#32195: a gate that opens for all throws the affinity of every server away."""

    async def test() -> None:
        three = workers(3)
        policy = CacheAware(CacheAwareSettings(balance_abs_threshold=2, balance_rel_threshold=1.0))
        for number, prompt in enumerate(SHARED):
            policy.choose(three[number:] + three[:number], prompt)
        async with AsyncExitStack() as closing:
            await loaded(closing, three[0], 3)
            assert policy.choose(three, SHARED[0]) is not three[0]
            assert policy.choose(three, SHARED[1]) is three[1]
            assert policy.choose(three, SHARED[2]) is three[2]
        assert policy.choose(three, SHARED[0]) in three

    run(test())


def test_what_is_remembered_is_bounded_and_forgotten_with_its_server() -> None:
    one, two = workers(2)
    policy = CacheAware(CacheAwareSettings(most_blocks=6))
    for number in range(50):
        policy.choose([one, two], bytes([number]) * 4 * BLOCK_BYTES)
    assert len(policy._seen) == 6
    policy.forget(one)
    assert all(one not in seen for seen in policy._seen.values())


def test_what_is_no_policy() -> None:
    with pytest.raises(ConfigError, match="round_robin, random"):
        policy_of("best")

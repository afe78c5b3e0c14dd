"""A circuit breaker over an injected clock."""

from kvbaton.serving.router.breaker import Breaker, BreakerSettings


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def breaker() -> tuple[Breaker, Clock]:
    clock = Clock()
    return Breaker(BreakerSettings(failure_threshold=3, timeout_secs=10.0, window_secs=60.0), clock=clock), clock


def test_failures_of_one_kind_in_a_row_open_it() -> None:
    one, _ = breaker()
    assert [one.failed("a"), one.failed("b"), one.failed("a"), one.failed("b")] == [False] * 4
    assert one.allows
    assert one.failed("a")
    assert one.is_open
    assert not one.allows


def test_a_success_or_a_quiet_time_begins_anew() -> None:
    one, clock = breaker()
    for _ in range(2):
        one.failed("a")
    assert not one.succeeded()
    for _ in range(2):
        one.failed("a")
    clock.now += 61.0
    assert not one.failed("a")
    assert one.allows


def test_one_trial_at_a_time_closes_it_or_leaves_it_open() -> None:
    one, clock = breaker()
    for _ in range(3):
        one.failed("a")
    clock.now += 10.0
    assert one.allows
    one.taken()
    assert not one.allows, "the others wait for the trial"
    one.failed("b")
    clock.now += 9.9
    assert not one.allows
    clock.now += 0.2
    one.taken()
    assert one.succeeded()
    assert one.allows
    assert not one.is_open


def test_a_trial_whose_end_nobody_tells_is_followed_by_another() -> None:
    one, clock = breaker()
    for _ in range(3):
        one.failed("a")
    clock.now += 10.0
    one.taken()
    clock.now += 10.0
    assert one.allows


def test_it_can_be_switched_off() -> None:
    one = Breaker(BreakerSettings(failure_threshold=0))
    assert not any(one.failed("a") for _ in range(1000))
    assert one.allows

"""Which signed messages are new: by the time that they name, and because none has come before."""

import pytest

from kvbaton.discovery import freshness
from kvbaton.discovery.freshness import FRESH_SECONDS, Freshness
from kvbaton.errors import OverloadedError, RegistryError


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_message_counts_once_and_for_a_time() -> None:
    clock = Clock()
    fresh = Freshness(clock)
    told = fresh.now()
    fresh.take(told, "a")
    with pytest.raises(RegistryError, match="has come before"):
        fresh.take(told, "a")
    clock.now += FRESH_SECONDS - 0.001
    fresh.take(told, "b")
    clock.now += 0.001
    with pytest.raises(RegistryError, match="does not name this registry's time"):
        fresh.take(told, "c")


def test_what_is_remembered_is_remembered_for_as_long_as_it_could_be_repeated() -> None:
    clock = Clock()
    fresh = Freshness(clock)
    fresh.take(fresh.now(), "a")
    told = fresh.now()
    clock.now += FRESH_SECONDS - 0.001
    with pytest.raises(RegistryError, match="has come before"):
        fresh.take(told, "a")
    clock.now += FRESH_SECONDS
    fresh.take(fresh.now(), "a")  # nobody can make the same code with another time
    assert len(fresh._remembered) == 1


def test_another_processs_time_is_none() -> None:
    clock = Clock()
    fresh = Freshness(clock)
    for told in (
        Freshness(clock).now(),
        "",
        ".",
        fresh.now() + "x",
        fresh.now().replace(".", ".-"),
        "٣." + "٣",
        "x" * 999,
    ):
        with pytest.raises(RegistryError, match="does not name"):
            fresh.take(told, "a")
    clock.now -= 1.0
    ahead = fresh.now()
    clock.now -= 1.0
    with pytest.raises(RegistryError, match="does not name"):
        fresh.take(ahead, "a")


def test_what_is_remembered_is_bounded_and_nothing_is_forgotten_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freshness, "MAX_REMEMBERED", 3)
    clock = Clock()
    fresh = Freshness(clock)
    for code in "abc":
        fresh.take(fresh.now(), code)
    with pytest.raises(OverloadedError):
        fresh.take(fresh.now(), "d")
    with pytest.raises(RegistryError, match="has come before"):
        fresh.take(fresh.now(), "a")
    clock.now += FRESH_SECONDS
    fresh.take(fresh.now(), "d")

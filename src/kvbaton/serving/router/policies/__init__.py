"""How a server of each role is chosen, by the names of ``--policy``."""

from __future__ import annotations

from collections.abc import Callable

from kvbaton.errors import ConfigError
from kvbaton.serving.router.policies.base import Policy
from kvbaton.serving.router.policies.cache_aware import CacheAware, CacheAwareSettings
from kvbaton.serving.router.policies.least_load import LeastLoad
from kvbaton.serving.router.policies.power_of_two import PowerOfTwo
from kvbaton.serving.router.policies.random_choice import RandomChoice
from kvbaton.serving.router.policies.round_robin import RoundRobin

_POLICIES: dict[str, Callable[[CacheAwareSettings], Policy]] = {
    "round_robin": lambda _: RoundRobin(),
    "random": lambda _: RandomChoice(),
    "power_of_two": lambda _: PowerOfTwo(),
    "least_load": lambda _: LeastLoad(),
    "cache_aware": CacheAware,
}


def policy_of(name: str, settings: CacheAwareSettings | None = None) -> Policy:
    """A policy of its own for each caller. Raises ConfigError."""
    make = _POLICIES.get(name)
    if make is None:
        raise ConfigError(f"policy {name!r} is none of {', '.join(_POLICIES)}")
    return make(settings if settings is not None else CacheAwareSettings())

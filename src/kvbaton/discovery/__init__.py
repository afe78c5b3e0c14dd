"""How decode finds prefill: the bootstrap registry, its client, and the rule which rank has a room."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvbaton.discovery.registry import RegistryCoordinates, Route
from kvbaton.errors import ConfigError

if TYPE_CHECKING:
    from kvbaton.discovery.membership import Membership


def make_membership(registry: str, route: Route | None, secret: str | None) -> Membership:
    """The client of the registry at ``HOST:PORT``, for a rank that registers as ``route`` or, without one, only asks.

    The first rank of a group serves the registry. Raises ConfigError for an address that cannot be, and without
    aiohttp.
    """
    try:
        from kvbaton.discovery.membership import Membership
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"registry={registry!r} needs aiohttp ({error}): pip install aiohttp, or hand the manager's address to its "
            f"peers by yourself"
        ) from error
    serve = route is not None and route.coordinates == RegistryCoordinates()
    return Membership(registry, route=route, serve=serve, secret=secret)

"""Data planes: ways to write memory of one rank into memory of another."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvbaton.errors import ConfigError

if TYPE_CHECKING:
    from kvbaton.transports.base import Transport

#: What ``--disaggregation-transfer-backend`` may name.
TRANSPORTS = ("nixl", "memory")


def make_transport(name: str, instance: str) -> Transport:
    """Make the data plane ``name`` for the process ``instance``; only that one is imported.

    ``MODULE:CLASS`` names one of your own: a class of :class:`~kvbaton.transports.base.Transport` that takes the
    instance.

    Raises ConfigError for an unknown name and TransportError when the data plane does not come up.
    """
    if name == "nixl":
        from kvbaton.transports.nixl import NixlTransport

        return NixlTransport(instance)
    if name == "memory":
        from kvbaton.transports.memory import MemoryTransport

        return MemoryTransport(instance)
    module, colon, kind = name.partition(":")
    if not colon:
        raise ConfigError(f"transfer backend {name!r} is unknown; use one of: {', '.join(TRANSPORTS)}, or MODULE:CLASS")
    try:
        plug_in: Callable[[str], Transport] = getattr(importlib.import_module(module), kind)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"transfer backend {name!r} cannot be imported: {error}") from error
    return plug_in(instance)

"""kvbaton: hands the KV cache of a prompt, and all else that a model remembers of it, from prefill to decode ranks.

Everything public is here; its modules are imported when a name of theirs is first used. Memory is described with
:mod:`kvbaton.layout`, errors are in :mod:`kvbaton.errors`, suites for plug-ins in :mod:`kvbaton.testing`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvbaton import errors, layout
    from kvbaton.control.base import Links
    from kvbaton.discovery.registry import Sizes
    from kvbaton.errors import KVBatonError
    from kvbaton.launch import launch_id
    from kvbaton.layout import CacheLayout, Coordinates, Region
    from kvbaton.manager import (
        ALWAYS_READY,
        Finished,
        Freed,
        KVManager,
        KVPoll,
        KVReceiver,
        KVSender,
        PeerLost,
        Span,
        TraceEvent,
        new_instance,
    )
    from kvbaton.protocol.settings import Settings
    from kvbaton.runtime.posting import Window
    from kvbaton.transports.base import Transport

__version__ = "0.1.0"
__all__ = [
    "ALWAYS_READY",
    "CacheLayout",
    "Coordinates",
    "Finished",
    "Freed",
    "KVBatonError",
    "KVManager",
    "KVPoll",
    "KVReceiver",
    "KVSender",
    "Links",
    "PeerLost",
    "Region",
    "Settings",
    "Sizes",
    "Span",
    "TraceEvent",
    "Transport",
    "Window",
    "errors",
    "launch_id",
    "layout",
    "new_instance",
]

_HOMES = {
    "control.base": ("Links",),
    "discovery.registry": ("Sizes",),
    "errors": ("KVBatonError",),
    "launch": ("launch_id",),
    "layout": ("CacheLayout", "Coordinates", "Region"),
    "manager": (
        "ALWAYS_READY",
        "Finished",
        "Freed",
        "KVManager",
        "KVPoll",
        "KVReceiver",
        "KVSender",
        "PeerLost",
        "TraceEvent",
        "Span",
        "new_instance",
    ),
    "protocol.settings": ("Settings",),
    "runtime.posting": ("Window",),
    "transports.base": ("Transport",),
}


def __getattr__(name: str) -> Any:
    if name in ("errors", "layout"):
        return importlib.import_module(f"kvbaton.{name}")
    for module, names in _HOMES.items():
        if name in names:
            value = globals()[name] = getattr(importlib.import_module(f"kvbaton.{module}"), name)
            return value
    raise AttributeError(f"module 'kvbaton' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]

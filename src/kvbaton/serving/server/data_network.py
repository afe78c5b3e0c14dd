"""Which addresses of this machine the data plane of a server needs.

The prefill server's peers find it where its links are dialled, so its data plane is there, too. A decode server has no
address of its own: its data plane is where packets to the registries that it may ask leave from.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvbaton.control.address import Address
from kvbaton.serving.server.allow import AllowList
from kvbaton.transports.interfaces import interface_of, source_towards

LOOPBACK = "127.0.0.1"


def data_addresses(mode: str, allow: AllowList, listens: str, advertised: str) -> Sequence[str]:
    """``listens``, ``advertised``: where prefill's links listen, and what peers dial ("": the same).

    A registry that cannot be found yet stands for itself: it is no address of this machine.
    """
    if mode == "decode":
        return [_towards(host) for host, _ in allow.entries] or [LOOPBACK]
    reached = advertised or listens
    translated = interface_of(reached) is None and not Address(listens, 0).is_wildcard
    return [listens if translated else reached]


def _towards(host: str) -> str:
    try:
        return source_towards(host)
    except OSError:
        return host

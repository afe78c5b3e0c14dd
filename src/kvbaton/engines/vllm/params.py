"""``kv_transfer_params``: what a router says with a request, and what prefill answers.

They come from clients, so everything is checked: type, range, number and form of the addresses. ``do_remote_decode``
and ``do_remote_prefill`` are vLLM's own names, which it reads too; what is ours begins with ``kvbaton_``. Rooms travel
as decimal strings below 2^53, because routers may read JSON numbers as doubles.

=============  ===============================================  ========================================================
leg            sequential                                       concurrent
=============  ===============================================  ========================================================
to prefill     ``do_remote_decode: true``                       the same and ``kvbaton_room``
prefill's      all that decode needs; goes to decode as it is   the same, not used
answer
to decode      that answer                                      ``do_remote_prefill: true, kvbaton_room,
                                                                kvbaton_sources``
=============  ===============================================  ========================================================
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvbaton.errors import ConfigError

#: Rooms are below it: what a double holds exactly.
MAX_ROOM = (1 << 53) - 1
#: Most ranks that one prefill engine may have.
MAX_SOURCES = 1024


@dataclass(frozen=True, slots=True)
class PrefillLeg:
    """``room``: minted by the router, which posts both legs at once; None: prefill mints one and answers with it."""

    room: int | None


@dataclass(frozen=True, slots=True)
class DecodeLeg:
    """``sources``: the control address of every prefill rank. ``begun``: they come with prefill's answer, which has the
    room; without, decode is asked at the same time."""

    room: int
    sources: tuple[str, ...]
    begun: bool = False


def mint_room() -> int:
    """A room that nobody guesses and every router can carry."""
    return secrets.randbelow(MAX_ROOM) + 1


def prefill_leg(params: Mapping[str, Any] | None) -> PrefillLeg | None:
    """What a request asks of prefill; None where it asks for nothing. Raises ConfigError."""
    if not params or not _flag(params, "do_remote_decode"):
        return None
    room = params.get("kvbaton_room")
    return PrefillLeg(None if room is None else _room(room))


def decode_leg(params: Mapping[str, Any] | None) -> DecodeLeg | None:
    """What a request brings to decode; None where it brings nothing. Raises ConfigError."""
    if not params or not _flag(params, "do_remote_prefill"):
        return None
    if "kvbaton_room" not in params:
        hint = "prefill must run KVBatonConnector too"
        raise ConfigError("kv_transfer_params has do_remote_prefill but no kvbaton_room", hint=hint)
    begun = _flag(params, "kvbaton_begun")
    return DecodeLeg(_room(params["kvbaton_room"]), _sources(params.get("kvbaton_sources")), begun)


def answer(room: int, sources: Sequence[str], *, group: str, request_id: str, tp_size: int) -> dict[str, Any]:
    """Prefill's answer, which the router passes to decode as it is."""
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "kvbaton_room": str(room),
        "kvbaton_sources": list(sources),
        "kvbaton_begun": True,
        "remote_engine_id": group,
        "remote_request_id": request_id,
        "tp_size": tp_size,
    }


def _flag(params: Mapping[str, Any], name: str) -> bool:
    value = params.get(name)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r} must be true or false")
    return bool(value)


def _room(value: object) -> int:
    if not isinstance(value, str) or not value.isascii() or not value.isdecimal() or len(value) > 16:
        raise ConfigError(f"kvbaton_room={str(value)[:40]!r} must be a decimal number below 2^53, as a string")
    if not 0 < int(value) <= MAX_ROOM:
        raise ConfigError(f"kvbaton_room={value} must be from 1 to 2^53-1")
    return int(value)


def _sources(value: object) -> tuple[str, ...]:
    from kvbaton.control.address import Address

    if not isinstance(value, list | tuple) or not 0 < len(value) <= MAX_SOURCES:
        raise ConfigError(f"kvbaton_sources must list the addresses of 1 to {MAX_SOURCES} prefill ranks")
    found = []
    for text in value:
        if not isinstance(text, str) or len(text) > 100:
            raise ConfigError(f"kvbaton_sources: {str(text)[:40]!r} is no address such as tcp://127.0.0.1:8998")
        address = Address.parse(text)
        if address.is_wildcard:
            raise ConfigError(f"kvbaton_sources: {text} is every interface; name the one to dial")
        found.append(str(address))
    if len(set(found)) != len(found):
        raise ConfigError("kvbaton_sources names a rank twice")
    return tuple(found)

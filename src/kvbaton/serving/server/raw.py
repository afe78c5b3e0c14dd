"""Values of a request that stay bytes until they are needed, and how a field is refused by its name."""

from __future__ import annotations

from typing import Any, NoReturn

import msgspec
from msgspec import Raw

from kvbaton.errors import ConfigError


def null() -> Raw:
    """What a field is that the client has left out."""
    return Raw(b"null")


def decoded(raw: Raw, kind: Any, name: str, most_bytes: int) -> Any:
    """The value of the field ``name``; None for null. Raises ConfigError for what is no ``kind``, or too long."""
    if len(raw) > most_bytes:
        refuse(name, f"{len(raw)} bytes are more than {most_bytes}")
    try:
        return msgspec.json.decode(raw, type=kind | None)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        refuse(name, str(error).partition(" - at ")[0])


def refuse(name: str, why: str) -> NoReturn:
    """Raises ConfigError whose message begins with the field."""
    raise ConfigError(f"{name}: {why}")

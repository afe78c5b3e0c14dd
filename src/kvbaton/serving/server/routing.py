"""What every request for tokens says besides its prompt and its sampling: whose it is, and where its halves meet.

``bootstrap_host/port/room`` are set by a router, never by users: one value, or a list with one for each prompt (or for
each of its choices: SGLang's routers send as many as there are answers). ``data_parallel_rank`` and
``disagg_prefill_dp_rank`` name the data-parallel rank that answers, and the one that prefills. ``kvbaton_journal`` is a
router's as well: what has been answered already (:mod:`kvbaton.serving.server.journal`).

This file must not know HTTP, engines or tokenizers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta, Raw, Struct, field

from kvbaton.discovery.registry import MAX_RANKS
from kvbaton.serving.server.fields import Ruled
from kvbaton.serving.server.per_prompt import value_for, values_of
from kvbaton.serving.server.raw import null, refuse

#: The registry's port, where a request names only its host.
BOOTSTRAP_PORT = 8998
#: A header in which a router may say which half it takes a server for.
ROLE_HEADER = "X-KVBaton-Role"
#: Where a router asks a decode server whether it finds a prefill group: ``?bootstrap_host=H&bootstrap_port=P``.
PAIR_PATH = "/pair"
MAX_RID_CHARACTERS = 128
#: Rooms end below this: 0 means "none" to other engines, and 64 bits do not survive their int64.
ROOM_END = 1 << 63
#: Longest list of hosts, ports or rooms.
MAX_LIST_BYTES = 256 << 10
_NULL = null()

Id = Annotated[str, Meta(min_length=1, max_length=MAX_RID_CHARACTERS, pattern=r"^[\x21-\x7e]+$")]
Host = Annotated[str, Meta(min_length=1, max_length=255)]
Port = Annotated[int, Meta(ge=1, le=65535)]
Room = Annotated[int, Meta(ge=1, le=ROOM_END - 1)]
DpRank = Annotated[int, Meta(ge=0, lt=MAX_RANKS)]


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the halves of one prompt meet; ``host`` is set by a router for decode."""

    room: int
    host: str | None
    port: int


class HandOver(Struct, frozen=True, forbid_unknown_fields=True):
    """What is left of the request in ``room`` goes on in the room ``to``, and those behind it where it has several."""

    room: Room
    to: Room


class Routed(Ruled, kw_only=True):
    model: str | None = None
    stream: bool | None = None
    rid: Id | None = None
    bootstrap_host: Raw = field(default_factory=null)
    bootstrap_port: Raw = field(default_factory=null)
    bootstrap_room: Raw = field(default_factory=null)
    kvbaton_journal: Raw = field(default_factory=null)
    data_parallel_rank: DpRank | None = None
    disagg_prefill_dp_rank: DpRank | None = None

    @property
    def is_routed(self) -> bool:
        raws = self.bootstrap_host, self.bootstrap_port, self.bootstrap_room, self.kvbaton_journal
        return any(raw != _NULL for raw in raws)

    def meetings(self, prompts: int, choices: int) -> list[Meeting] | None:
        """One for each prompt; None where no room is named. Raises ConfigError.

        One room for several prompts is the first of as many in a row.
        """
        rooms = values_of(self.bootstrap_room, Room, "bootstrap_room", MAX_LIST_BYTES)
        hosts = values_of(self.bootstrap_host, Host, "bootstrap_host", MAX_LIST_BYTES)
        ports = values_of(self.bootstrap_port, Port | None, "bootstrap_port", MAX_LIST_BYTES)
        if rooms is None:
            return None
        if not isinstance(rooms, list):
            rooms = [(rooms - 1 + index) % (ROOM_END - 1) + 1 for index in range(prompts)]
        found = []
        for index in range(prompts):
            room, host, port = (
                value_for(values, index, prompts, choices, name)
                for values, name in ((rooms, "bootstrap_room"), (hosts, "bootstrap_host"), (ports, "bootstrap_port"))
            )
            found.append(Meeting(room, host, port or BOOTSTRAP_PORT))
        if len({meeting.room for meeting in found}) < prompts:
            refuse("bootstrap_room", "two prompts have the same room")
        return found


def port_of(text: str) -> int:
    """The registry's port, as it is written in a query. Raises ConfigError."""
    try:
        port: int = msgspec.convert(text, Port, strict=False)
    except msgspec.ValidationError:
        refuse("bootstrap_port", f"{text[:40]!r} is no port (1 to 65535)")
    return port

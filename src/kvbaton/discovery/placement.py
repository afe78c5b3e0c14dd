"""On which data-parallel rank of a prefill group a room is: one rule for both halves, and what only the registry knows.

The order is SGLang's: the rank that the request names (``disagg_prefill_dp_rank``), the only one, the room modulo the
size where the group balances so (``follow_bootstrap_room``). Where it balances otherwise, the prefill server chooses
and writes it down here, and its registry is asked.

This file must not know HTTP, engines or what a request looks like.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

from kvbaton.errors import ConfigError

LoadBalance = Literal["follow_bootstrap_room", "round_robin", "total_requests"]
#: Most rooms whose rank is remembered, oldest forgotten first, and for how long: both halves have met by then.
MAX_PLACED = 1 << 16
PLACED_SECONDS = 300.0


def known_rank(room: int, *, size: int, balance: LoadBalance, named: int | None) -> int | None:
    """The rank as far as it follows from the room; None where whoever dispatches chooses.

    Raises ConfigError for a named rank that does not exist.
    """
    if named is not None:
        return checked_rank(named, size, "disagg_prefill_dp_rank")
    if size == 1:
        return 0
    return room % size if balance == "follow_bootstrap_room" else None


def checked_rank(rank: int, size: int, field: str) -> int:
    """``rank``, which a request names in ``field``. Raises ConfigError where it does not exist."""
    if rank >= size:
        raise ConfigError(f"{field}: {rank} is none of the {size} data-parallel ranks there; pass 0 to {size - 1}")
    return rank


def group_of(launch: str, dp_rank: int, dp_size: int) -> str:
    """The name of the ranks that serve a room together: an engine's own, or that of one of its data-parallel ranks."""
    return launch if dp_size == 1 else f"{launch}.dp{dp_rank}"


class Placements:
    """Rooms that a prefill group has taken, and the rank of each."""

    def __init__(self) -> None:
        self._placed: OrderedDict[int, tuple[int, float]] = OrderedDict()

    def place(self, room: int, rank: int, now: float) -> None:
        """A room has been given to a rank; the last word on a room holds."""
        self._placed[room] = (rank, now + PLACED_SECONDS)
        self._placed.move_to_end(room)
        while len(self._placed) > MAX_PLACED or next(iter(self._placed.values()))[1] <= now:
            self._placed.popitem(last=False)

    def find(self, room: int, now: float) -> int | None:
        """The rank of a room; None for a room that has not come, or came too long ago."""
        rank, until = self._placed.get(room, (None, now))
        return rank if until > now else None

    def __len__(self) -> int:
        return len(self._placed)

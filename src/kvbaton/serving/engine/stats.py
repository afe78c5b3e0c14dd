"""What a scheduler has in hand: plain data, for metrics and for whoever balances load."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Stats:
    """A snapshot. ``pages_leased`` (part of ``pages_used``) may still be touched by a peer.

    ``prefix_lookups``, ``prefix_hit_tokens``: since the start; requests that were admitted by way of the prefix cache,
    and their tokens that it had.
    """

    pages_free: int
    pages_used: int
    pages_leased: int
    slots_used: int
    running: int
    queues: dict[str, int] = field(default_factory=dict)
    prefix_lookups: int = 0
    prefix_hit_tokens: int = 0

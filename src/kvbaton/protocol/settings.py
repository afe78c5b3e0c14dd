"""Deadlines and bounds of the protocol. Every wait and every table of the core is named here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Self, get_args

from kvbaton.errors import ConfigError
from kvbaton.layout import CacheLayout
from kvbaton.plan.costs import Costs, LayersPolicy, default_costs
from kvbaton.plan.staging import StagingPolicy

#: Settings that are one of some words, by their type.
_CHOICES = {"StagingPolicy": get_args(StagingPolicy), "LayersPolicy": get_args(LayersPolicy)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """All durations in seconds.

    Args:
        handshake_timeout: a dialled peer must have answered and agreed by then.
        bootstrap_timeout: both sides of a room must have met by then; a source counts it anew from each chunk that
            waits for its targets, and from each ping of a target whose engine has the room in its queue.
        waiting_timeout: an opened room must make progress, and end, by then.
        announce_seconds: how long an outcome is repeated to a peer that does not acknowledge it.
        settle_seconds: how long a failed source waits for its own writes before it cuts the peer off.
        heartbeat_interval: pause between pings; ``heartbeat_misses`` silent ones mean the peer is lost.
        retry_seconds: first pause before a message is repeated; doubles up to ``retry_most_seconds``. Longer
            where thousands of rooms wait for one peer (``context.REPEATS_PER_SECOND``).
        quarantine_seconds: after how long pages that no proof has freed are freed by policy and counted; None: never.
        rooms: most live rooms for each role; more are refused as overloaded.
        rooms_per_peer, units_per_peer: most rooms that one target has open at a source, and units granted in them.
        sessions: most peers at a time.
        tombstones: ended transfers that are remembered, so that late messages are answered rightly;
            ``tombstones_per_peer`` of one peer, so that nobody makes us forget the others'.
        staging: whether parts travel through staging memory, where both sides have some: by cost, always or never.
        layers_ahead: whether layers travel ahead of the rest of their chunk: by cost, always or never.
        costs: what the choices by cost are made with; None: the defaults for where the pages are.
        write_bytes, write_entries: a chunk is posted in pieces of at most so many bytes and descriptors.
    """

    handshake_timeout: float = 10.0
    bootstrap_timeout: float = 120.0
    waiting_timeout: float = 300.0
    announce_seconds: float = 60.0
    settle_seconds: float = 10.0
    heartbeat_interval: float = 5.0
    heartbeat_misses: int = 2
    retry_seconds: float = 0.5
    retry_most_seconds: float = 5.0
    quarantine_seconds: float | None = None
    rooms: int = 16_384
    rooms_per_peer: int = 4_096
    units_per_peer: int = 1 << 22
    sessions: int = 4_096
    tombstones: int = 8_192
    tombstones_per_peer: int = 4_096
    write_bytes: int = 64 << 20
    write_entries: int = 32_768
    staging: StagingPolicy = "auto"
    layers_ahead: LayersPolicy = "auto"
    costs: Costs | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not value > 0:
                raise ConfigError(f"{field.name}={value} must be positive")

    def costs_of(self, layout: CacheLayout, *, near: bool) -> Costs:
        """What the choices are made with towards a peer; ``near``: on this machine."""
        if self.costs is not None:
            return self.costs
        pages = layout.page_region
        return default_costs(pages.memory if pages is not None else "DRAM", near=near)

    @classmethod
    def from_mapping(cls, values: Mapping[str, object]) -> Self:
        """Settings by name, as a configuration file or an engine's options give them.

        Raises ConfigError for a name that is unknown, a value of another type, or one that must be positive.
        """
        known = {field.name: field for field in fields(cls) if field.name != "costs"}
        for name, value in values.items():
            if name not in known:
                raise ConfigError(f"{name!r} is no setting; there are: {', '.join(known)}")
            kind = str(known[name].type)
            if kind in _CHOICES:
                fits = value in _CHOICES[kind]
            else:
                number = isinstance(value, int | float) and not isinstance(value, bool)
                fits = number and math.isfinite(value) and (isinstance(value, int) or "float" in kind)  # type: ignore[arg-type]
                fits = fits or (value is None and "None" in kind)
            if not fits:
                raise ConfigError(f"{name}={value!r} is no {kind}")
        return cls(**values)  # type: ignore[arg-type]

    @property
    def silence_seconds(self) -> float:
        """Silence after which a peer is lost."""
        return self.heartbeat_interval * self.heartbeat_misses

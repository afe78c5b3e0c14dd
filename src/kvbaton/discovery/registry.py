"""The bootstrap registry's table: which ranks make up the prefill group, and where each one listens.

Rules:

- Pure: no I/O, no clock. Time is the argument ``now`` (seconds on any clock that only goes forward).
- A rank owns its coordinates for as long as it lives: another *instance*, or the same one elsewhere, is told to wait
  until the entry is withdrawn or has expired. Two processes that claim one rank never take turns.
- A registration brings a lock, and is refreshed with the same one: only who has its key withdraws it. Look-ups tell
  neither.
- The ranks of the process that keeps the table (``own``) are there from the start and for as long as it lives: nobody
  takes their place, nobody withdraws them, and only their group is served.
- An entry lives ``ttl_seconds`` past its last registration. Ranks refresh; nothing is kept on trust.
- A group is its name **and** its sizes. A group with other sizes, or another name, collects its ranks beside the old
  one and is served only when every coordinate is held by a live entry: completeness is a set, never a count of
  registrations. Among complete groups the one that appeared last is served; when it expires, an older one that is
  still refreshed is served again.
- Every number that comes from outside is bounded before anything is allocated from it.

This file must not know HTTP, layouts or secrets.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from kvbaton.discovery.placement import LoadBalance
from kvbaton.errors import ConfigError, KVBatonError, LocalProtocolError, OverloadedError, RegistryError

#: Most ranks of one group, and the largest size of one axis.
MAX_RANKS = 4096
#: Most groups that collect or serve at the same time.
MAX_GROUPS = 8
#: How long an entry lives past its last registration, and how often a rank should register.
TTL_SECONDS = 15.0
REFRESH_SECONDS = 5.0
#: Most coordinates that one message names.
NAMED_RANKS = 8

_Name = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[\x21-\x7e]+$")]
_Size = Annotated[int, Meta(ge=1, le=MAX_RANKS)]
_Rank = Annotated[int, Meta(ge=0, lt=MAX_RANKS)]
_Address = Annotated[str, Meta(max_length=280, pattern=r"^tcp://(\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}$")]
_Port = Annotated[int, Meta(ge=0, le=65535)]


class RegistryCoordinates(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a rank stands in its group."""

    dp: _Rank = 0
    pp: _Rank = 0
    cp: _Rank = 0
    tp: _Rank = 0

    def __str__(self) -> str:
        return f"dp{self.dp}.pp{self.pp}.cp{self.cp}.tp{self.tp}"


class Sizes(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many ranks a group has along each axis."""

    dp: _Size = 1
    pp: _Size = 1
    cp: _Size = 1
    tp: _Size = 1

    @property
    def ranks(self) -> int:
        return self.dp * self.pp * self.cp * self.tp

    def all_coordinates(self) -> list[RegistryCoordinates]:
        """Every coordinate, tp fastest. Call it only for sizes that a table has accepted."""
        axes = (range(self.dp), range(self.pp), range(self.cp), range(self.tp))
        return [RegistryCoordinates(dp=dp, pp=pp, cp=cp, tp=tp) for dp, pp, cp, tp in itertools.product(*axes)]


def check_inside(where: RegistryCoordinates, sizes: Sizes) -> None:
    """Raises ConfigError for coordinates that a group of these sizes does not have."""
    for axis in ("dp", "pp", "cp", "tp"):
        if getattr(where, axis) >= getattr(sizes, axis):
            raise ConfigError(
                f"coordinates.{axis}: {getattr(where, axis)} is outside sizes.{axis} {getattr(sizes, axis)}"
            )


class Route(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One rank as it registers itself. ``group`` should be minted per launch of a group, so a restart is a new one.

    ``load_balance``: how the group spreads rooms over its data-parallel ranks.
    """

    instance: _Name
    group: _Name
    address: _Address
    layout_digest: Annotated[str, Meta(max_length=128)]
    http_port: _Port
    coordinates: RegistryCoordinates = RegistryCoordinates()
    sizes: Sizes = Sizes()
    load_balance: LoadBalance = "follow_bootstrap_room"


class Registration(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a rank sends. ``lock``: :func:`lock_of` the key that it withdraws itself with."""

    route: Route
    lock: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]


def lock_of(key: str) -> str:
    """The lock that a key opens: its SHA-256."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


class Registered(Struct, frozen=True, kw_only=True):
    """The answer to a registration: refresh within ``ttl_seconds``."""

    ttl_seconds: float


class RoomRank(Struct, frozen=True, kw_only=True):
    """The data-parallel rank that has taken a room; None while none has."""

    dp_rank: _Rank | None


class Topology(Struct, frozen=True, kw_only=True):
    """A complete group: one live route per coordinate, tp fastest."""

    group: str
    sizes: Sizes
    ranks: tuple[Route, ...]

    @property
    def load_balance(self) -> LoadBalance:
        """How the group spreads rooms over its data-parallel ranks."""
        return self.ranks[0].load_balance

    def addresses(self, dp: int) -> tuple[str, ...]:
        """Control addresses of the ranks of one data-parallel rank, tp fastest."""
        return tuple(route.address for route in self.ranks if route.coordinates.dp == dp)


@dataclass(slots=True)
class _Entry:
    route: Route
    expires: float  # infinity: a rank of this process
    lock: str = ""  # empty: no key opens it


@dataclass(slots=True)
class _Group:
    sizes: Sizes
    own: bool = False
    entries: dict[RegistryCoordinates, _Entry] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return len(self.entries) == self.sizes.ranks  # keys are distinct and within sizes

    def missing(self) -> list[RegistryCoordinates]:
        return [where for where in self.sizes.all_coordinates() if where not in self.entries]


class Registry:
    """The table. Every method takes the time; none blocks."""

    def __init__(self, *, own: Iterable[Route] = (), ttl_seconds: float = TTL_SECONDS) -> None:
        """``own``: ranks of this process. Raises ConfigError for those that cannot be."""
        self._ttl_seconds = ttl_seconds
        self._groups: dict[tuple[str, Sizes], _Group] = {}  # in order of appearance
        for route in own:
            self._check(route)
            group = self._group(route)
            group.own = True
            group.entries[route.coordinates] = _Entry(route, math.inf)

    def register(self, route: Route, now: float, *, lock: str = "") -> Registered:
        """Enter or refresh one rank. Without a ``lock`` it stays until it expires.

        Raises ConfigError for coordinates outside the sizes or too many ranks, LocalProtocolError at a place of this
        process's own ranks, RegistryError at one that somebody else still holds, OverloadedError when the table holds
        too many groups.
        """
        self._check(route)
        self._expire(now)
        group = self._group(route)
        before = group.entries.get(route.coordinates)
        if before is not None and (before.route, before.lock) != (route, lock):
            raise self._held(before)
        group.entries[route.coordinates] = _Entry(route, now + self._ttl_seconds, lock)
        return Registered(ttl_seconds=self._ttl_seconds)

    def _held(self, entry: _Entry) -> KVBatonError:
        """Why nobody else may register where this entry is."""
        where = f"{entry.route.coordinates} of group {entry.route.group}"
        if entry.expires == math.inf:
            return LocalProtocolError(
                f"{where} is a rank of the process that serves this registry", peer=entry.route.instance
            )
        return RegistryError(
            f"{where} is held by instance {entry.route.instance} at {entry.route.address}, which lives: stop it; one "
            f"that was killed is forgotten {self._ttl_seconds:g} s after it last registered",
            peer=entry.route.instance,
        )

    def unregister(self, instance: str, now: float, *, key: str) -> bool:
        """Take a rank out before it expires; False if there is none of this name that the key opens."""
        self._expire(now)
        opened, found = lock_of(key), False
        for group in self._groups.values():
            gone = [
                where
                for where, entry in group.entries.items()
                if entry.route.instance == instance and hmac.compare_digest(entry.lock, opened)
            ]
            for where in gone:
                del group.entries[where]
            found = found or bool(gone)
        self._drop_empty()
        return found

    def lookup(self, now: float) -> Topology:
        """The newest complete group; this process's own where there is one. Raises RegistryError that names what is
        missing."""
        self._expire(now)
        only_own = any(group.own for group in self._groups.values())
        for (name, sizes), group in reversed(self._groups.items()):
            if group.complete and group.own >= only_own:
                ranks = tuple(group.entries[where].route for where in sizes.all_coordinates())
                return Topology(group=name, sizes=sizes, ranks=ranks)
        raise RegistryError(self._incomplete())

    def __len__(self) -> int:
        return sum(len(group.entries) for group in self._groups.values())

    def __repr__(self) -> str:
        groups = ", ".join(f"{name}: {len(g.entries)}/{sizes.ranks}" for (name, sizes), g in self._groups.items())
        return f"<Registry {groups or 'empty'}>"

    def _check(self, route: Route) -> None:
        sizes, where = route.sizes, route.coordinates
        if sizes.ranks > MAX_RANKS:
            raise ConfigError(f"sizes: {sizes.ranks} ranks; a group has at most {MAX_RANKS}")
        check_inside(where, sizes)
        if not 0 < int(route.address.rpartition(":")[2]) <= 65535:
            raise ConfigError(f"address: {route.address} has no usable port")

    def _group(self, route: Route) -> _Group:
        key = (route.group, route.sizes)
        group = self._groups.get(key)
        if group is None:
            if len(self._groups) >= MAX_GROUPS:
                raise OverloadedError(f"{MAX_GROUPS} groups are registered already; wait for dead ones to expire")
            group = self._groups[key] = _Group(route.sizes)
        return group

    def _expire(self, now: float) -> None:
        for group in self._groups.values():
            for where in [where for where, entry in group.entries.items() if entry.expires <= now]:
                del group.entries[where]
        self._drop_empty()

    def _drop_empty(self) -> None:
        self._groups = {key: group for key, group in self._groups.items() if group.entries}

    def _incomplete(self) -> str:
        if not self._groups:
            return "no prefill rank is registered; start one, or wait until it has"
        return "no prefill group is complete: " + "; ".join(
            _shortage(name, group) for (name, _), group in self._groups.items()
        )


def _shortage(name: str, group: _Group) -> str:
    missing = group.missing()
    named = ", ".join(map(str, missing[:NAMED_RANKS])) + (", ..." if len(missing) > NAMED_RANKS else "")
    return f"group {name} has {len(group.entries)} of {group.sizes.ranks} ranks, missing {named}"


def decode_registration(payload: bytes) -> Registration:
    """A registration from its JSON. Raises ConfigError that names the field."""
    try:
        return msgspec.json.decode(payload, type=Registration)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"not a registration: {error}") from None

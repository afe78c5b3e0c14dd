"""Runs a soak: two halves, in each one rank lives all along while its peers are killed and replaced."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from lab.soak.config import SIDES, Side, SoakConfig
from lab.soak.process import RankProcess
from lab.soak.rank import SoakRankSpec

#: How long rooms and sessions of dead peers may take to leave the survivor's tables at the end of a half.
REST_SECONDS = 30.0
#: Tables that must be empty when no room is live.
BUSY = ("sides", "rooms", "homes", "transfers", "writes", "writes_in_flight", "peers_posting", "fenced_chunks")

Progress = Callable[[str, int], None]


@dataclass(frozen=True, slots=True)
class Sample:
    """What the survivor of a half held after so many of its rooms; ``restarts`` of its peer until then."""

    rooms: int
    seconds: float
    restarts: int
    sizes: dict[str, int]


@dataclass(kw_only=True, slots=True)
class Half:
    """What one half of a soak found."""

    survivor: Side
    samples: list[Sample] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    peer_outcomes: Counter[str] = field(default_factory=Counter)
    restarts: int = 0
    seconds: float = 0.0
    left: dict[str, int] = field(default_factory=dict)


class _Pair:
    """The survivor and its present peer."""

    def __init__(self, config: SoakConfig, survivor: Side) -> None:
        self._config = config
        self._peer_side: Side = "target" if survivor == "source" else "source"
        self.survivor = RankProcess(SoakRankSpec(side=survivor, address="", config=config))
        self.peer = RankProcess(SoakRankSpec(side=self._peer_side, address="", config=config))
        self._introduce()

    def _introduce(self) -> None:
        source, target = self.survivor, self.peer
        if self._peer_side == "source":
            source, target = target, source
        target.ask("fill_from", source.address)

    def restart(self) -> None:
        """A new peer where the dead one was."""
        address = self.peer.address
        self.peer.kill()
        self.peer = RankProcess(SoakRankSpec(side=self._peer_side, address=address, config=self._config))
        self._introduce()

    def kill(self) -> None:
        self.survivor.kill()
        self.peer.kill()


def run_half(config: SoakConfig, survivor: Side, first: int, count: int, progress: Progress) -> Half:
    """Play rooms ``first`` up to ``first + count``. Raises KVBatonError when a rank dies or gets stuck."""
    half = Half(survivor=survivor)
    started = time.monotonic()
    pair = _Pair(config, survivor)
    chance = random.Random(config.seed)
    due = started + config.restart_seconds
    batch_seconds = 0.5
    try:
        for room in range(first, first + count, config.sample_rooms):
            size = min(config.sample_rooms, first + count - room)
            begun = time.monotonic()
            pair.survivor.tell("play", room, size)
            pair.peer.tell("play", room, size)
            if time.monotonic() >= due:
                pair.survivor.answers_within(chance.uniform(0.1, 0.8) * batch_seconds)  # somewhere within the batch
                pair.peer.kill()
                pair.survivor.halt()
                half.outcomes.update(pair.survivor.recv())
                pair.restart()
                half.restarts += 1
                due = time.monotonic() + config.restart_seconds
            else:
                half.outcomes.update(pair.survivor.recv())
                half.peer_outcomes.update(pair.peer.recv())
                batch_seconds = time.monotonic() - begun
            sizes = pair.survivor.ask("sample")
            half.samples.append(Sample(room - first + size, time.monotonic() - started, half.restarts, sizes))
            progress(survivor, size)
        half.left = _rest(pair)
        half.seconds = time.monotonic() - started
        half.left["leased_at_close"] = pair.survivor.stop() + pair.peer.stop()
    finally:
        pair.kill()
    return half


def _rest(pair: _Pair) -> dict[str, int]:
    """What is left in the survivor's tables once nothing is played any more; empty is what it should be."""
    deadline = time.monotonic() + REST_SECONDS
    while True:
        sizes = pair.survivor.ask("sample")
        left = {name: sizes[name] for name in BUSY if sizes.get(name)}
        if sizes["sessions"] > 1:
            left["sessions"] = sizes["sessions"]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.5)


def run_soak(config: SoakConfig, progress: Progress) -> list[Half]:
    """Both halves."""
    rooms = config.rooms // 2
    return [run_half(config, side, 1 + number * rooms, rooms, progress) for number, side in enumerate(SIDES)]
